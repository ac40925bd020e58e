"""Losses with derivatives of a net (a differential equation): every order is a use of the weights."""

import pytest
import torch
from torch.func import jacfwd, jvp, vmap

import oracle
import thor_fx
from dense import case
from models import random

# torch makes its rules of forward mode by torch.jit.script, which it calls deprecated
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

D = torch.float64
ROWS, WIDTH = 6, 5
PARAMS = {"first": random(1, D, WIDTH, 1), "bias": random(2, D, WIDTH), "second": random(3, D, 1, WIDTH)}
X = random(4, D, ROWS, 1)


def net(p, x):
    return torch.tanh(x @ p["first"].T + p["bias"]) @ p["second"].T


def residual(second_derivative, x):
    return second_derivative + x.sin()


def nested(p, x):
    ones = torch.ones_like(x)
    return jvp(lambda x: jvp(lambda x: net(p, x), (x,), (ones,))[1], (x,), (ones,))[1]


def pointwise(p, x):
    return vmap(jacfwd(jacfwd(lambda point: net(p, point)[0])))(x).flatten(1)


def by_hand(tap, p, x):
    """The Taylor coefficients of the net, layer by layer; jvp of jvp computes that of first order twice."""
    ones = torch.ones_like(x)
    value = tap("first", x, x @ p["first"].T + p["bias"])
    inner, outer = (tap("first", ones, ones @ p["first"].T) for _ in range(2))
    t = torch.tanh(value)
    bent = -2 * t * (1 - t.square()) * inner * outer
    return tap("second", bent, bent @ p["second"].T)


@pytest.mark.parametrize("second_derivative", [nested, pointwise])
def test_every_order_is_a_use(second_derivative):
    found = thor_fx.factors(lambda p, x: residual(second_derivative(p, x), x).square().mean(), PARAMS, X)

    def forward(tap, p, x):
        return residual(by_hand(tap, p, x), x).square().mean()

    expected = oracle.factors(case(forward, PARAMS, X, layers=["first", "second"], terms=ROWS))
    assert found.keys() == expected.keys()
    for layer, pair in expected.items():
        assert found[layer].rows == pair.rows
        assert oracle.relative_error(found[layer].A, pair.A) < 1e-10
        assert oracle.relative_error(found[layer].G, pair.G) < 1e-10


def test_exact_factors_are_those_of_the_residual():
    """Gauss-Newton: cotangents are derivatives of the residual, whatever that is; r^2 has curvature 2."""

    def loss_fn(p, x):
        return torch.nn.functional.mse_loss(nested(p, x), -x.sin())

    found = thor_fx.factors(loss_fn, PARAMS, X, fisher="exact")

    def forward(tap, p, x):
        return by_hand(tap, p, x).sum()

    of_residuals = case(forward, PARAMS, X, layers=["first", "second"], terms=ROWS)
    for layer, uses in oracle.uses(of_residuals).items():
        g = torch.cat([use.g for use in uses])
        assert oracle.relative_error(found[layer].G, 2 * g.T @ g / ROWS) < 1e-10
