"""Every node of a step knows its part of the step, by what it is needed for and not by its name."""

import copy
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.func import functional_call

import thor_fx
from thor_fx.factors import moments_of
from thor_fx.inductor import inductor_decompositions
from thor_fx.kinds import Kind, kinds
from thor_fx.layers import coverage
from thor_fx.passes import canonicalize, emit_factors, run
from thor_fx.passes.emit_factors import drop_factors
from thor_fx.passes.layout import Rules
from thor_fx.passes.outputs import Grad, output_nodes
from thor_fx.passes.phases import PHASE, PHASES, mark, phase_of, phases_of
from thor_fx.passes.stitch import BACKWARD, SIDE
from thor_fx.passes.survey import survey
from thor_fx.recompute import recompute
from thor_fx.update import update_graph
from thor_fx.whole_step import WholeStep

SETTINGS: dict[str, Any] = {"lr": 0.1, "damping": 0.1, "momentum": 0.9, "frequency": 4}
ROWS, IN, HIDDEN, OUT = 7, 6, 5, 4


def traced() -> tuple[fx.GraphModule, list[str]]:
    """The step graph of a net of two layers, and the names of its parameters."""
    model = nn.Sequential(nn.Linear(IN, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, OUT))
    params = dict(model.named_parameters())

    def loss_fn(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, params, (x,)), y)

    graph = thor_fx.trace_step(loss_fn, params, torch.randn(ROWS, IN), torch.randint(OUT, (ROWS,)))
    return run(graph, [canonicalize]), list(params)


def whole(kind: Kind, **settings: Any) -> fx.GraphModule:
    graph, names = traced()
    tx = thor_fx.thor(**SETTINGS | settings)
    return WholeStep(tx, coverage(survey(graph, tx.rules), tx.rules), names, 1).graph(graph, kind)


def of(gm: fx.GraphModule, phase: str) -> Counter[str]:
    """The operators of a phase."""
    return Counter(
        node.target.overloadpacket.__name__
        for node in gm.graph.nodes
        if hasattr(node.target, "overloadpacket") and phase_of(node) == phase
    )


def test_forward_and_backward_of_two_layers():
    gm, _ = traced()
    mark(gm)
    assert all(node.name in phases_of(gm) for node in gm.graph.nodes if node.op != "output")
    assert of(gm, "forward")["addmm"] == of(gm, "forward")["gelu"] + 1 == 2
    assert of(gm, "backward")["mm"] == 3, "two gradients of weights, one of an activation"
    assert of(gm, "backward")["gelu_backward"] == 1
    assert set(phases_of(gm).values()) == {"forward", "backward"}


@pytest.mark.parametrize("fisher", ["empirical", "sampled", "exact"])
def test_what_factors_alone_need_is_what_goes_with_them(fisher):
    gm = run(traced()[0], [partial(emit_factors, rules=Rules(fisher=fisher)), mark])
    gm.graph.eliminate_dead_code()
    without = run(gm, [drop_factors])
    gone = set(phases_of(gm)) - set(phases_of(without))
    assert gone == {name for name, phase in phases_of(gm).items() if phase == "factors"}
    assert phases_of(without) == {name: p for name, p in phases_of(gm).items() if p != "factors"}


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
def test_what_is_computed_again_belongs_to_backward(fisher):
    again = partial(recompute, decompositions=inductor_decompositions())
    gm = run(traced()[0], [partial(emit_factors, rules=Rules(fisher=fisher)), mark, again])
    unknown = {str(node.target) for node in gm.graph.nodes if phase_of(node) is None and node.op != "output"}
    assert unknown <= {"aten.unsqueeze.default", "aten.select.int"}, "through which backward reads"
    mark(gm)
    twice = [node for node in gm.graph.nodes if node.meta.get(SIDE) == BACKWARD]
    assert twice
    assert {phase_of(node) for node in twice} <= {"backward", "factors"}
    assert of(gm, "forward")["erf"] == 1
    assert of(gm, "backward")["erf"] == 1, "computed again, for it is cheap"


def test_phases_survive_copies():
    gm = run(traced()[0], [emit_factors, mark])
    assert phases_of(copy.deepcopy(gm)) == phases_of(gm)
    assert all(node.meta[PHASE] == phases_of(gm)[node.name] for node in gm.graph.nodes if node.op != "output")


@pytest.mark.parametrize("kind", kinds(thor_fx.thor(**SETTINGS)), ids=str)
def test_a_whole_step(kind):
    gm = whole(kind)
    expected = set(PHASES) if kind.factors != "plain" else {"forward", "backward", "update"}
    assert set(phases_of(gm).values()) == expected
    assert all(phase_of(n) == "update" for n in gm.graph.nodes if str(n.target) == "aten.copy_.default")
    inversions = [node for node in gm.graph.nodes if "linalg" in str(node.target)]
    assert all(phase_of(node) == "refresh" for node in inversions)
    assert bool(inversions) == (kind.factors != "plain")


def test_averages_are_made_where_factors_are():
    gm = whole(Kind("refresh", compares=False), factor_decay=0.9)
    into = [node for node in gm.graph.nodes if str(node.target).startswith(("aten.addmm", "aten.baddbmm"))]
    assert [phase_of(node) for node in into].count("factors") == 4


def test_the_update_of_the_drop_in_door():
    graph, _ = traced()
    tx = thor_fx.thor(**SETTINGS)
    found = coverage(survey(graph, tx.rules), tx.rules)
    values = {d: n.meta["val"] for d, n in output_nodes(run(graph, [emit_factors])).items()}
    gradients = {d.param: torch.zeros(value.shape) for d, value in values.items() if isinstance(d, Grad)}
    moments = moments_of({d: torch.zeros(value.shape) for d, value in values.items()})
    gm = update_graph(tx, found, gradients, gradients, moments, torch.tensor(7.0), {})
    operators = Counter(phase_of(node) for node in gm.graph.nodes if node.op == "call_function")
    assert set(operators) == {"refresh", "update"}
    plain = update_graph(tx, found, gradients, gradients, {}, None, {})
    assert of(plain, "update")["mm"] == of(gm, "update")["mm"]
    assert not of(plain, "refresh")
