"""Damping relative to the mean eigenvalue; the other rules are in test_precondition.py."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import thor_fx
from dense import close, solve, updates
from models import random
from thor_fx.layers import Layer
from thor_fx.passes.sides import Side
from thor_fx.refresh import per_side, root
from training import assert_moved, batches, build, by_drop_in_door, by_functional_door, snapshot

D = torch.float64
LAMBDA = 0.3
PARAMS = {"w": random(1, D, 3, 4)}
X = random(3, D, 6, 4)


def loss_fn(p, x):
    return F.linear(x, p["w"]).sin().sum(-1).mean()


def layer(in_: Side, out: Side) -> Layer:
    return Layer("w", "w", in_, out, (), (), 1, "6")


def test_the_damping_is_the_fraction_of_the_mean_eigenvalue():
    A, G = (m @ m.T for m in (random(1, D, 5, 5), random(2, D, 3, 3)))
    means = [torch.linalg.eigvalsh(m).mean() for m in (A, G)]
    found = per_side("relative", LAMBDA, (A[None], G[None]), layer(Side(5), Side(3)))
    for strength, mean in zip(found, means, strict=True):
        torch.testing.assert_close(strength, LAMBDA * mean[None], rtol=1e-12, atol=0)


def test_every_matrix_of_a_stack_has_its_own():
    A = torch.stack([torch.eye(2, dtype=D), 5 * torch.eye(2, dtype=D), torch.zeros(2, 2, dtype=D)])
    damp, _ = per_side("relative", LAMBDA, (A, None), layer(Side(2), Side(7, "identity")))
    assert damp.tolist() == pytest.approx([LAMBDA, 5 * LAMBDA, LAMBDA])  # zeros count as the identity


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_direction_does_not_depend_on_the_scale_of_the_loss(scale):
    """``A`` stays, ``G`` and its damping carry the square: ``U`` carries the inverse."""
    plain = updates(loss_fn, PARAMS, X, damping=LAMBDA, damping_rule="relative")["w"]
    scaled = updates(lambda p, x: scale * loss_fn(p, x), PARAMS, X, damping=LAMBDA, damping_rule="relative")[
        "w"
    ]
    close(scaled * scale, plain, 1e-9)


def test_norms_keep_the_absolute_damping():
    assert root("relative", 0.25) == root("factor", 0.25) == 0.25
    assert root("sqrt", 0.25) == root("pi", 0.25) == 0.5


# --- a head of zeros -------------------------------------------------------------------------------------


def headless() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    nn.init.zeros_(model[2].weight)
    return model


SETTINGS = {"lr": 0.1, "damping": LAMBDA, "momentum": 0.5, "damping_rule": "relative", "frequency": 100}


@pytest.mark.parametrize("door", [by_functional_door, by_drop_in_door])
def test_behind_a_head_of_zeros_the_factor_is_the_identity(door):
    """Its gradient is exactly zero in the only factor step; later it moves by ``G_d^-1 = I / lambda``."""
    start = snapshot(dict(build(headless).named_parameters()))
    found = door(build(headless), batches(3), **SETTINGS)
    assert torch.equal(found[0]["0.weight"], start["0.weight"])
    assert_moved(found[1:], found[0])

    model = build(headless)
    model.load_state_dict(found[0])
    x, y = batches(2)[1]
    F.cross_entropy(model(x), y).backward()
    (first, _), gradient = batches(1)[0], model[0].weight.grad
    A = first.T @ first / len(first)
    moved = (found[1]["0.weight"] - found[0]["0.weight"]) / -SETTINGS["lr"]
    close(moved, solve(A, torch.zeros(6, 6, dtype=D), gradient, "relative", LAMBDA))


def test_no_inverse_fails():
    model = thor_fx.compile(build(headless), backend="aot_eager")
    optimizer = thor_fx.Thor(model, **SETTINGS)
    x, y = batches(1)[0]
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert optimizer.metrics().items() >= {"skipped_steps": 0, "failed_inverses": 0}.items()
    eye = torch.eye(6, dtype=D) / LAMBDA
    (output,) = optimizer.state[model[0].weight]["inverses"]["0.weight"]["output"]
    torch.testing.assert_close(output[0, 0], eye, rtol=1e-12, atol=1e-14)
