"""What a graph does only if it is told to: a plain step can run the graph of a factor step.

Nearly all that a graph computes for its factors alone is products of rows, and copies that bring the rows
into the form of a product. Each of them becomes an operator that also takes a number on the host; where that
is false, it returns memory that nobody has written to. What else is on the way to a factor (a cast, a mean, a
scatter) is computed in any case.

To a compiler the operator is a call, as a product is.
"""

from collections.abc import Callable, Collection
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from . import outputs, panels, patch_gram
from .nodes import source, target, upstream
from .symmetric import KERNEL
from .symmetric import result_of as result_of_kernel

aten, ours = torch.ops.aten, torch.ops.thor_fx

_LIBRARY = torch.library.Library("thor_fx", "FRAGMENT")


def _result_of_product(left: Tensor, right: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    return left.new_empty((*left.shape[:-1], right.shape[-1]), dtype=out_dtype or left.dtype)


def _result_of_pad(x: Tensor, pad: list[int], _value: float = 0) -> Tensor:
    sides = zip(pad[::2], pad[1::2], strict=True)
    longer = [size + sum(side) for size, side in zip(reversed(x.shape), sides, strict=False)]
    return x.new_empty((*x.shape[: x.dim() - len(longer)], *reversed(longer)))


def _result_of_clone(x: Tensor, **_memory_format: torch.memory_format) -> Tensor:
    return x.new_empty(x.shape)


PRODUCTS: dict[Any, Callable[..., Tensor]] = {
    aten.mm.default: _result_of_product,
    aten.mm.dtype: _result_of_product,
    aten.bmm.default: _result_of_product,
    aten.bmm.dtype: _result_of_product,
    ours.gram_by_panels.default: panels.result_of,
    ours.patch_gram.default: patch_gram.result_of,
}
"""Products that can be left out, and what makes memory for their results."""

if KERNEL is not None:
    PRODUCTS[KERNEL] = result_of_kernel

COPIES: dict[Any, Callable[..., Tensor]] = {
    aten.constant_pad_nd.default: _result_of_pad,
    aten.clone.default: _result_of_clone,
}
"""Likewise copies, where the result has no gaps."""

GATED = PRODUCTS | COPIES


@cache
def gated(operator: Any) -> Any:
    """The operator that takes a boolean on the host, 0-D, and what ``operator`` takes: it runs it, or not."""
    name = f"{operator.__name__.removesuffix('.default').replace('.', '_')}_if"
    empty = GATED[operator]

    def run(wanted: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return operator(*args, **kwargs) if wanted else empty(*args, **kwargs)

    def fake(_: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return empty(*args, **kwargs)

    _, taken = str(operator._schema).split("(", maxsplit=1)
    _LIBRARY.define(f"{name}(Tensor wanted, {taken}", tags=(torch.Tag.flexible_layout,))
    torch.library.impl(_LIBRARY, name, "CompositeExplicitAutograd")(run)
    torch.library.register_fake(f"thor_fx::{name}", fake, lib=_LIBRARY)
    return getattr(ours, name).default


for _operator in GATED:
    gated(_operator)


def gate(gm: fx.GraphModule, wanted: fx.Node, leaves_out: Collection[outputs.OutputDescriptor]) -> int:
    """Let products and copies that only some results depend on be made only where these are wanted, in place.

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
    gates = [node for node in gm.graph.nodes if node in only and _can_be_left_out(node)]
    for node in gates:
        with gm.graph.inserting_before(node):
            instead = gm.graph.call_function(gated(target(node)), (wanted, *node.args), dict(node.kwargs))
        instead.meta = dict(node.meta)
        node.replace_all_uses_with(instead)
        gm.graph.erase_node(node)
    return sum(target(node) in PRODUCTS for node in gates)


def _can_be_left_out(node: fx.Node) -> bool:
    return target(node) in PRODUCTS or (target(node) in COPIES and _moves(node))


def _moves(copy: fx.Node) -> bool:
    """Whether a copy is one that no compiler drops, of known size and without gaps; and never of an index."""
    value, of = copy.meta["val"], source(copy).meta["val"]
    if not value.is_floating_point():
        return False
    known = all(isinstance(size, int) for size in (*value.shape, *of.shape, *of.stride()))
    return known and value.is_contiguous() and not (of.is_contiguous() and of.shape == value.shape)
