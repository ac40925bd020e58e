"""Classify handwritten digits in a loop of one's own with Accelerate; half way, it stops and resumes."""

import sys
import tempfile

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader, TensorDataset

import thor_fx

pixels, labels = load_digits(return_X_y=True)
x, y = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)
backend = sys.argv[1] if sys.argv[1:] else "inductor"
losses = []


def train(epochs: range, folder: str) -> None:
    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2, mixed_precision="bf16")
    loader = DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True, drop_last=True)
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    model = accelerator.prepare(thor_fx.compile(net, backend=backend))
    opt = thor_fx.Thor(model, lr=0.01, damping=0.03, momentum=0.9, enable_clip_grad=True, frequency=50)
    opt, loader, schedule = accelerator.prepare(opt, loader, LinearLR(opt, 1.0, 0.1, total_iters=140))

    if epochs.start > 0:
        accelerator.load_state(folder)
    for _ in epochs:
        for images, digits in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(images), digits)
                accelerator.backward(loss)
                opt.step()
                schedule.step()
                opt.zero_grad()
                losses.append(loss.item())
    accelerator.save_state(folder)


with tempfile.TemporaryDirectory() as folder:
    train(range(5), folder)
    train(range(5, 10), folder)
print(f"first loss {losses[0]:.4f}, last loss {losses[-1]:.4f}")
