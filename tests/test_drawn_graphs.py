"""Step graphs of drawn models: the factors of hooks, whatever is left out; passes keep what they find."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

import thor_fx
from drawn_models import Drawn, build_drawn, drawn_models, inputs_of, loss_of, told
from drawn_oracle import assert_found, by_hooks, loss_fn_of, trained
from profiles import examples
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

pytestmark = [
    pytest.mark.fuzz,
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
]

PASSES = {"canonicalize": canonicalize, "mark": mark, "check": check, "accumulate": accumulate}
"""Those that change no value and drop nothing, in any order."""


def plainly(drawn: Drawn, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients by autograd."""
    model = build_drawn(drawn)
    loss = loss_of(drawn, *model(x))
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


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


ONE_NUMBER_BOTH_WAYS = Drawn("flat", (1,), (("linear", 1, 1, False, "linear"), ("turned", 0)), 2)
VALID = ("conv", 4, 6, (2, 2), ((1, 1), "valid", (1, 1), 2, False, "zeros"))
PADDING_FOR_ALL_AXES = Drawn("image", (4, 5, 6), (VALID, ("reshape", "join")), 2)


@examples(ci=80, nightly=1800)
@given(drawn_models(), SUBSETS, ORDERS)
@example(ONE_NUMBER_BOTH_WAYS, [], [])
@example(PADDING_FOR_ALL_AXES, [], [])
def test_graphs_of_any_model(drawn, disabled, order):
    assert_graph(drawn, disabled, order)


# --- what is left out of the grammar, and why --------------------------------------------------------------


def test_an_einsum_over_one_input_is_no_product_of_matrices():
    """Torch multiplies elements there; the weight is a named fallback, and its gradient that of torch."""
    drawn = Drawn("flat", (3,), (("linear", 3, 1, True, "linear"),), 2, head="einsum")
    found = thor_fx.explain(loss_fn_of(drawn), trained(drawn), inputs_of(drawn))
    assert "no product of matrices" in found.coverage.fallback["head.weight"]
    assert sorted(found.coverage.layers) == ["body.0.weight"]


def test_torch_foresees_other_strides_of_softplus_than_it_makes():
    """So its own graphs fail on a view, where they are interpreted; those of ours copy."""
    gradient, x = torch.ones(3, 2).T, torch.ones(2, 3)
    found = torch.ops.aten.softplus_backward(gradient, x, 1, 20)
    foreseen = torch.ops.aten.softplus_backward(gradient.to("meta"), x.to("meta"), 1, 20)
    assert found.stride() != foreseen.stride()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_torch_leaves_out_gradients_of_a_reentrant_segment():
    """Of an input without a gradient, and in eager mode only: under ``torch.compile`` there are some."""
    layer = torch.nn.Linear(3, 2)
    assert not checkpoint(layer, torch.ones(4, 3), use_reentrant=True).requires_grad
    compiled = torch.compile(lambda x: checkpoint(layer, x, use_reentrant=True), backend="aot_eager")
    compiled(torch.ones(4, 3)).sum().backward()
    assert layer.weight.grad is not None
