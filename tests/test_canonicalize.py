"""One spelling, the same values."""

import pytest
import torch
from functorch import make_fx
from torch import fx

import models
from graphs import step_graph, values
from thor_fx.passes import Input, Output, canonicalize, outputs, run

aten = torch.ops.aten
GONE = {
    aten.t.default,
    aten.transpose.int,
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh.default,
    aten._unsafe_view.default,
}


def graph_of(function, *arguments: torch.Tensor) -> fx.GraphModule:
    """A described graph of a function that returns a list, traced as it is."""
    gm = make_fx(function)(*arguments)
    results = outputs.output_node(gm.graph).args[0]
    outputs.describe(gm, [Input(i) for i in range(len(arguments))], [Output(i) for i in range(len(results))])
    return gm


def lines(gm: fx.GraphModule) -> list[str]:
    return [f"{n.target}{n.args[1:]}" for n in gm.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("build", models.BUILDERS, ids=lambda build: build.__name__)
def test_inside_the_graph_only_one_spelling_is_left(build):
    gm = run(step_graph(build), [canonicalize])
    returned = set(outputs.output_nodes(gm).values())
    assert not [n for n in gm.graph.nodes if n.target in GONE and n not in returned]


@pytest.mark.parametrize("build", models.BUILDERS, ids=lambda build: build.__name__)
def test_values_are_the_same_bit_for_bit(build):
    before, case = step_graph(build), build()
    old, new = values(before, case), values(run(before, [canonicalize]), case)
    assert list(new) == list(old)
    assert all(torch.equal(new[key], old[key]) for key in old)


@pytest.mark.parametrize(
    ("shape", "view", "expected"),
    [
        ((2, 3), aten.t.default, "aten.permute.default([1, 0],)"),
        ((3,), aten.t.default, "aten.permute.default([0],)"),
        ((2, 3, 4), lambda x: aten.transpose.int(x, 0, 2), "aten.permute.default([2, 1, 0],)"),
        ((2, 3, 4), lambda x: aten.transpose.int(x, -1, -2), "aten.permute.default([0, 2, 1],)"),
        ((2, 3), lambda x: aten._unsafe_view.default(x, [3, 2]), "aten.view.default([3, 2],)"),
    ],
)
def test_spelling(shape, view, expected):
    x = torch.randn(shape)
    gm = graph_of(lambda x: [view(x).sin()], x)
    result = run(gm, [canonicalize])
    assert lines(result) == [expected, "aten.sin.default()"]
    assert torch.equal(result(x)[0], gm(x)[0])


def test_a_reshape_that_copies_keeps_its_value():
    """As hand-written and pre-dispatch graphs have it: a view would fail."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    t = graph.call_function(aten.t.default, (x,))
    flat = graph.call_function(aten.reshape.default, (t, [6]))
    graph.output([flat])
    gm = fx.GraphModule({}, graph)
    value = torch.arange(6.0).view(2, 3)
    fake = torch.empty(2, 3, device="meta")
    x.meta["val"], t.meta["val"], flat.meta["val"] = fake, fake.t(), fake.t().reshape(6)
    outputs.describe(gm, [Input(0)], [Output(0)])
    assert run(gm, [canonicalize])(value)[0].tolist() == [0, 3, 1, 4, 2, 5]


def test_aliases_are_read_through():
    gm = graph_of(lambda x: [aten.alias.default(aten.detach.default(x).sin()).cos()], torch.ones(3))
    assert lines(run(gm, [canonicalize])) == ["aten.sin.default()", "aten.cos.default()"]


def test_two_outputs_do_not_become_one():
    gm = graph_of(lambda x: [(y := x.sin()), aten.detach.default(y)], torch.ones(3))
    one, two = outputs.output_nodes(run(gm, [canonicalize])).values()
    assert one is not two


def test_dead_code_goes():
    gm = graph_of(lambda x: [x.cos()], torch.ones(3))
    with gm.graph.inserting_after(outputs.input_nodes(gm)[Input(0)]):
        dead = gm.graph.call_function(aten.exp.default, (outputs.input_nodes(gm)[Input(0)],))
    dead.meta["val"] = torch.empty(3, device="meta")
    assert lines(run(gm, [canonicalize])) == ["aten.cos.default()"]
