"""Products that a graph makes only if it is told to: a plain step can run the graph of a factor step.

What a graph computes for its factors alone is mostly products of matrices. Each of them becomes one operator
that also takes a number on the host; where that is false, it returns memory that nobody has written to. What
is no product on the way to a factor (a cast, a mean, a scatter) is computed in any case.

To a compiler the operator is a call, as a product of matrices is.
"""

from collections.abc import Collection

import torch
from torch import Tensor, fx

from . import outputs
from .nodes import target, upstream

aten = torch.ops.aten

_LIBRARY = torch.library.Library("thor_fx", "FRAGMENT")
_LIBRARY.define("product_if(Tensor wanted, Tensor left, Tensor right, ScalarType? out_dtype=None) -> Tensor")


def _product_if(wanted: Tensor, left: Tensor, right: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    if not wanted:
        return _memory(wanted, left, right, out_dtype)
    multiply = torch.mm if left.dim() == 2 else torch.bmm
    return multiply(left, right) if out_dtype is None else multiply(left, right, out_dtype=out_dtype)


def _memory(_: Tensor, left: Tensor, right: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    return left.new_empty((*left.shape[:-1], right.shape[-1]), dtype=out_dtype or left.dtype)


torch.library.impl(_LIBRARY, "product_if", "CompositeExplicitAutograd")(_product_if)
torch.library.register_fake("thor_fx::product_if", _memory, lib=_LIBRARY)

product_if = torch.ops.thor_fx.product_if.default
"""``product_if(wanted, left, right, out_dtype=None)``: (R, S) times (S, T), or B of each.

Args:
    wanted: 0-D, boolean, on the host.
"""

_PRODUCTS = {aten.mm.default, aten.bmm.default, aten.mm.dtype, aten.bmm.dtype}


def gate_products(gm: fx.GraphModule, wanted: fx.Node, gated: Collection[outputs.OutputDescriptor]) -> int:
    """Let the products that only some results depend on be made only where these are wanted, in place.

    Args:
        gm: a step graph.
        wanted: the input that says so: boolean, 0-D, on the host.
        gated: what the results are.

    Returns:
        The number of products.
    """
    results = {d: node for d, node in outputs.output_nodes(gm).items() if isinstance(node, fx.Node)}
    needed = upstream(node for descriptor, node in results.items() if descriptor not in gated)
    only = upstream(node for descriptor, node in results.items() if descriptor in gated) - needed
    products = [node for node in gm.graph.nodes if node in only and target(node) in _PRODUCTS]
    for node in products:
        with gm.graph.inserting_before(node):
            instead = gm.graph.call_function(product_if, (wanted, *node.args), dict(node.kwargs))
        instead.meta = dict(node.meta)
        node.replace_all_uses_with(instead)
        gm.graph.erase_node(node)
    return len(products)
