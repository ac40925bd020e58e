"""The length of a layer's step, and the order of momentum and decay around it."""

import math

import pytest
import torch
import torch.nn.functional as F

from dense import close, updates
from models import random
from thor_fx.adam import adam
from thor_fx.layers import Coverage, Layer
from thor_fx.passes.sides import Side
from thor_fx.step_norm import LENGTHS, graft, resize, rms_length, spectral_length
from thor_fx.transform import Signals, chain, stateless

D = torch.float64
PARAMS = {"w": random(1, D, 3, 4), "b": random(2, D, 3)}
X = random(3, D, 6, 4)
NORMS = ["adam", "sgd", "rms", "spectral"]


def loss_fn(p, x):
    return F.linear(x, p["w"], p["b"]).sin().sum(-1).mean()


def gradients(params=PARAMS):
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    found = torch.autograd.grad(loss_fn(leaves, X), list(leaves.values()))
    return dict(zip(params, found, strict=True))


def matrix(tensors):
    return torch.cat([tensors["w"], tensors["b"][:, None]], 1)


def length(norm: str, gradient) -> float:
    """In the first step Adam goes ``g / (|g| + eps)``: one per number."""
    out, in_ = gradient.shape
    return {
        "sgd": gradient.norm().item(),
        "adam": (gradient / (gradient.abs() + 1e-8)).norm().item(),
        "rms": 0.2 * math.sqrt(out * in_),
        "spectral": math.sqrt(min(out, in_) * max(1.0, out / in_)),
    }[norm]


@pytest.mark.parametrize("norm", NORMS)
def test_the_length_is_the_rules_and_the_direction_stays(norm):
    plain, found = updates(loss_fn, PARAMS, X), updates(loss_fn, PARAMS, X, step_norm=norm)
    close(found["w"], plain["w"] * (length(norm, gradients()["w"]) / plain["w"].norm()))
    close(found["b"], plain["b"])  # it belongs to no layer


@pytest.mark.parametrize("norm", NORMS)
def test_a_joint_bias_is_part_of_the_matrix(norm):
    found = updates(loss_fn, PARAMS, X, step_norm=norm, bias="joint")
    plain = updates(loss_fn, PARAMS, X, bias="joint")
    assert matrix(found).norm().item() == pytest.approx(length(norm, matrix(gradients())), rel=1e-10)
    close(matrix(found) / matrix(found).norm(), matrix(plain) / matrix(plain).norm())


@pytest.mark.parametrize("norm", NORMS)
def test_every_group_of_a_convolution_has_its_own_length(norm):
    params, x = {"w": random(1, D, 4, 3, 2)}, random(2, D, 5, 6, 7)  # two groups of (2, 3 x 2)

    def conv(p, x):
        return F.conv1d(x, p["w"], groups=2).sin().sum((1, 2)).mean()

    leaf = params["w"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(conv({"w": leaf}, x), [leaf])
    found = updates(conv, params, x, step_norm=norm)["w"].view(2, 2, 6)
    for u, g in zip(found, gradient.view(2, 2, 6), strict=True):
        assert u.norm().item() == pytest.approx(length(norm, g), rel=1e-10)


@pytest.mark.parametrize("norm", ["rms", "spectral"])
def test_the_learning_rate_alone_says_how_far(norm):
    """Damping and the scale of the loss do not."""
    one = updates(loss_fn, PARAMS, X, step_norm=norm, damping_rule="relative")["w"]
    other = updates(lambda p, x: 100 * loss_fn(p, x), PARAMS, X, step_norm=norm, damping_rule="relative")["w"]
    close(one, other, 1e-9)


# --- alone -----------------------------------------------------------------------------------------------

LAYER = Layer("w", "w", Side(4), Side(3), (), (), 1, "6")
FOUND = Coverage({"w": LAYER}, (), {})


def once(tx, given):
    return tx.update({"w": given}, tx.init({"w": given}, FOUND), {"w": given}, Signals(FOUND))[0]["w"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_squares_neither_overflow_nor_vanish(size, dtype):
    u = once(resize(spectral_length), size * random(1, dtype, 3, 4))
    assert u.norm().item() == pytest.approx(3**0.5, rel=1e-5)


@pytest.mark.parametrize(
    "tx", [*map(resize, LENGTHS.values()), graft(chain(), adam()), graft(chain(), chain())]
)
def test_a_zero_stays_zero(tx):
    assert torch.equal(once(tx, torch.zeros(3, 4, dtype=D)), torch.zeros(3, 4, dtype=D))


def test_a_zero_direction_stays_zero_whatever_the_length():
    nothing = stateless(lambda updates, _p, _s: {n: torch.zeros_like(u) for n, u in updates.items()})
    assert not once(graft(nothing, adam()), random(1, D, 3, 4)).any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_seen_behind_it(bad):
    given = random(1, D, 3, 4)
    given[1, 2] = bad
    assert not once(resize(rms_length), given).isfinite().all()


@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (8, 2), (2, 8), (5, 5)])
def test_the_spectral_length_is_that_of_muons_step(shape):
    """An orthogonal matrix (from an SVD), times ``sqrt(max(1, out / in))``."""
    left, _, right = torch.linalg.svd(random(1, D, *shape), full_matrices=False)
    step = left @ right * max(1.0, shape[0] / shape[1]) ** 0.5
    assert spectral_length(*shape) == pytest.approx(step.norm().item(), rel=1e-12)


def test_the_grafted_length_follows_torchs_adam():
    p = torch.nn.Parameter(torch.zeros(3, 4, dtype=D))
    optimizer = torch.optim.Adam([p], lr=1.0)
    tx = graft(chain(), adam())
    state, before = tx.init({"w": p.detach()}, FOUND), p.detach().clone()
    for step in range(5):
        g = random(step, D, 3, 4)
        p.grad = g.clone()
        optimizer.step()
        new, state = tx.update({"w": g}, state, {"w": p.detach()}, Signals(FOUND))
        moved, before = p.detach() - before, p.detach().clone()
        close(new["w"], g * (moved.norm() / g.norm()))
