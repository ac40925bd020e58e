"""Solve a Poisson equation with a net: its loss holds second derivatives of the net, taken in forward mode.

``-(u_xx + u_yy) = 2 pi^2 sin(pi x) sin(pi y)`` inside the unit square and ``u = 0`` on its edge. Prints the
error against the exact solution, relative in L2; ``--adam 0.1`` trains the same net with Adam at that
learning rate, too.
"""

import argparse
from math import pi

import torch
from torch import nn
from torch.func import functional_call, jvp
from torch.nn.functional import mse_loss

import thor_fx

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("backend", nargs="?", default="inductor")
parser.add_argument("--steps", type=int, default=400)
parser.add_argument("--lr", type=float, default=0.06)
parser.add_argument("--adam", type=float, metavar="LR")
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

torch.set_default_dtype(torch.float64)
torch.manual_seed(args.seed)
net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
start = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
inside = torch.rand(256, 2)
along, side = torch.rand(64), torch.arange(64) % 2
edge = torch.stack([torch.stack([along, side]), torch.stack([side, along])]).movedim(1, 2).flatten(0, 1)
grid = torch.cartesian_prod(torch.linspace(0, 1, 50), torch.linspace(0, 1, 50))


def exact(points):
    return (pi * points).sin().prod(1, keepdim=True)


def second_derivative(f, points, direction):
    def first(points):
        return jvp(f, (points,), (direction,))[1]

    return jvp(first, (points,), (direction,))[1]


def loss_fn(params, inside, edge):
    def u(points):
        return functional_call(net, params, points)

    directions = torch.eye(2)[:, None].expand(2, *inside.shape)
    laplacian = sum(second_derivative(u, inside, direction) for direction in directions)
    equation = mse_loss(laplacian, -2 * pi**2 * exact(inside))
    return equation + 10 * mse_loss(u(edge), torch.zeros(len(edge), 1))


def error(params):
    difference = functional_call(net, params, grid) - exact(grid)
    return (difference.norm() / exact(grid).norm()).item()


def falling(lr):
    return lambda step: lr * (1 - step / args.steps)


tx = thor_fx.thor(lr=falling(args.lr), preset="recommended", fisher="exact")
step = thor_fx.compile_step(loss_fn, tx, backend=args.backend, donate=False)
params, state = start, step.init(start, inside, edge)
for number in range(1, args.steps + 1):
    params, state, out = step(params, state, inside, edge)
    if number in {1, args.steps}:
        print(f"step {number}: loss {out.loss.item():.4f}, relative error {error(params):.4f}")

if args.adam is not None:
    weights = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    opt = torch.optim.Adam(weights.values())
    compiled = torch.compile(loss_fn, backend=args.backend)
    for number in range(args.steps):
        opt.param_groups[0]["lr"] = falling(args.adam)(number)
        loss = compiled(weights, inside, edge)
        opt.zero_grad()
        loss.backward()
        opt.step()
    with torch.no_grad():
        print(f"Adam: last loss: {loss.item():.4f}, relative error {error(weights):.4f}")
