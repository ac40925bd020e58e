"""Recognise losses that are sums over elements: squared errors, and cross-entropies of logits.

The cotangent of such a loss is an affine function of one node, the *atom*, element by element: ``g 2 d`` of
the error ``d``, ``g (k sigmoid(z) - m)`` of ``sigmoid(z)``. The walk goes from where backward meets
the model to the atom and gathers what the atom is multiplied by: that is the weight of an element.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from .anatomy import Anatomy
from .heads import Head, KindOfHead, Product
from .nodes import CASTS, arguments, shape, source, target

aten = torch.ops.aten

MULTIPLIES = {aten.mul.Tensor, aten.mul.Scalar}
DIVIDES = {aten.div.Tensor, aten.div.Scalar}
ADDS = {aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar}
MEAN = 1  # of a loss function's argument ``reduction``


@dataclass(frozen=True)
class _Slope:
    """What the atom is multiplied by, on the way from a node down to it."""

    atom: fx.Node
    kind: KindOfHead
    factors: tuple[Any, ...] = ()
    divisors: tuple[Any, ...] = ()


@dataclass(frozen=True)
class _Way:
    """What was passed on a walk."""

    factors: tuple[Any, ...] = ()
    divisors: tuple[Any, ...] = ()
    shifted: bool = False
    power: bool = False
    seen: tuple[fx.Node, ...] = field(default=(), repr=False)

    def times(self, *factors: Any) -> "_Way":
        return replace(self, factors=(*self.factors, *factors))

    def over(self, *divisors: Any) -> "_Way":
        return replace(self, divisors=(*self.divisors, *divisors))


def elementwise_heads(gm: fx.GraphModule, parts: Anatomy) -> Iterator[Head]:
    """The gaussian and the bernoulli heads of a graph, in its order."""
    squares = [source(n) for n in gm.graph.nodes if n in parts.forward and _is_square(n)]
    for node in gm.graph.nodes:
        if node not in parts.backward or node not in parts.model or not _has_rows(node):
            continue
        if target(node) is aten.mse_loss_backward.default:
            head = _mean_squared_error(node, parts)
        elif target(node) in MULTIPLIES and any(parts.is_coefficient(arg) for arg in node.args):
            slope = _descend(node, _Way(), parts, squares)
            head = None if slope is None else _head(node, slope, parts)
        else:
            continue
        if head is not None:
            yield head


def _has_rows(node: fx.Node) -> bool:
    """The square of a number is no likelihood of an output: of a mean loss, say."""
    return isinstance(node.meta.get("val"), torch.Tensor) and len(shape(node)) > 0


def _mean_squared_error(node: fx.Node, parts: Anatomy) -> Head | None:
    start, prediction, target_, reduction = arguments(node)
    if start in parts.model:
        return None
    output = prediction if prediction in parts.model else target_
    divisors = ("numel",) if reduction == MEAN else ()
    return Head("gaussian", output, node, axis_of(node), Product((start, 2), divisors))


def _descend(node: fx.Node, way: _Way, parts: Anatomy, squares: list[fx.Node]) -> _Slope | None:
    """Walk to the atom; None where there is none."""
    while node in parts.model:
        operator = target(node)
        way = replace(way, seen=(*way.seen, node))
        if operator is aten.sigmoid.default:
            return _bernoulli(node, way, parts)
        if node not in parts.backward and not way.shifted and _is_error(node, way, parts, squares):
            return _Slope(node, "gaussian", way.factors, way.divisors)
        if operator in CASTS or operator is aten.neg.default:
            node = source(node)
        elif operator is aten.pow.Tensor_Scalar and arguments(node)[1] == 1:
            node, way = source(node), replace(way, power=True)
        elif operator in MULTIPLIES | DIVIDES | ADDS:
            step = _arithmetic(node, way, parts)
            if step is None:
                return None
            node, way = step
        else:
            return None
    return None


def _arithmetic(node: fx.Node, way: _Way, parts: Anatomy) -> tuple[fx.Node, _Way] | None:
    """One step through a sum, a product or a quotient of which one side is the model's."""
    one, other = arguments(node)[:2]
    if not isinstance(one, fx.Node) or one not in parts.model:
        if target(node) in DIVIDES:
            return None
        one, other = other, one
    if not isinstance(one, fx.Node) or (isinstance(other, fx.Node) and other in parts.model):
        return None
    if shape(one) != shape(node) or node.kwargs.get("alpha", 1) != 1:
        return None
    if target(node) in ADDS:
        return one, replace(way, shifted=True)
    factor = (
        "numel" if isinstance(other, fx.Node) and not isinstance(other.meta["val"], torch.Tensor) else other
    )
    return one, way.over(factor) if target(node) in DIVIDES else way.times(factor)


