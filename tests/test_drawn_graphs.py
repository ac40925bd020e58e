"""Step graphs of drawn models: factors equal those of hooks, passes keep what they find, whatever is left out."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.func import functional_call

import thor_fx
from conftest import examples
from drawn_models import Drawn, build_drawn, drawn_models, inputs_of, loss_of, told
from hooks import factors_by_hooks, uses_by_hooks
from oracle import Pair, relative_error
from thor_fx.factors import cotangent_scale, kronecker, moments_of, run_graph
from thor_fx.layers import coverage
from thor_fx.passes import (
    Grad,
    Loss,
    Terms,
    accumulate,
    canonicalize,
    check,
    drop_factors,
    emit_factors,
    mark,
    outputs,
    run,
)
from thor_fx.passes.layout import Rules
from thor_fx.passes.survey import survey
from thor_fx.passes.switches import OPTIMISATIONS

pytestmark = pytest.mark.fuzz

PASSES = {"canonicalize": canonicalize, "mark": mark, "check": check, "accumulate": accumulate}
"""Those that change no value and drop nothing, in any order."""


def loss_fn_of(drawn: Drawn) -> Any:
    model = build_drawn(drawn)

    def loss_fn(params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return loss_of(drawn, *functional_call(model, dict(params), (x,)))

    return loss_fn


def trained(drawn: Drawn) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in build_drawn(drawn).named_parameters() if p.requires_grad}


def by_hooks(drawn: Drawn, x: Tensor) -> tuple[dict[str, Pair], int]:
    """The factors of every weight that has a gradient, and the terms of the loss."""
    model, terms = build_drawn(drawn, plainly=True), []

    def loss() -> Tensor:
        scores, features = model(x)
        terms.append(len(scores))
        return loss_of(drawn, scores, features)

    uses = uses_by_hooks(model, loss)
    (n,) = terms
    scale = n**2 if drawn.reduction == "sum" else 1
    pairs = {name: factors_by_hooks(found, n) for name, found in uses.items()}
    return {name: pair._replace(G=pair.G / scale) for name, pair in pairs.items()}, n


def plainly(drawn: Drawn, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients by autograd."""
    model = build_drawn(drawn)
    loss = loss_of(drawn, *model(x))
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_found(found: Mapping[str, Any], expected: Mapping[str, Pair], n: int) -> None:
    assert found.keys() == expected.keys()
    for name, pair in expected.items():
        ours = found[name]
        assert (ours.rows, ours.n) == (pair.rows, n), name
        for one, other in ((ours.A, pair.A), (ours.G, pair.G)):
            assert one.shape == other.shape, name
            assert relative_error(one, other) < 1e-10, name


def assert_untouched(results: Mapping[Any, Tensor], loss: Tensor, gradients: Mapping[str, Tensor]) -> None:
    """Loss and gradients are those without us, bit for bit."""
    assert torch.equal(results[Loss()], loss)
    found = {d.param: value for d, value in results.items() if isinstance(d, Grad) and value is not None}
    assert found.keys() == gradients.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in gradients.items())


def assert_graph(drawn: Drawn, disabled: Sequence[str], order: Sequence[str]) -> None:
    x, params = inputs_of(drawn), trained(drawn)
    expected, n = by_hooks(drawn, x)
    loss, gradients = plainly(drawn, x)
    before = thor_fx.trace_step(loss_fn_of(drawn), params, x)
    assert_untouched(run_graph(before, params, x), loss, gradients)
    known = list(outputs.output_nodes(before))

    rules = Rules(disabled=tuple(disabled))
    passes = [PASSES[name] for name in order]
    step = run(before, [canonicalize, *passes])
    whole = run(step, [partial(emit_factors, rules=rules), *passes])
    assert list(outputs.output_nodes(step)) == known
    assert list(outputs.output_nodes(whole))[: len(known)] == known
    results = run_graph(whole, params, x)
    assert_untouched(results, loss, gradients)

    layers = coverage(survey(step, rules), rules)
    assert_placed(layers, params, gradients)
    given = told(drawn, n)
    measured = results.get(Terms())
    terms = given.get("batch_size", measured)
    scale = cotangent_scale("empirical", terms, measured, given.get("loss_scale", 1.0))
    assert_found(kronecker(moments_of(results), layers.layers, terms, scale), expected, n)

    without = run(whole, [drop_factors])
    assert list(outputs.output_nodes(without)) == known
    assert _lines(without) == _lines(step), "without factors, the graph is what it was"


def assert_placed(found: Any, params: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
    """Every parameter is in a layer, has a named rule of first order, or is not used: in one of these."""
    covered = {p for layer in found.layers.values() for p in layer.params}
    places = [covered, {*found.fallback}, {*found.norms}]
    assert sum(map(len, places)) == len(found.trained)
    assert set().union(*places) == found.trained
    assert found.trained | {*found.unused} >= params.keys()
    assert gradients.keys() <= found.trained


def _lines(gm: fx.GraphModule) -> list[str]:
    return [f"{node.target} {len(node.all_input_nodes)}" for node in gm.graph.nodes]


SUBSETS = st.lists(st.sampled_from(sorted(OPTIMISATIONS)), unique=True, max_size=3)
ORDERS = st.lists(st.sampled_from(sorted(PASSES)), max_size=3)


@examples(ci=45, nightly=1600)
@given(drawn_models(), SUBSETS, ORDERS)
def test_graphs_of_any_model(drawn, disabled, order):
    assert_graph(drawn, disabled, order)
