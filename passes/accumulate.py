"""Running averages of factors in the product's own call.

``beta S + alpha_1 (x^T x) + alpha_2 (y^T y) + ...``, where ``S`` is an input of the graph, the products are
(parts of) a factor that the graph returns and all scales are numbers, becomes ``addmm`` (``baddbmm`` for a
stack of products) with ``beta`` and ``alpha``: one call instead of a product, a scaling and a sum. It takes
the product's place, and is of its phase, so no operand has to live longer.

Afterwards every such sum is computed that way, equal up to rounding; every node that the graph returned is
computed by the same nodes as before. Where a scale is data (a symbolic number of rows, say) nothing changes.
"""

import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import fx

from .nodes import RESHAPES, arguments, shape, source, target
from .outputs import Factor, output_nodes
from .phases import phase_of, set_phase

aten = torch.ops.aten

INTO = {aten.mm.default: aten.addmm.default, aten.bmm.default: aten.baddbmm.default}
SAME_VALUE = RESHAPES | {aten.expand.default, aten.clone.default, aten._to_copy.default}
ON_NUMBERS: dict[Any, Callable[[float, float], float]] = {
    aten.clamp.default: max,
    aten.add.Tensor: operator.add,
    aten.mul.Tensor: operator.mul,
    aten.div.Tensor: operator.truediv,
}


class _Summand(NamedTuple):
    scale: float
    node: fx.Node


def accumulate(gm: fx.GraphModule) -> None:
    """Fold running averages of factors into their products, in place."""
    for descriptor, factor in list(output_nodes(gm).items()):
        if isinstance(descriptor, Factor) and factor is not None:
            total = _sum_above(factor)
            if total is not None:
                _fold(total)


def _sum_above(factor: fx.Node) -> fx.Node | None:
    """The sum of the scaled factor and something else; None if there is no such sum."""
    node = factor
    while True:
        users = _users(node)
        if len(users) != 1:
            return None
        (user,) = users
        if target(user) is aten.add.Tensor:
            return user
        if all(inner is not node for inner in _inside(user)):
            return None
        node = user


def _users(node: fx.Node) -> list[fx.Node]:
    return [user for user in node.users if user.op != "output"]


def _fold(total: fx.Node) -> None:
    summands = list(_summands(total, 1.0))
    products = [one for one in summands if target(one.node) in INTO]
    others = [one for one in summands if target(one.node) not in INTO]
    if len(others) != 1 or others[0].node.op != "placeholder":
        return
    if any(not _alike(one.node, total) for one in summands):
        return
    graph, ((beta, so_far),) = total.graph, others
    order = {node: position for position, node in enumerate(graph.nodes)}
    for alpha, product in sorted(products, key=lambda one: order[one.node]):
        with graph.inserting_before(product):
            operands = (so_far, *arguments(product))
            into = INTO[target(product)]
            so_far = graph.call_function(into, operands, {"beta": beta, "alpha": alpha})
        so_far.meta["val"] = total.meta["val"]
        if (phase := phase_of(product)) is not None:
            set_phase(so_far, phase)
        beta = 1
    total.replace_all_uses_with(so_far)
    _erase(total)


def _summands(node: fx.Node, scale: float) -> Iterator[_Summand]:
    """The linear combination that a node computes; a node inside it must not be needed elsewhere."""
    if target(node) is aten.add.Tensor and not node.kwargs and len(node.args) == 2:
        parts: list[tuple[float, Any]] = [(1.0, part) for part in arguments(node)]
    else:
        parts = _scaled(node)
    nested = all(isinstance(part, fx.Node) for _, part in parts)
    if not parts or not nested or any(_needed(part) for _, part in parts):
        yield _Summand(scale, node)
        return
    for factor, part in parts:
        yield from _summands(part, scale * factor)


def _needed(node: fx.Node) -> bool:
    return node.op != "placeholder" and len(_users(node)) != 1


def _inside(node: fx.Node) -> list[Any]:
    return [part for _, part in _scaled(node)]


def _scaled(node: fx.Node) -> list[tuple[float, Any]]:
    """The number and the node whose product a node is; nothing if it is none."""
    if target(node) is aten.mul.Tensor:
        left, right = arguments(node)
        for value, other in ((left, right), (right, left)):
            number = _number(value)
            if number is not None and isinstance(other, fx.Node) and shape(other) == shape(node):
                return [(number, other)]
    elif target(node) is aten.div.Tensor and not node.kwargs:
        value, by = arguments(node)
        number = _number(by)
        if number and isinstance(value, fx.Node) and shape(value) == shape(node):
            return [(1 / number, value)]
    elif target(node) in SAME_VALUE and _alike(source(node), node):
        return [(1.0, source(node))]
    return []


def _alike(node: fx.Node, other: fx.Node) -> bool:
    """Of one shape and dtype."""
    return shape(node) == shape(other) and node.meta["val"].dtype == other.meta["val"].dtype


def _number(value: Any) -> float | None:
    """The number that every element of a value is, where the graph says so."""
    if not isinstance(value, fx.Node):
        return float(value) if isinstance(value, int | float) else None
    kind, given = target(value), arguments(value)
    if kind in SAME_VALUE or kind is aten.full.default:
        return _number(given[kind is aten.full.default])
    if kind not in ON_NUMBERS or len(given) != 2 or value.kwargs:
        return None
    left, right = (_number(one) for one in given)
    return None if left is None or right is None else ON_NUMBERS[kind](left, right)


def _erase(node: fx.Node) -> None:
    """Remove a node that nobody needs any more, and what only it needed."""
    if node.users or node.op == "placeholder":
        return
    needed = node.all_input_nodes
    node.graph.erase_node(node)
    for inner in needed:
        _erase(inner)
