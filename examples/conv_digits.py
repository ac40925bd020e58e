"""Classify handwritten digits with a small residual net, and count how many new ones it gets right."""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

import thor_fx


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2))

    def forward(self, x):
        h = self.norms[0](self.first(x)).relu()
        return (x + self.norms[1](self.second(h))).relu()


torch.manual_seed(0)
pixels, labels = load_digits(return_X_y=True)
order = torch.randperm(len(labels))
x = torch.tensor(pixels / 16, dtype=torch.float32)[order].unflatten(1, (1, 8, 8))
y = torch.tensor(labels)[order]
stem = nn.Conv2d(1, 16, 3, padding=1)
model = nn.Sequential(stem, Residual(16), nn.MaxPool2d(2), Residual(16), nn.Flatten(), nn.Linear(256, 10))

model = thor_fx.compile(model, backend=sys.argv[1] if sys.argv[1:] else "inductor")
opt = thor_fx.Thor(model, lr=0.02, preset="recommended")

for epoch in range(5):
    for batch in torch.randperm(1500).split(128)[:-1]:
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        opt.step()
        opt.zero_grad()
    if epoch in {0, 4}:
        print(f"epoch {epoch + 1}: loss {loss.item():.4f}")

model.eval()
with torch.no_grad():
    accuracy = (model(x[1500:]).argmax(1) == y[1500:]).float().mean()
print(f"held-out accuracy {accuracy:.3f}")
