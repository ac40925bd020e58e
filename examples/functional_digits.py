"""Compress handwritten digits with THOR, functionally: the whole training step is one compiled graph."""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call

import thor_fx

torch.manual_seed(0)
pixels = torch.tensor(load_digits().data / 16, dtype=torch.float32)
model = nn.Sequential(
    nn.Linear(64, 128),
    nn.Tanh(),
    nn.Linear(128, 16),
    nn.Tanh(),
    nn.Linear(16, 128),
    nn.Tanh(),
    nn.Linear(128, 64),
)
params = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def loss_fn(params, x):
    return (functional_call(model, params, x) - x).square().sum(1).mean()


tx = thor_fx.thor(lr=0.03, damping=0.03, momentum=0.9, enable_clip_grad=True, frequency=50)
step = thor_fx.compile_step(loss_fn, tx, backend=sys.argv[1] if sys.argv[1:] else "inductor")
state = step.init(params, pixels[:256])

for epoch in range(20):
    for batch in torch.randperm(len(pixels)).split(256)[:-1]:
        params, state, out = step(params, state, pixels[batch])
    if epoch in {0, 19}:
        print(f"epoch {epoch + 1}: loss {out.loss.item():.4f}")
