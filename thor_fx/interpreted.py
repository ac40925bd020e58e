"""Graphs that run operator by operator, whatever the strides of values turn out to be."""

import copy

import torch
from torch import fx

aten = torch.ops.aten


def interpreted(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph that makes copies where a ``view`` would have to.

    A view of the trace need not be one at run time: for some operators (the backward pass of softplus is one)
    torch foresees other strides than it makes. Inductor lays out its values itself and has no need of this.

    Example:
        >>> gm = fx.symbolic_trace(lambda x: aten.view.default(x.T, [4]))
        >>> interpreted(gm)(torch.tensor([[1, 2], [3, 4]]))
        tensor([1, 3, 2, 4])
    """
    result = copy.copy(gm)
    result.graph = copy.deepcopy(gm.graph)
    for node in result.graph.find_nodes(op="call_function", target=aten.view.default):
        node.target = aten.reshape.default
    result.recompile()
    return result
