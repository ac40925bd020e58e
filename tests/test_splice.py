"""Python in, nodes out."""

import pytest
import torch
from torch import fx

from graphs import added, tiny
from thor_fx.passes import Input, Loss, Output, Param, check, outputs, splice


def placeholders(gm):
    inputs = outputs.input_nodes(gm)
    return inputs[Param("w")], inputs[Input(0)]


def returning(gm, *nodes):
    """What the graph computes for these nodes."""
    outputs.append(gm, [(Output(100 + i), node) for i, node in enumerate(nodes)])
    gm.graph.lint()
    gm.recompile()
    w, x = torch.arange(12.0).view(4, 3), torch.arange(24.0).view(6, 4)
    return w, x, fx.Interpreter(gm).run(w, x)[-len(nodes) :]


def test_the_nodes_compute_the_function_and_arrive_with_their_values():
    gm, before = tiny(), tiny()
    w, x = placeholders(gm)
    node = splice(x, lambda w, x: (x @ w).exp() + 1, w, x)
    assert added(gm, before) == [
        "mm_2 = aten.mm.default(x_1, w_1)",
        "exp = aten.exp.default(mm_2)",
        "add = aten.add.Tensor(exp, 1)",
    ]
    assert node.meta["val"].shape == (6, 3)
    check(gm)
    w, x, (value,) = returning(gm, node)
    assert torch.equal(value, (x @ w).exp() + 1)


def test_the_nodes_stand_right_behind_the_anchor():
    gm = tiny()
    _, x = placeholders(gm)
    anchor = outputs.output_nodes(gm)[Loss()]
    following = anchor.next
    node = splice(anchor, lambda x: x.sin().cos(), x)
    assert anchor.next.target is torch.ops.aten.sin.default
    assert anchor.next.next is node
    assert node.next is following


def test_results_come_in_the_structure_of_the_function():
    gm = tiny()
    w, x = placeholders(gm)
    result = splice(x, lambda w, x: {"a": [w + 1, x], "b": (x * 2,)}, w, x)
    assert result["a"][1] is x, "an operand that is returned is its own node"
    w, x, (plus, times) = returning(gm, result["a"][0], result["b"][0])
    assert torch.equal(plus, w + 1)
    assert torch.equal(times, x * 2)


def test_shapes_are_read_from_the_operands():
    gm = tiny()
    _, x = placeholders(gm)
    node = splice(x, lambda x: torch.full((), x.shape[0], dtype=x.dtype), x)
    *_, (value,) = returning(gm, node)
    assert value == 6


def test_a_decomposition_table_is_applied():
    def spelled_out(x):
        return torch.ops.aten.permute.default(x, [1, 0])

    def targets(table):
        gm = tiny()
        _, x = placeholders(gm)
        splice(x, lambda x: x.t() + 1, x, decompositions=table)
        return [line.split(" = ")[1].split("(")[0] for line in added(gm, tiny())]

    assert targets({torch.ops.aten.t.default: spelled_out}) == ["aten.permute.default", "aten.add.Tensor"]
    assert targets({}) == targets(None) == ["aten.t.default", "aten.add.Tensor"]


def test_nothing_of_the_gradient_is_traced():
    gm = tiny()
    w, _ = placeholders(gm)
    splice(w, lambda w: w.exp(), w)
    assert added(gm, tiny()) == ["exp = aten.exp.default(w_1)"]


def test_a_captured_tensor_is_refused():
    gm = tiny()
    _, x = placeholders(gm)
    secret = torch.ones(4)
    with pytest.raises(ValueError, match=r"captures a tensor.*pass it as an operand"):
        splice(x, lambda x: x + secret, x)
