"""Sides of convolutions that are too long for a whole factor: updates of both doors by dense solves."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import thor_fx
from convolutions import BATCH, CHANNELS, OUT, expected, random
from dense import close, kept, solve, updates
from thor_fx.passes import patches

LAMBDA, BLOCK, TAPS = 0.3, 20, 9
MODULES: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Conv2d(CHANNELS, OUT, 3, padding=1, stride=2, bias=False),
    "grouped": lambda: nn.Conv2d(CHANNELS, OUT, 3, padding=1, groups=2, bias=False),
    "depthwise": lambda: nn.Conv2d(CHANNELS, OUT, 3, groups=CHANNELS, bias=False),
    "transposed": lambda: nn.ConvTranspose2d(CHANNELS, OUT, 3, stride=2, padding=1, bias=False),
    "transposed, grouped": lambda: nn.ConvTranspose2d(CHANNELS, OUT, 3, groups=2, bias=False),
}
X = random(BATCH, CHANNELS, 5, 4)


def built(name: str) -> nn.Module:
    module = MODULES[name]().double()
    with torch.no_grad():
        module.weight.copy_(random(*module.weight.shape, seed=1))
    return module


def matrices(module: nn.Module, weight: Tensor) -> Tensor:
    """(out, in) of every group: (groups, out / groups, in / groups x taps)."""
    if not isinstance(module, nn.ConvTranspose2d):
        return weight.unflatten(0, (module.groups, -1)).flatten(2)
    return weight.unflatten(0, (module.groups, -1)).transpose(1, 2).flatten(2)


def reference(module: nn.Module, how: str, max_dim: int, rule: str) -> Tensor:
    """By a dense solve for every group; features are cut between channels, never within one."""
    transposed = isinstance(module, nn.ConvTranspose2d)

    def convolve(weight: Tensor) -> Tensor:
        return functional_call(module, {"weight": weight}, (X,))

    weight = module.weight.detach()
    A, G, _ = expected(convolve, weight, module.groups, transposed)
    A, G = (m if m.dim() == 3 else m[None] for m in (A, G))
    leaf = weight.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(convolve(leaf).sin().mean(), leaf)
    blocks = BLOCK // TAPS * TAPS, BLOCK
    found = []
    for a, g, m in zip(A, G, matrices(module, gradient), strict=True):
        sides = (
            kept(side, how, block) if len(side) > max_dim else kept(side, "blocks", BLOCK)
            for side, block in zip((a, g), blocks, strict=True)
        )
        found.append(solve(*sides, m, rule, LAMBDA))
    return torch.stack(found)


def by_functional_door(module: nn.Module, **settings: Any) -> Tensor:
    def loss_fn(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(module, p, (x,)).sin().mean()

    return updates(loss_fn, {"weight": module.weight.detach()}, X, damping=LAMBDA, **settings)["weight"]


def by_drop_in_door(module: nn.Module, **settings: Any) -> Tensor:
    before = module.weight.detach().clone()
    model = thor_fx.compile(module, backend="aot_eager")
    optimizer = thor_fx.Thor(model, lr=1.0, damping=LAMBDA, momentum=0.0, **settings)
    model(X).sin().mean().backward()
    optimizer.step()
    return before - module.weight.detach()


@pytest.mark.parametrize("door", [by_functional_door, by_drop_in_door])
@pytest.mark.parametrize("how", ["blocks", "diagonal", "identity"])
@pytest.mark.parametrize("name", MODULES)
def test_a_long_side_of_a_convolution(name, how, door):
    for max_dim, rule in ((10, "factor"), (6, "pi")):  # the patches, then the pixels too
        module = built(name)
        settings = {"max_dim": max_dim, "long_side": how, "block_size": BLOCK, "damping_rule": rule}
        U = door(module, **settings)
        close(matrices(module, U), reference(built(name), how, max_dim, rule))


@pytest.mark.parametrize("name", MODULES)
def test_the_rules_differ(name):
    """Else agreement with the reference would say little."""
    found = [reference(built(name), how, 6, "pi") for how in ("blocks", "diagonal", "identity")]
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.pairwise(found))


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "sizes", [{"max_dim": 6, "block_size": BLOCK}, {"block_size": 7}, {"block_size": 20}]
)
def test_blocks_cut_from_the_whole_are_those_of_their_own_products(name, bias, sizes, monkeypatch):
    """Few are cut, many are not. Below ``max_dim``, blocks begin and end within a channel."""
    module = built(name)
    if bias:
        module.bias = nn.Parameter(random(OUT, seed=2))
    settings = {**sizes, "bias": "joint"}
    cut = by_drop_in_door(copy.deepcopy(module), **settings)
    monkeypatch.setattr(patches, "WHOLE", 0)
    close(by_drop_in_door(copy.deepcopy(module), **settings), cut)
