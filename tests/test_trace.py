"""Graphs whose inputs are more than tensors."""

import torch
from torch import fx

from thor_fx.passes import outputs
from thor_fx.passes.outputs import Grad, Input, Loss, Param
from thor_fx.trace import _in_order_of_arguments

aten = torch.ops.aten


def test_a_number_that_dynamo_makes_an_input_is_a_constant_again():
    """As for a model that was compiled before with another number in the same place."""
    graph, x = fx.Graph(), torch.ones(3)
    p, k = graph.placeholder("primals_1"), graph.placeholder("primals_2")
    loss = graph.call_function(aten.sum.default, (p,))
    gradient = graph.call_function(aten.full.default, ([k], 1.0))
    for node, value in ((p, x), (k, 3), (loss, x.sum()), (gradient, x)):
        node.meta["val"] = value
    graph.output((loss, gradient))
    gm = fx.GraphModule(torch.nn.Module(), graph)
    outputs.describe(gm, [Param("w"), Input(0)], [Loss(), Grad("w")])
    found = _in_order_of_arguments(gm, (x, 3), {"w": x}, [])
    assert [node.name for node in found.graph.find_nodes(op="placeholder")] == ["p0_w"]
    assert [value.tolist() for value in found(x)] == [3.0, [1.0, 1.0, 1.0]]
