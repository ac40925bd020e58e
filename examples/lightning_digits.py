"""Classify handwritten digits with Lightning: thor_fx.compile in the module, Thor in configure_optimizers."""

import sys

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader, TensorDataset

import thor_fx

L.seed_everything(0)
pixels, labels = load_digits(return_X_y=True)
x, y = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)
loader = DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True, drop_last=True)


class Digits(L.LightningModule):
    def __init__(self, backend: str) -> None:
        super().__init__()
        net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
        self.net = thor_fx.compile(net, backend=backend)
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, digits = batch
        loss = nn.functional.cross_entropy(self.net(images), digits)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> dict:
        opt = thor_fx.Thor(self.net, lr=0.01, damping=0.03, momentum=0.9, enable_clip_grad=True, frequency=50)
        schedule = {"scheduler": LinearLR(opt, 1.0, 0.1, total_iters=140), "interval": "step"}
        return {"optimizer": opt, "lr_scheduler": schedule}


model = Digits(sys.argv[1] if sys.argv[1:] else "inductor")
trainer = L.Trainer(
    max_epochs=10,
    accumulate_grad_batches=2,
    precision="bf16-mixed",
    logger=False,
    enable_progress_bar=False,
    enable_checkpointing=False,  # trainer.fit(..., ckpt_path=...) resumes: docs/loops.md
)
trainer.fit(model, loader)
print(f"first loss {model.losses[0]:.4f}, last loss {model.losses[-1]:.4f}")
