"""A graph that breaks a rule is refused, with the rule and the place."""

import pytest

from graphs import tiny
from thor_fx.passes import Factor, Grad, Loss, Output, Param, Rows, SpecError, check, emit_factors, outputs


def breaks(change) -> str:
    """The error that a correct graph gives after ``change``."""
    gm = tiny()
    emit_factors(gm)
    check(gm)
    change(gm)
    with pytest.raises(SpecError) as error:
        check(gm)
    return str(error.value)


def rename(gm, old, new):
    out = outputs.output_node(gm.graph)
    out.meta[outputs.KEY] = tuple(new if d == old else d for d in out.meta[outputs.KEY])


def test_a_node_is_defined_before_it_is_used():
    def change(gm):
        first, *_, last = (node for node in gm.graph.nodes if node.op == "call_function")
        last.append(first)

    assert "not well-formed" in breaks(change)


def test_every_input_is_described():
    def change(gm):
        del gm.graph.find_nodes(op="placeholder")[1].meta[outputs.KEY]

    assert breaks(change) == "input 'x_1' has no descriptor"


def test_an_input_is_not_described_as_an_output():
    def change(gm):
        gm.graph.find_nodes(op="placeholder")[1].meta[outputs.KEY] = Loss()

    assert breaks(change) == "input 'x_1' has no descriptor"


def test_no_two_inputs_are_equal():
    def change(gm):
        gm.graph.find_nodes(op="placeholder")[1].meta[outputs.KEY] = Param("w")

    assert breaks(change) == "two inputs are Param(name='w')"


def test_the_outputs_are_described():
    def change(gm):
        del outputs.output_node(gm.graph).meta[outputs.KEY]

    assert breaks(change) == "the outputs do not have one descriptor each"


def test_every_output_is_described():
    def change(gm):
        out = outputs.output_node(gm.graph)
        out.meta[outputs.KEY] = out.meta[outputs.KEY][:-1]

    assert breaks(change) == "the outputs do not have one descriptor each"


def test_no_two_outputs_are_equal():
    message = breaks(lambda gm: rename(gm, Loss(), Grad("w")))
    assert message.startswith("two outputs share a descriptor")


def test_every_node_knows_its_value():
    def change(gm):
        node = next(n for n in gm.graph.nodes if n.name == "mm")
        del node.meta["val"]

    assert breaks(change) == "node 'mm' (aten.mm.default) has no value in meta['val']"


def test_a_gradient_has_the_shape_of_its_parameter():
    def change(gm):
        out = outputs.output_node(gm.graph)
        loss, gradient, *rest = out.args[0]
        out.args = ((gradient, loss, *rest),)

    assert breaks(change) == "Grad(param='w') has shape (), its parameter (4, 3)"


def test_a_factor_is_no_number():
    def change(gm):
        rename(gm, Factor("w", "A"), Output(1))
        rename(gm, Loss(), Factor("w", "A"))

    text = "Factor(layer='w', side='A') is no matrix, no diagonal and no stack of either: ()"
    assert breaks(change) == text


def test_a_factor_has_rows():
    message = breaks(lambda gm: outputs.select(gm, lambda d: d != Rows("w")))
    assert message == "layer 'w' has a factor and no rows"
