"""A pass of one's own: the second moment of the gradient in every row of a weight, measured in the graph."""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

import thor_fx
from thor_fx.passes import Grad, Statistic, outputs, splice


def second_moments(gm):
    new = []
    for descriptor, gradient in outputs.output_nodes(gm).items():
        if isinstance(descriptor, Grad) and gradient is not None and gradient.meta["val"].dim() == 2:
            moment = splice(gradient, lambda g: g.square().mean(1), gradient)  # (out, in) -> (out,)
            new.append((Statistic("second moment", descriptor.param), moment))
    outputs.append(gm, new)


second_moments.uuid = "second moments of rows, 1"  # so that compiled graphs are found in caches

torch.manual_seed(0)
pixels, labels = load_digits(return_X_y=True)
x, y = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
model = thor_fx.compile(model, backend=sys.argv[1] if sys.argv[1:] else "inductor", passes=[second_moments])
opt = thor_fx.Thor(model, lr=0.01, damping=0.03, momentum=0.9, enable_clip_grad=True, frequency=25)

print("step  weight    second moment of the gradient: median row, largest row")
for epoch in range(20):
    for number, batch in enumerate(torch.randperm(len(x)).split(256)[:-1]):
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        for (_, weight), rows in opt.statistics().items():  # before the step; empty where it has no factors
            print(f"{7 * epoch + number:4}  {weight}  {rows.median():.2e}  {rows.max():.2e}")
        opt.step()
        opt.zero_grad()
    if epoch in {0, 19}:
        print(f"epoch {epoch + 1}: loss {loss.item():.4f}")
