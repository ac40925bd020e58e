"""Weights that are used at several positions: ``expand`` and ``reduce`` (Eschenhagen et al. 2023)."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import oracle
import thor_fx
from training import HIDDEN, IN, batches, build, by_both_doors, by_functional_door

BATCH, TIME = 4, 3


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pooled(p, x):
    """A linear net that averages over its positions: (B, T, in) -> (B, out)."""
    return (x @ p["w"].T).mean(1)


def mean_square(predict):
    def loss_fn(p, x, y):
        return ((predict(p, x) - y) ** 2).sum(-1).mean()

    return loss_fn


W, X, Y = {"w": random(2, 5)}, random(BATCH, TIME, 5, seed=1), random(BATCH, 2, seed=2)


def by_hand(x, s_gradient):
    """Mean of activations and sum of cotangents of every datum, from (B, T, ...) rows."""
    a, g = x.mean(1), s_gradient.sum(1)
    return a.T @ a / len(a), len(g) * g.T @ g


def cotangents(loss_of_preactivations, s):
    s = s.detach().requires_grad_()
    (g,) = torch.autograd.grad(loss_of_preactivations(s), s)
    return g


def assert_pair(pair, A, G):
    assert oracle.relative_error(pair.A, A) < 1e-10
    assert oracle.relative_error(pair.G, G) < 1e-10


def test_reduced_factors():
    g = cotangents(lambda s: ((s.mean(1) - Y) ** 2).sum(-1).mean(), X @ W["w"].T)
    pair = thor_fx.factors(mean_square(pooled), W, X, Y, sharing="reduce", batch_size=BATCH)["w"]
    assert pair.rows == BATCH
    assert_pair(pair, *by_hand(X, g))


def test_positions_first():
    """(T, B, in), as recurrent nets have it by default; the rows of the head say which axis is the batch."""

    def loss_fn(p, x, y):
        h = (x @ p["w"].T).mean(0).tanh()  # (B, hidden)
        return F.cross_entropy(h @ p["head"].T, y)

    params = {**W, "head": random(3, 2, seed=3)}
    x, y = random(TIME, BATCH, 5), torch.arange(BATCH) % 3
    pair = thor_fx.factors(loss_fn, params, x, y, sharing="reduce")["w"]
    g = cotangents(lambda s: F.cross_entropy(s.mean(0).tanh() @ params["head"].T, y), x @ params["w"].T)
    assert_pair(pair, *by_hand(x.transpose(0, 1), g.transpose(0, 1)))


def test_a_function_chooses_layer_by_layer():
    def loss_fn(p, x, y):
        h = (x @ p["w"].T).tanh()
        return ((h @ p["head"].T).mean(1) - y).square().sum(-1).mean()

    params = {**W, "head": random(2, 2, seed=3)}
    options = {"batch_size": BATCH}
    mixed = thor_fx.factors(
        loss_fn, params, X, Y, sharing=lambda name: "reduce" if name == "w" else "expand", **options
    )
    reduced = thor_fx.factors(loss_fn, params, X, Y, sharing="reduce", **options)
    expanded = thor_fx.factors(loss_fn, params, X, Y, sharing="expand", **options)
    assert torch.equal(mixed["w"].A, reduced["w"].A)
    assert torch.equal(mixed["head"].A, expanded["head"].A)
    assert not torch.allclose(reduced["w"].A, expanded["w"].A)
    assert [layer.rows for layer in mixed.values()] == [BATCH, BATCH * TIME]


def test_uses_of_one_weight_are_reduced_to_one_row_per_datum():
    """Both halves of a siamese input belong to one datum."""

    def loss_fn(p, x, z, y):
        return ((x @ p["w"].T + z @ p["w"].T - y) ** 2).sum(-1).mean()

    x, z = random(BATCH, 5, seed=4), random(BATCH, 5, seed=5)
    pair = thor_fx.factors(loss_fn, W, x, z, Y, sharing="reduce")["w"]
    g = cotangents(lambda s: ((s - Y) ** 2).sum(-1).mean(), x @ W["w"].T + z @ W["w"].T)
    a = (x + z) / 2
    assert pair.rows == BATCH
    assert_pair(pair, a.T @ a / BATCH, BATCH * (2 * g).T @ (2 * g))


def test_lookups_are_not_reduced():
    def loss_fn(p, tokens, y):
        return F.cross_entropy(F.embedding(tokens, p["w"]).mean(1), y)

    params, tokens = {"w": random(7, 3)}, torch.arange(12).reshape(4, 3) % 7
    batch = tokens, torch.arange(4) % 3
    expected = thor_fx.factors(loss_fn, params, *batch)["w"]
    assert torch.equal(thor_fx.factors(loss_fn, params, *batch, sharing="reduce")["w"].A, expected.A)
    report = thor_fx.explain(loss_fn, params, *batch, tx=thor_fx.thor(0.1, 0.1, 0.9, sharing="reduce"))
    assert "not grouped by datum" in report.why("w")


# --- exact where K-FAC is exact --------------------------------------------------------------------


def fisher_of(loss_fn, params, name, *batch):
    """The dense empirical Fisher block over the examples of a batch."""
    return oracle.empirical_fisher(oracle.per_example_gradients(loss_fn, params, *batch)[name])


def test_reduce_is_exact_for_one_pooled_datum():
    loss_fn = mean_square(pooled)
    pair = thor_fx.factors(loss_fn, W, X[:1], Y[:1], sharing="reduce", batch_size=1)["w"]
    fisher = fisher_of(loss_fn, W, "w", X[:1], Y[:1])
    assert oracle.relative_error(oracle.kronecker(pair.G, pair.A), fisher) < 1e-10
    expanded = thor_fx.factors(loss_fn, W, X[:1], Y[:1], batch_size=1)["w"]
    assert oracle.relative_error(oracle.kronecker(expanded.G, expanded.A), fisher) > 0.01


def test_expand_is_exact_for_a_loss_per_position():
    """Every position is a term of its own; the cotangents do not vary, so the expectation factorises."""

    def loss_fn(p, x):
        return (x @ p["w"].T).sum(-1).mean()

    pair = thor_fx.factors(loss_fn, W, X)["w"]
    terms = X.flatten(0, 1)[:, None]  # every position alone
    fisher = fisher_of(loss_fn, W, "w", terms)
    assert pair.n == BATCH * TIME
    assert oracle.relative_error(oracle.kronecker(pair.G, pair.A), fisher) < 1e-10


def test_a_deep_linear_net_with_squared_error_and_whitened_errors():
    """Cotangents that do not depend on the input: ``E[aa^T (x) gg^T] = E[aa^T] (x) E[gg^T]``."""
    params = {"a": random(3, 4), "b": random(2, 3, seed=1)}
    x = torch.cat([random(5, 4, seed=2)] * 2)  # every input with both signs of the error
    sign = torch.tensor([1.0] * 5 + [-1.0] * 5, dtype=torch.float64)[:, None]
    error = random(1, 2, seed=3) * sign
    y = (x @ params["a"].T @ params["b"].T + error).detach()
    loss_fn = mean_square(lambda p, x: x @ p["a"].T @ p["b"].T)
    pairs = thor_fx.factors(loss_fn, params, x, y)
    for name, pair in pairs.items():
        fisher = fisher_of(loss_fn, params, name, x, y)
        assert oracle.relative_error(oracle.kronecker(pair.G, pair.A), fisher) < 1e-10


def test_a_linear_layer_on_two_halves_of_the_input():
    """Rows of both halves, as of twice the data; exact where each half is the only one that counts."""

    def loss_fn(p, x, mask):
        left, right = x[:, :5] @ p["w"].T, x[:, 5:] @ p["w"].T
        return (mask * left.sum(-1) + (1 - mask) * right.sum(-1)).mean()

    x = random(BATCH, 10, seed=6)
    mask = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    pair = thor_fx.factors(loss_fn, W, x, mask)["w"]
    rows = torch.cat([x[:, :5], x[:, 5:]])
    assert pair.rows == 2 * BATCH
    assert oracle.relative_error(pair.A, rows.T @ rows / (2 * BATCH)) < 1e-10
    expected = torch.ones(2, 2, dtype=torch.float64)  # n = B terms with cotangent (1/B, 1/B), one row each
    assert oracle.relative_error(pair.G, expected) < 1e-10


# --- both doors ------------------------------------------------------------------------------------


class Positions(nn.Module):
    """Three positions of every datum, through a shared layer, averaged."""

    def __init__(self):
        super().__init__()
        self.shared, self.head = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, 3)

    def forward(self, x):
        return self.head(self.shared(torch.stack([x, x.roll(1, -1), x.flip(-1)], 1)).tanh().mean(1))


@pytest.mark.parametrize("sharing", ["reduce", lambda name: "reduce" if "shared" in name else "expand"])
def test_both_doors_take_the_same_steps(sharing):
    settings = {"lr": 0.1, "damping": 0.1, "momentum": 0.9, "frequency": 2, "sharing": sharing}
    data = batches(4)
    functional = by_both_doors(lambda: build(Positions), data, 1e-10, **settings)
    expanded = by_functional_door(build(Positions), data, **{**settings, "sharing": "expand"})
    assert not torch.allclose(expanded[-1]["shared.weight"], functional[-1]["shared.weight"])


def test_functional_call_is_what_users_write():
    model = build(Positions)
    params = {name: p.detach() for name, p in model.named_parameters()}
    x, y = batches(1)[0]
    pairs = thor_fx.factors(
        lambda p, x, y: F.cross_entropy(functional_call(model, p, (x,)), y), params, x, y, sharing="reduce"
    )
    assert pairs["shared.weight"].rows == pairs["head.weight"].rows == len(x)
