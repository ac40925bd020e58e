"""Train an ensemble of classifiers of digits at once: weights are stacked, and ``vmap`` runs all members.

Every member keeps the Kronecker factors that it has alone: number for number, this is one run for each.
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

import thor_fx

MEMBERS = 8

torch.manual_seed(0)
pixels, labels = load_digits(return_X_y=True)
order = torch.randperm(len(labels))
x, y = torch.tensor(pixels / 16, dtype=torch.float32)[order], torch.tensor(labels)[order]
nets = [nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)) for _ in range(MEMBERS)]
stacked, _ = stack_module_state(nets)
params = {name: weights.detach() for name, weights in stacked.items()}  # "0.weight": (members, 32, 64)


def logits(params, x):
    return vmap(lambda member: functional_call(nets[0], member, x))(params)  # (members, batch, 10)


def loss_fn(params, x, y):
    losses = vmap(nn.functional.cross_entropy, in_dims=(0, None))(logits(params, x), y)
    return losses.sum(), losses.mean()  # the sum: a member's gradient is that of its own loss


tx = thor_fx.thor(lr=0.05, preset="recommended")
step = thor_fx.compile_step(loss_fn, tx, backend=sys.argv[1] if sys.argv[1:] else "inductor")
state = step.init(params, x[:128], y[:128])

for epoch in range(10):
    for batch in torch.randperm(1500).split(128)[:-1]:
        params, state, out = step(params, state, x[batch], y[batch])
    if epoch in {0, 9}:
        print(f"epoch {epoch + 1}: loss {out.aux.item():.4f}")

said = logits(params, x[1500:]).softmax(-1)
alone = (said.argmax(-1) == y[1500:]).float().mean(1)
together = (said.mean(0).argmax(-1) == y[1500:]).float().mean()
print(f"held-out accuracy: members {alone.min():.3f} to {alone.max():.3f}, together {together:.3f}")
