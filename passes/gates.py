"""Products that a graph makes only if it is told to: a plain step can run the graph of a factor step.

Nearly all that a graph computes for its factors alone is products of rows. Each of them becomes an operator
that also takes a number on the host; where that is false, it returns memory that nobody has written to. What
is no product on the way to a factor (a cast, a mean, a scatter) is computed in any case.

To a compiler the operator is a call, as a product is.
"""

from collections.abc import Callable, Collection
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from . import outputs, panels, patch_gram
from .nodes import target, upstream
from .symmetric import KERNEL
from .symmetric import result_of as result_of_kernel

aten, ours = torch.ops.aten, torch.ops.thor_fx

_LIBRARY = torch.library.Library("thor_fx", "FRAGMENT")


def _result_of_product(left: Tensor, right: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    return left.new_empty((*left.shape[:-1], right.shape[-1]), dtype=out_dtype or left.dtype)


PRODUCTS: dict[Any, Callable[..., Tensor]] = {
    aten.mm.default: _result_of_product,
    aten.mm.dtype: _result_of_product,
    aten.bmm.default: _result_of_product,
    aten.bmm.dtype: _result_of_product,
    ours.gram_by_panels.default: panels.result_of,
    ours.patch_gram.default: patch_gram.result_of,
}
"""What can be left out, and what makes memory for its result."""

if KERNEL is not None:
    PRODUCTS[KERNEL] = result_of_kernel


@cache
def gated(product: Any) -> Any:
    """The operator that takes a boolean on the host, 0-D, and what ``product`` takes: it makes it, or not."""
    name, empty = f"{product.__name__.removesuffix('.default').replace('.', '_')}_if", PRODUCTS[product]

    def run(wanted: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return product(*args, **kwargs) if wanted else empty(*args, **kwargs)

    def fake(_: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return empty(*args, **kwargs)

    _, taken = str(product._schema).split("(", maxsplit=1)
    _LIBRARY.define(f"{name}(Tensor wanted, {taken}", tags=(torch.Tag.flexible_layout,))
    torch.library.impl(_LIBRARY, name, "CompositeExplicitAutograd")(run)
    torch.library.register_fake(f"thor_fx::{name}", fake, lib=_LIBRARY)
    return getattr(ours, name).default


for _product in PRODUCTS:
    gated(_product)


def gate_products(
    gm: fx.GraphModule, wanted: fx.Node, leaves_out: Collection[outputs.OutputDescriptor]
) -> int:
    """Let the products that only some results depend on be made only where these are wanted, in place.

    Args:
        gm: a step graph.
        wanted: the input that says so: boolean, 0-D, on the host.
        leaves_out: what the results are.

    Returns:
        The number of products.
    """
    results = {d: node for d, node in outputs.output_nodes(gm).items() if isinstance(node, fx.Node)}
    needed = upstream(node for descriptor, node in results.items() if descriptor not in leaves_out)
    only = upstream(node for descriptor, node in results.items() if descriptor in leaves_out) - needed
    products = [node for node in gm.graph.nodes if node in only and target(node) in PRODUCTS]
    for node in products:
        with gm.graph.inserting_before(node):
            instead = gm.graph.call_function(gated(target(node)), (wanted, *node.args), dict(node.kwargs))
        instead.meta = dict(node.meta)
        node.replace_all_uses_with(instead)
        gm.graph.erase_node(node)
    return len(products)
