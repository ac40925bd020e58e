"""Descriptors stay with their inputs and outputs."""

import copy

import pytest

from graphs import tiny
from thor_fx.passes import Factor, Grad, Input, Loss, Output, Param, Rows, Tangent, Terms, outputs


def test_every_input_and_output_is_found_by_its_descriptor_in_order():
    gm = tiny()
    placeholders = gm.graph.find_nodes(op="placeholder")
    assert outputs.input_nodes(gm) == dict(zip([Param("w"), Input(0)], placeholders, strict=True))
    assert list(outputs.input_nodes(gm)) == [Param("w"), Input(0)]
    results = outputs.output_node(gm.graph).args[0]
    assert outputs.output_nodes(gm) == dict(zip([Loss(), Grad("w")], results, strict=True))
    assert list(outputs.output_nodes(gm)) == [Loss(), Grad("w")]


def test_output_node_is_the_one_that_returns():
    assert outputs.output_node(tiny().graph).op == "output"


@pytest.mark.parametrize("described", [[Loss()], [Loss(), Grad("w"), Output(2)]])
def test_the_number_of_outputs_is_checked(described):
    with pytest.raises(ValueError, match=f"{len(described)} descriptors for 2 outputs"):
        outputs.describe(tiny(), [Param("w"), Input(0)], described)


@pytest.mark.parametrize("described", [[Param("w")], [Param("w"), Input(0), Input(1)]])
def test_the_number_of_inputs_is_checked(described):
    with pytest.raises(ValueError, match="argument"):
        outputs.describe(tiny(), described, [Loss(), Grad("w")])


def test_an_output_may_be_none():
    gm = tiny()
    out = outputs.output_node(gm.graph)
    out.args = ((*out.args[0], None),)
    outputs.describe(gm, [Param("w"), Input(0)], [Loss(), Grad("w"), Grad("idle")])
    assert outputs.output_nodes(gm)[Grad("idle")] is None


def test_a_folded_backward_start_counts_as_an_input():
    gm = tiny()
    start = next(node for node in gm.graph.nodes if node.op == "call_function")
    start.meta[outputs.KEY] = Tangent(0)
    assert outputs.input_nodes(gm)[Tangent(0)] is start


def test_descriptors_survive_a_copy():
    gm = tiny()
    copied = copy.deepcopy(gm)
    assert list(outputs.input_nodes(copied)) == list(outputs.input_nodes(gm))
    assert list(outputs.output_nodes(copied)) == list(outputs.output_nodes(gm))
    assert outputs.output_nodes(copied)[Loss()].graph is copied.graph


def test_append_adds_behind_the_existing_outputs():
    gm = tiny()
    before = outputs.output_nodes(gm)
    node = outputs.input_nodes(gm)[Input(0)]
    outputs.append(gm, [(Rows("w"), node), (Terms(), before[Loss()])])
    assert list(outputs.output_nodes(gm).items()) == [
        *before.items(),
        (Rows("w"), node),
        (Terms(), before[Loss()]),
    ]


@pytest.mark.parametrize("new", [[Grad("w")], [Terms(), Terms()], [Factor("w", "A"), Loss()]])
def test_append_refuses_a_descriptor_that_is_there_and_changes_nothing(new):
    gm = tiny()
    before = outputs.output_nodes(gm)
    with pytest.raises(ValueError, match=r"the graph already returns (Grad|Terms|Loss)"):
        outputs.append(gm, [(descriptor, before[Loss()]) for descriptor in new])
    assert outputs.output_nodes(gm) == before


def test_select_keeps_order_and_leaves_dead_code():
    gm = tiny()
    count, gradient = len(gm.graph.nodes), outputs.output_nodes(gm)[Grad("w")]
    outputs.select(gm, lambda descriptor: isinstance(descriptor, Grad))
    assert outputs.output_nodes(gm) == {Grad("w"): gradient}
    assert len(gm.graph.nodes) == count


def test_descriptors_of_one_meaning_are_equal():
    assert Factor("fc", "A") == Factor("fc", "A") != Factor("fc", "G")
    assert len({Grad("a"), Grad("a"), Grad(0), Param("a"), Loss(), Output(0), Input(0), Tangent(0)}) == 7
