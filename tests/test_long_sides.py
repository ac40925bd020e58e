"""Sides that are too long for a whole factor, and a bias that is a column: updates by dense solves."""

import pytest
import torch
import torch.nn.functional as F

import models
import oracle
from dense import case, close, kept, solve, updates
from models import random

D = torch.float64
PARAMS = {"w": random(1, D, 5, 7), "b": random(2, D, 5)}
X = random(3, D, 6, 7)
RULES = ["factor", "sqrt", "pi", "relative"]


def loss_fn(p, x):
    return F.linear(x, p["w"], p["b"]).sin().sum(-1).mean()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("how", ["blocks", "diagonal", "identity"])
@pytest.mark.parametrize("max_dim", [3, 5, 7])
def test_a_long_side_of_a_linear_layer(how, max_dim, rule):
    def forward(tap, p, x):
        return (tap("w", x, x @ p["w"].T) + p["b"]).sin().sum(-1).mean()

    expected = case(forward, PARAMS, X, layers=["w"], terms=6)
    pair, gradient = oracle.factors(expected)["w"], oracle.loss_and_gradients(expected)[1]["w"]
    A, G = (kept(m, how, 3) if len(m) > max_dim else kept(m, "blocks", 3) for m in (pair.A, pair.G))
    U = updates(loss_fn, PARAMS, X, max_dim=max_dim, long_side=how, block_size=3, damping_rule=rule)["w"]
    close(U, solve(A, G, gradient, rule))


def joint():
    """``A`` with the column of the bias, ``G``, and the gradient of ``[W, b]``."""

    def forward(tap, p, x):
        ones = torch.cat([x, torch.ones(len(x), 1, dtype=D)], 1)
        return tap("w", ones, ones @ torch.cat([p["w"], p["b"][:, None]], 1).T).sin().sum(-1).mean()

    expected = case(forward, PARAMS, X, layers=["w"], terms=6)
    pair, gradients = oracle.factors(expected)["w"], oracle.loss_and_gradients(expected)[1]
    return pair.A, pair.G, torch.cat([gradients["w"], gradients["b"][:, None]], 1)


def assert_joint(found, U):
    close(found["w"], U[:, :-1])
    close(found["b"], U[:, -1])


@pytest.mark.parametrize("rule", RULES)
def test_a_joint_bias_is_one_more_column(rule):
    A, G, gradient = joint()
    assert_joint(updates(loss_fn, PARAMS, X, bias="joint", damping_rule=rule), solve(A, G, gradient, rule))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [2, 3, 5, 7])
def test_a_joint_bias_joins_the_last_block_or_has_its_own(size, rule):
    """Of seven features one is in the last block of two or three, two in that of five; one of 7 is full."""
    A, G, gradient = joint()
    settings = {"bias": "joint", "max_dim": 2, "block_size": size, "damping_rule": rule}
    U = solve(kept(A, "blocks", size), kept(G, "blocks", size), gradient, rule)
    assert_joint(updates(loss_fn, PARAMS, X, **settings), U)


def test_blocks_that_were_never_whole_are_those_that_were_cut():
    """The same blocks from all of the factor, or from products within them only."""
    settings = {"bias": "joint", "block_size": 3, "factor_decay": 0.9, "damping_rule": "relative"}
    whole, cut = (updates(loss_fn, PARAMS, X, max_dim=max_dim, **settings) for max_dim in (None, 3))
    for name in PARAMS:
        close(cut[name], whole[name])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("how", ["blocks", "diagonal"])
def test_a_vocabulary_that_is_tied_to_its_embedding(how, rule):
    tied = models.tied_embedding()
    pair, gradient = oracle.factors(tied)["w"], oracle.loss_and_gradients(tied)[1]["w"]
    settings = {"max_dim": 4, "long_side": how, "block_size": 4, "damping_rule": rule}
    U = updates(tied.loss_fn, tied.params, *tied.batch, **settings)["w"]
    close(U, solve(pair.A, kept(pair.G, how, 4), gradient, rule))