def _bernoulli(sigmoid: fx.Node, way: _Way, parts: Anatomy) -> _Slope | None:
    """Forward must not have computed what was passed: then this is no derivative of a product."""
    passed = [node for node in way.seen if node is not sigmoid]
    if not way.shifted or any(node in parts.forward for node in passed):
        return None
    return _Slope(source(sigmoid), "bernoulli", way.factors, way.divisors)


def _is_error(node: fx.Node, way: _Way, parts: Anatomy, squares: list[fx.Node]) -> bool:
    """Whether the loss contains the square of ``node``, and the walk started at its derivative."""
    if not any(_same(node, square) or _negative(node, square) for square in squares):
        return False
    return way.power or node not in parts.forward or _doubled(way.seen[0]) is not None


def _is_square(node: fx.Node) -> bool:
    if target(node) is aten.pow.Tensor_Scalar:
        return bool(arguments(node)[1] == 2)
    return target(node) is aten.mul.Tensor and arguments(node)[0] is arguments(node)[1]


def _same(one: Any, other: Any, depth: int = 2) -> bool:
    """Whether two arguments are the same: one node, or nodes that compute the same from the same."""
    if one is other or not isinstance(one, fx.Node) or not isinstance(other, fx.Node):
        return bool(one is other or (type(one) is type(other) and one == other))
    if one.op == "get_attr":
        return other.op == one.op and one.target == other.target
    if depth == 0 or one.target != other.target or not one.all_input_nodes or one.kwargs != other.kwargs:
        return False
    pairs = zip(one.args, other.args, strict=False)
    return len(one.args) == len(other.args) and all(_same(a, b, depth - 1) for a, b in pairs)


def _negative(one: fx.Node, other: fx.Node) -> bool:
    """Whether two nodes are ``a - b`` and ``b - a``: their squares are the same."""
    if {one.target, other.target} != {aten.sub.Tensor} or one.kwargs or other.kwargs:
        return False
    return all(_same(a, b) for a, b in zip(one.args, reversed(other.args), strict=True))


def _doubled(half: fx.Node) -> fx.Node | None:
    """The derivative of ``d d``: the sum of two equal products, of which ``half`` is one."""
    for user in half.users:
        if target(user) is aten.add.Tensor and not user.kwargs:
            one, other = arguments(user)[:2]
            if isinstance(one, fx.Node) and isinstance(other, fx.Node) and _same(one, other):
                return user
    return None


def _head(node: fx.Node, slope: _Slope, parts: Anatomy) -> Head | None:
    factors, divisors = slope.factors, slope.divisors
    if slope.kind == "gaussian":
        double = _doubled(node)
        if double is not None:
            if half_of(double) is not node:
                return None  # the other half speaks for both
            node, factors = double, (*factors, 2)
    else:
        node, factors, divisors = _whole_derivative(node, slope, parts)
    return Head(slope.kind, slope.atom, node, axis_of(node), Product(factors, divisors))


def half_of(double: fx.Node) -> fx.Node:
    """The first summand."""
    return source(double)


def _whole_derivative(
    node: fx.Node, slope: _Slope, parts: Anatomy
) -> tuple[fx.Node, tuple[Any, ...], tuple[Any, ...]]:
    """Go on over the weight and the mean that torch's derivative of the cross-entropy of logits ends with.

    A product with what the logits themselves were multiplied by is no part of it.
    """
    factors, divisors = slope.factors, slope.divisors
    while len(node.users) == 1:
        user = next(iter(node.users))
        others = [arg for arg in user.args if arg is not node]
        if len(others) != 1 or source(user) is not node:
            break
        if target(user) is aten.div.Scalar:
            number = not isinstance(others[0], fx.Node)
            node, divisors = user, (*divisors, others[0] if number else "numel")
        elif target(user) is aten.mul.Tensor and _is_weight(others[0], slope.atom, parts):
            node, factors = user, (*factors, others[0])
        else:
            break
    return node, factors, divisors


def _is_weight(value: Any, logits: fx.Node, parts: Anatomy) -> bool:
    return isinstance(value, fx.Node) and parts.is_data(value) and value not in logits.args


def axis_of(node: fx.Node) -> int | None:
    """Where the elements of a row lie, for losses that do not say."""
    return -1 if len(shape(node)) > 1 else None
