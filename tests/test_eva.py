"""Kronecker vectors against rows, dense rank-one solves, and the factors that they stand for."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
import oracle
import thor_fx
from graphs import step_graph, values
from stacks import LAMBDA, Stacked, tensors
from thor_fx.factors import factor_pair, moments_of
from thor_fx.inverses import METHODS
from thor_fx.layers import coverage
from thor_fx.passes import Grad, Terms, canonicalize, emit_factors, find_sites, run
from thor_fx.passes.layout import Rules
from thor_fx.passes.outputs import Factor
from thor_fx.passes.sides import Side, join, trace, without_bias
from thor_fx.precondition import precondition
from thor_fx.schedule import Schedule
from thor_fx.transform import Signals, unscale
from training import batches, build, by_functional_door, mlp

MEANS = Rules(means=True)
CASES = [
    models.mlp,
    models.x_at_w,
    models.three_axes,
    models.einsum_heads,
    models.twice,
    models.pooled,
    models.tied,
    models.fused_qkv,
    models.convolution,
    models.embedding,
    models.experts,
]


class Run:
    """One factor step of a case: results by descriptor, gradients, and what the update is told."""

    def __init__(self, make: Callable[..., models.Case], rules: Rules = MEANS) -> None:
        self.case = make()
        graph = run(step_graph(make), [canonicalize, partial(emit_factors, rules=rules)])
        self.results = values(graph, self.case)
        self.gradients = {d.param: v for d, v in self.results.items() if isinstance(d, Grad)}
        self.moments, self.terms = moments_of(self.results), self.results[Terms()]
        self.coverage = coverage(find_sites(graph), rules)

    def pair(self, layer: str, loss_scale: float = 1.0) -> tuple[Tensor, Tensor]:
        a, g = factor_pair(self.moments, self.coverage.layers[layer], self.terms / loss_scale**2)
        assert a is not None
        assert g is not None
        return a, g

    def signals(self, **changes: Any) -> Signals:
        return replace(Signals(self.coverage, {"damping": LAMBDA}, self.moments, self.terms), **changes)

    def update(self, tx: Any, signals: Signals | None = None) -> dict[str, Tensor]:
        params = {name: p.detach() for name, p in self.case.params.items()}
        return tx.update(self.gradients, tx.init(params, self.coverage), params, signals or self.signals())[0]


EVA = precondition(Schedule("damping", 0.2), inverse="eva")


# --- the step ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", ["dense", "cut"])
def test_the_step_is_a_dense_solve_with_a_matrix_of_rank_one(kinds):
    case = Stacked("eva", kinds)
    state, failed = case.refresh()
    assert failed == 0
    torch.testing.assert_close(case.apply(state), case.solve_jointly(), rtol=1e-10, atol=1e-10)
    other = LAMBDA * 10  # that of the step counts, and not that of the refresh
    torch.testing.assert_close(
        case.apply(state, lam=other), case.solve_jointly(other), rtol=1e-10, atol=1e-10
    )


def test_the_step_is_the_formula_of_the_paper():
    case = Stacked("eva")
    state, _ = case.refresh()
    a, g = case.stack.factors
    for got, w, a_l, g_l in zip(case.apply(state), case.gradients, a, g, strict=True):
        along = sum(g_l[i] * w[i, j] * a_l[j] for i in range(len(g_l)) for j in range(len(a_l)))
        share = along / (LAMBDA + (a_l**2).sum() * (g_l**2).sum())
        torch.testing.assert_close(got, (w - share * torch.outer(g_l, a_l)) / LAMBDA, rtol=1e-12, atol=1e-12)


def rank_one(a: Tensor, g: Tensor) -> Tensor:
    """The damped block of one layer, dense."""
    v = torch.kron(g, a)
    return torch.outer(v, v) + LAMBDA * torch.eye(len(v), dtype=v.dtype)


def test_a_step_of_a_model_is_a_dense_solve():
    step = Run(models.mlp)
    updates = step.update(EVA)
    for layer, uses in oracle.uses(step.case).items():
        a, g = uses[0].a.mean(0), (step.case.terms * uses[0].g).mean(0)
        block = torch.outer(torch.kron(g, a), torch.kron(g, a)) + LAMBDA * torch.eye(
            len(g) * len(a), dtype=g.dtype
        )
        expected = torch.linalg.solve(block, step.gradients[layer].flatten())
        assert oracle.relative_error(updates[layer].flatten(), expected) < 1e-10


def test_vectors_that_overflow_are_a_failure():
    case = Stacked("eva")
    a, g = case.stack.factors
    state, failed = case.refresh(case.stack._replace(factors=(a * 1e100, g * 1e100)))
    assert failed == 2
    assert not case.apply(state).any()


# --- the vectors -------------------------------------------------------------------------------------


def rows(case: models.Case, layer: str) -> tuple[Tensor, Tensor]:
    """All rows of activations and cotangents, over all uses: (..., R, features)."""
    found = oracle.uses(case)[layer]
    return torch.cat([use.a for use in found], -2), torch.cat([use.g for use in found], -2)


def counted(case: models.Case, a_rows: Tensor) -> Tensor:
    """``R``; an expert has the rows that are sent to it, and the others are zero."""
    if case.name != "experts":
        return torch.tensor(a_rows.shape[-2], dtype=torch.float64)
    return a_rows.abs().sum(-1).ne(0).sum(-1, keepdim=True)


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_vectors_are_means_of_rows(make):
    step = Run(make)
    for layer in step.case.layers:
        a_rows, g_rows = rows(step.case, layer)
        a, g = step.pair(layer)
        count = counted(step.case, a_rows)
        torch.testing.assert_close(a, a_rows.sum(-2) / count, rtol=1e-10, atol=1e-12)
        root = (step.case.terms / count.double()) ** 0.5
        torch.testing.assert_close(g, root * g_rows.sum(-2), rtol=1e-10, atol=1e-12)
        per_term = step.case.terms * g_rows
        if a_rows.shape[-2] == step.case.terms and a_rows.dim() == 2:
            torch.testing.assert_close(g, per_term.mean(0), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("make", [*CASES, models.both_ways], ids=lambda make: make.__name__)
def test_what_vectors_stand_for_is_no_more_than_the_factors(make):
    """``a a^T <= A`` and ``g g^T <= G``, whatever the number of rows."""
    whole, step = Run(make, Rules()), Run(make)
    for layer in step.coverage.layers:
        for vector, factor in zip(step.pair(layer), whole.pair(layer), strict=True):
            matrix = torch.diag_embed(factor) if factor.dim() == vector.dim() else factor
            rest = matrix - vector.unsqueeze(-1) * vector.unsqueeze(-2)
            assert torch.linalg.eigvalsh(rest).min() > -1e-12 * factor.abs().max()
            assert vector.any()


def test_uses_of_the_transpose_are_added():
    step = Run(models.both_ways)
    ((layer, found),) = [item for item in step.coverage.layers.items() if item[1].both_ways]
    n = step.terms
    vectors = {}
    for sums in found.sums:
        m = step.moments[sums.name]
        vectors[sums.flipped] = m.activations / m.rows, m.cotangents * (n / m.rows) ** 0.5
    (a, g), (other_a, other_g) = vectors[False], vectors[True]
    pi = (g.norm() * other_g.norm()) / (a.norm() * other_a.norm())
    expected = (a + other_g / pi.sqrt()) / 2**0.5, (g + pi.sqrt() * other_a) / 2**0.5
    for got, one in zip(step.pair(layer), expected, strict=True):
        torch.testing.assert_close(got, one, rtol=1e-10, atol=1e-12)


def test_a_layer_of_several_groups():
    """A grouped convolution: one pair of vectors for every group."""
    model, x = nn.Conv2d(6, 4, 3, groups=2, bias=False).double(), batch_of_images()
    params = {"weight": model.weight.detach()}

    def loss_fn(p: Any, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, p["weight"], groups=2).square().sum((1, 2, 3)).mean()

    graph = run(
        run(thor_fx.trace_step(loss_fn, params, x), [canonicalize]), [partial(emit_factors, rules=MEANS)]
    )
    results = dict(zip(thor_fx.passes.outputs.output_nodes(graph), graph(params["weight"], x), strict=True))
    patches = nn.functional.unfold(x, 3).unflatten(1, (2, -1))  # (N, E, C K, Q)
    torch.testing.assert_close(results[Factor("weight", "A")], patches.sum((0, 3)))
    out = nn.functional.conv2d(x, params["weight"], groups=2)
    g = (2 * out / len(x)).unflatten(1, (2, -1)).sum((0, 3, 4))
    torch.testing.assert_close(results[Factor("weight", "G")], g)


def batch_of_images() -> Tensor:
    return torch.randn(5, 6, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_a_bag_of_entries():
    table = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    index, offsets = torch.tensor([1, 2, 2, 5, 1]), torch.tensor([0, 2, 3])

    def loss_fn(p: Any, index: Tensor, offsets: Tensor) -> Tensor:
        return nn.functional.embedding_bag(index, p["w"], offsets, mode="sum").square().mean()

    graph = run(
        run(thor_fx.trace_step(loss_fn, {"w": table}, index, offsets), [canonicalize]),
        [partial(emit_factors, rules=MEANS)],
    )
    results = dict(zip(thor_fx.passes.outputs.output_nodes(graph), graph(table, index, offsets), strict=True))
    expected = torch.bincount(index, minlength=7).double()
    torch.testing.assert_close(results[Factor("w", "A")], expected)


def test_a_joint_bias_is_one_more_coordinate():
    step, joint = Run(models.mlp), Run(models.mlp, Rules(bias="joint", means=True))
    (a, g), (longer, same) = step.pair("0.weight"), joint.pair("0.weight")
    torch.testing.assert_close(longer, torch.cat([a, torch.ones(1, dtype=a.dtype)]))
    torch.testing.assert_close(same, g)
    weight = joint.gradients["0.weight"]
    whole = torch.cat([weight, joint.gradients["0.bias"][:, None]], 1)
    block = torch.outer(torch.kron(g, longer), torch.kron(g, longer)) + LAMBDA * torch.eye(
        whole.numel(), dtype=g.dtype
    )
    expected = torch.linalg.solve(block, whole.flatten()).view_as(whole)
    updates = joint.update(EVA)
    torch.testing.assert_close(updates["0.weight"], expected[:, :-1], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(updates["0.bias"], expected[:, -1], rtol=1e-10, atol=1e-10)


def test_an_embedding_has_no_joint_bias():
    """Its rows are one-hot, and lookups of the padding are no rows at all."""
    layers = Run(models.embedding, Rules(bias="joint", means=True)).coverage.layers
    assert all(layer.bias is None for layer in layers.values() if layer.kind == "embedding")


# --- what it costs -----------------------------------------------------------------------------------


def test_a_factor_step_makes_vectors_only():
    """No result of the graph is larger than a side, and no longer side is cut."""
    step = Run(models.mlp, Rules(max_dim=2, means=True))
    sums = {d: v for d, v in step.results.items() if isinstance(d, Factor)}
    sides = [side for layer in step.coverage.layers.values() for side in (layer.input, layer.output)]
    assert [v.shape for v in sums.values()] == [(side.dim,) for side in sides]
    assert {side.kind for side in sides} == {"mean"}
    assert not any(layer.notes for layer in step.coverage.layers.values())
    state = METHODS["eva"].init(2, (Side(300, "mean"), Side(200, "mean")), 128, LAMBDA)
    assert [tuple(t.shape) for t in tensors(state)] == [(2, 300), (2, 200), (2,)]


def test_sides():
    side, vector = Side(3, "mean"), torch.tensor([1.0, 2.0, 3.0])
    assert (side.shape, str(side), side.numel) == ((3,), "mean of 3", 3)
    assert Side(3, "mean", groups=2).shape == (2, 3)
    assert trace(vector, side) == torch.outer(vector, vector).trace()
    assert torch.equal(without_bias(vector, replace(side, joint=True)), vector[:2])
    assert join([side, side]) == side


# --- scales ------------------------------------------------------------------------------------------


def test_the_loss_scale_cancels():
    data = batches(4)
    settings = {"lr": 0.05, "damping": 0.3, "momentum": 0.9, "frequency": 2, "inverse": "eva"}
    plain, scaled = (by_functional_door(build(mlp), data, **settings, loss_scale=s) for s in (1.0, 64.0))
    for name in plain[-1]:
        torch.testing.assert_close(scaled[-1][name], plain[-1][name], rtol=1e-12, atol=1e-12)


def test_a_scaler_divides_sums_of_cotangents_once():
    """And sums of their squares twice."""
    for method, power, rules in (("eva", 1, MEANS), ("cholesky", 2, Rules())):
        step = Run(models.mlp, rules)
        tx = unscale(precondition(Schedule("damping", 0.2), inverse=method))
        expected = step.update(tx)
        scale = torch.tensor(8.0, dtype=torch.float64)
        scaled = {n: m._replace(cotangents=m.cotangents * 8**power) for n, m in step.moments.items()}
        step.gradients = {name: 8 * g for name, g in step.gradients.items()}
        found = step.update(tx, step.signals(moments=scaled, gradient_scale=scale, loss_scale=scale))
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12)
