"""Bounds on all updates together."""

import pytest
import torch
import torch.nn.functional as F

import thor_fx
from eager_steps import Slow
from models import random
from thor_fx.clips import clip_by_global_norm, clip_by_kl
from thor_fx.layers import Coverage, Layer
from thor_fx.passes.sides import Side
from thor_fx.schedule import Schedule
from thor_fx.transform import Signals, stateless
from training import assert_same, batches, build, by_functional_door, mlp, snapshot, train

D = torch.float64
NOTHING = Coverage({}, (), {})
W = Layer("w", "w", Side(4), Side(3), (), (), 1, "6")
FOUND = Coverage({"w": W}, (), {"b": "a bias"})
GIVEN = {"w": random(1, D, 3, 4), "b": random(2, D, 3)}


def once(tx, given=GIVEN, found=NOTHING, **hyper):
    values = {name: torch.tensor(value, dtype=D) for name, value in hyper.items()}
    new, _ = tx.update(given, tx.init(given, found), given, Signals(found, values))
    return new


# --- global norm -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("largest", [0.1, 1.0, 2.0])
def test_the_global_norm_is_torchs(largest):
    params = [torch.nn.Parameter(torch.zeros_like(g)) for g in GIVEN.values()]
    for p, g in zip(params, GIVEN.values(), strict=True):
        p.grad = g.clone()
    total = torch.nn.utils.clip_grad_norm_(params, largest)
    assert total > 2
    for u, p in zip(once(clip_by_global_norm(largest)).values(), params, strict=True):
        torch.testing.assert_close(u, p.grad, rtol=1e-5, atol=0)  # torch adds 1e-6 to the norm


def test_what_is_within_the_bound_stays_bit_for_bit():
    small = {name: g / 1000 for name, g in GIVEN.items()}
    assert all(torch.equal(u, small[name]) for name, u in once(clip_by_global_norm(1.0), small).items())


# --- KL --------------------------------------------------------------------------------------------------

HALF = stateless(lambda updates, _p, _s: {n: u / 2 for n, u in updates.items()})


def kl(kappa, loss_scale=1.0):
    rate = {"lr": Schedule("lr", 0.1)}
    return clip_by_kl(HALF, kappa, rate, lambda hyper, name: hyper["lr"], loss_scale)


@pytest.mark.parametrize("kappa", [1e-6, 1e-2, 1e3])
def test_the_kl_clip_is_the_formula(kappa):
    """With ``U = g / 2``, ``lr^2 <U, g> = lr^2 |g|^2 / 2``, over what belongs to a layer."""
    nu = min(1.0, (kappa / (0.1**2 * GIVEN["w"].norm().item() ** 2 / 2)) ** 0.5)
    assert (nu == 1) == (kappa == 1e3)
    for name, u in once(kl(kappa), found=FOUND, lr=0.1).items():
        torch.testing.assert_close(u, nu * GIVEN[name] / 2, rtol=1e-12, atol=0)


def test_what_is_within_the_trust_region_stays_bit_for_bit():
    new = once(kl(1e3), found=FOUND, lr=0.1)
    assert all(torch.equal(new[name], g / 2) for name, g in GIVEN.items())


def test_a_zero_gradient_is_no_division_by_zero():
    zeros = {name: torch.zeros_like(g) for name, g in GIVEN.items()}
    assert all(not u.any() for u in once(kl(1e-3), zeros, FOUND, lr=0.1).values())


def test_the_loss_scale_cancels_in_the_kl():
    """The gradients carry it and ``U`` does not: here ``U`` is given the scale on top, to be divided out."""
    scaled = {name: 8 * g for name, g in GIVEN.items()}
    plain, found = once(kl(1e-4), found=FOUND, lr=0.1), once(kl(1e-4, 64.0), scaled, FOUND, lr=0.1)
    for name in plain:
        torch.testing.assert_close(found[name], 8 * plain[name], rtol=1e-12, atol=0)


def test_without_layers_there_is_no_bound():
    assert torch.equal(once(kl(1e-9), lr=0.1)["w"], GIVEN["w"] / 2)


SETTINGS = {"lr": 0.05, "damping": 0.1, "momentum": 0.0, "frequency": 3, "kl_clip": 1e-6}


@pytest.mark.parametrize("momentum_on", ["update", "gradient"])
def test_every_step_has_the_bound_that_was_asked_for(momentum_on):
    """``d^T F d = kappa`` by the dense curvature, with and without momentum before it."""
    slow = Slow(
        build(mlp), **{**SETTINGS, "momentum": 0.9 * (momentum_on == "gradient")}, momentum_on=momentum_on
    )
    for batch in batches(4):
        change = slow.step(*batch)
        curved = 0.0
        for name, (A, G) in slow.inverses.items():
            d = change[name]
            curved += (d * (torch.linalg.inv(G) @ d @ torch.linalg.inv(A))).sum().item()
        assert curved == pytest.approx(1e-6, rel=1e-9)


def test_groups_share_the_trust_region_and_keep_their_learning_rates():
    """``sum lr^2 <U, g>`` takes every group's own learning rate, and one factor scales all."""
    data, rates = batches(1), {"0.weight": 0.05, "2.weight": 0.5}
    start = snapshot(dict(build(mlp).named_parameters()))
    free = {**SETTINGS, "kl_clip": None, "lr": 1.0}
    (plain,) = by_functional_door(build(mlp), data, **free)
    U = {name: start[name] - plain[name] for name in start}
    model = build(mlp)
    F.cross_entropy(model(data[0][0]), data[0][1]).backward()
    square = sum(rates[n] ** 2 * (U[n] * dict(model.named_parameters())[n].grad).sum().item() for n in rates)
    nu = (SETTINGS["kl_clip"] / square) ** 0.5
    assert nu < 0.5

    model = thor_fx.compile(build(mlp), backend="aot_eager")
    second = {"params": ["2.weight", "2.bias"], "lr": 0.5}
    (found,) = train(model, thor_fx.Thor(model, **SETTINGS, params=[second]), data)
    lr = {name: 0.5 if name.startswith("2") else 0.05 for name in start}
    expected = {name: p - lr[name] * nu * U[name] for name, p in start.items()}
    assert_same([found], [expected], rtol=1e-10)
