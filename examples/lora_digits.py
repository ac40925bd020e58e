"""Fine-tune a classifier of digits to images that stand on their heads: LoRA adapters of PEFT, with THOR."""

import sys
import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from sklearn.datasets import load_digits
from torch import nn

import thor_fx

torch.manual_seed(0)
backend = sys.argv[1] if sys.argv[1:] else "inductor"
pixels, labels = load_digits(return_X_y=True)
x, y = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)
base = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def train(model: nn.Module, x: torch.Tensor, epochs: int) -> list[float]:
    model = thor_fx.compile(model, backend=backend)
    opt = thor_fx.Thor(model, lr=0.01, damping=0.03, momentum=0.9, enable_clip_grad=True, frequency=50)
    losses = []
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(256)[:-1]:
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            loss.backward()
            opt.step()
            opt.zero_grad()
            losses.append(loss.item())
    print(f"factors of {', '.join(opt.coverage.layers)}")
    return losses


train(base, x, epochs=20)

upside_down = x.flip(1)
model = get_peft_model(base, LoraConfig(r=8, target_modules=["0", "2", "4"]))  # its weights are frozen
losses = train(model, upside_down, epochs=20)
print(f"first loss {losses[0]:.4f}, last loss {losses[-1]:.4f}")

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)  # the adapters only
    again = PeftModel.from_pretrained(model.unload(), folder)
merged = again.merge_and_unload()  # an nn.Sequential as before
right = (merged(upside_down).argmax(1) == y).float().mean()
print(f"saved, loaded and merged, {right:.1%} of the digits are right")
