"""Classify handwritten digits with THOR: two lines differ from any PyTorch training loop."""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

import thor_fx

torch.manual_seed(0)
pixels, labels = load_digits(return_X_y=True)
x, y = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))

model = thor_fx.compile(
    model, backend=sys.argv[1] if sys.argv[1:] else "inductor"
)  # instead of torch.compile
opt = thor_fx.Thor(model, lr=0.01, damping=0.03, momentum=0.9, enable_clip_grad=True, frequency=50)

for epoch in range(20):
    for batch in torch.randperm(len(x)).split(256)[:-1]:
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        opt.step()
        opt.zero_grad()
    if epoch in {0, 19}:
        print(f"epoch {epoch + 1}: loss {loss.item():.4f}")
print(f"preconditioned: {', '.join(opt.coverage.layers)}; first-order: {', '.join(opt.coverage.fallback)}")
