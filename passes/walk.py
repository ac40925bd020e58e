"""The walk from a gradient back to the contractions that it is made of.

One rule per operator. A rule yields the sites that add up to its node, or raises :class:`NoSite`
with the reason. Here are the rules that lead on: views, slices, sums, linear maps of the weight. Where
walks end is in :mod:`thor_fx.passes.contractions`. Along the way the *path* records where the current
tensor lies in the gradient of the parameter (:mod:`thor_fx.passes.reindex`).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from .nodes import (
    CASTS,
    PERMUTES,
    RESHAPES,
    arguments,
    chain,
    permutation,
    shape,
    source,
    target,
    upstream,
    use_of,
)
from .operands import Operand, Scaled
from .outputs import KEY, Param
from .reindex import Narrow, Path, Permute, Step, View, part_name, simplify

aten = torch.ops.aten

ZEROS = {aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default}
FULLS = {aten.full.default, aten.full_like.default, aten.new_full.default}
SWAP = Permute((1, 0))
SWAP_GROUPED = Permute((0, 2, 1))


@dataclass(frozen=True)
class Site:
    """One use of a weight: a summand ``sum_r g_r a_r^T`` of its gradient, with both operands.

    Attributes:
        param: name of the parameter.
        path: where the layer's (out, in) matrix, or (E, out, in) matrices, lie in the parameter.
        gradient: the contraction.
        activation: the rows ``a_r``.
        cotangent: the rows ``g_r``.
        flipped: this use is of the layer's transposed matrix, and others are not (a tied
            auto-encoder: ``W`` and ``W.T``). Its activation then has ``out`` features.
        kind: of the operation that uses the weight.
    """

    param: str
    path: Path
    gradient: fx.Node
    activation: Operand
    cotangent: Operand
    flipped: bool = False
    kind: str = "linear"

    @property
    def layer(self) -> str:
        """The parameter's name, with the part of it where the site covers no more than a part."""
        return self.param + part_name(self.path)

    @property
    def dims(self) -> tuple[int, int]:
        """``(out, in)`` of the layer; of every group of it."""
        dims = self.cotangent.features, self.activation.features
        return dims[::-1] if self.flipped else dims

    @property
    def groups(self) -> int:
        """E, the number of independent factor pairs."""
        return self.activation.groups

    @property
    def line(self) -> str:
        """The line of Python that uses the weight, as far as the tracer knows it."""
        return use_of(self.gradient)


class NoSite(Exception):
    """A walk ended at something that is no contraction. Its text is the reason."""


def unlike(node: fx.Node, detail: str = "") -> NoSite:
    """The reason for a gradient that ends in ``node``."""
    return NoSite(f"its gradient is {chain(node)}{detail}, no product of matrices")


Rule = Callable[["Walk", fx.Node, Path], Iterator[Any]]


@dataclass(frozen=True)
class Walk:
    """The contractions below the gradient of one parameter.

    Attributes:
        param: its name.
        backward: every node that depends on where backward starts.
        data: every node that depends on data: on an input that is no parameter.
        ends: the rules for operators where a walk ends, by operator.
    """

    param: str
    backward: set[fx.Node]
    data: set[fx.Node]
    ends: Mapping[Any, Rule] = field(repr=False)

    def visit(self, node: fx.Node, path: Path) -> Iterator[Any]:
        """Yield what adds up to ``node``, which lies at ``path`` in the gradient.

        Raises:
            unlike: a NoSite with the reason.
        """
        operator = target(node)
        if operator in CASTS:
            yield from self.visit(source(node), path)
        elif operator in RESHAPES or operator in PERMUTES:
            yield from self.visit(source(node), (*path, _undo(node)))
        elif operator in self.ends:
            yield from self.ends[operator](self, node, path)
        elif operator in _RULES:
            yield from _RULES[operator](self, node, path)
        elif not is_zero(node):
            raise unlike(node)


def is_zero(node: Any) -> bool:
    """Whether a node is a tensor of zeros: it adds nothing to a gradient."""
    if target(node) in FULLS:
        position = 2 if target(node) is aten.new_full.default else 1
        return bool(arguments(node)[position] == 0)
    return target(node) in ZEROS


def _undo(node: fx.Node) -> Step:
    """The step from the layout of a view or permutation to that of its argument."""
    if target(node) in PERMUTES:
        order = permutation(node)
        return Permute(tuple(sorted(range(len(order)), key=order.__getitem__)))
    return View(tuple(int(size) for size in shape(source(node))))


# --- sums and pieces -----------------------------------------------------------------------------


def _add(walk: Walk, node: fx.Node, path: Path) -> Iterator[Any]:
    todo: list[tuple[fx.Node, Any]] = [
        (node, 1)
    ]  # no recursion: a recurrent net adds one summand per time step
    while todo:
        summand, scale = todo.pop()
        if target(summand) not in SUMS:
            yield from (_scaled(site, scale) for site in walk.visit(summand, path))
            continue
        first, second = arguments(summand)[:2]
        if not _of_shape(first, node) or not _of_shape(second, node):
            raise unlike(summand)
        alpha: Any = summand.kwargs.get("alpha", 1)
        sign = -1 if target(summand) is aten.sub.Tensor else 1
        todo += [(second, scale * sign * alpha), (first, scale)]


SUMS = {aten.add.Tensor, aten.sub.Tensor}


def _of_shape(value: Any, node: fx.Node) -> bool:
    return isinstance(value, fx.Node) and shape(value) == shape(node)


def _cat(walk: Walk, node: fx.Node, path: Path) -> Iterator[Any]:
    pieces, axis, *_ = (*arguments(node), 0)
    axis, start = axis % len(shape(node)), 0
    for piece in pieces:
        stop = start + int(shape(piece)[axis])
        yield from walk.visit(piece, (*path, Narrow(axis, start, stop)))
        start = stop


def _stack(walk: Walk, node: fx.Node, path: Path) -> Iterator[Any]:
    pieces, axis, *_ = (*arguments(node), 0)
    axis %= len(shape(node))
    for i, piece in enumerate(pieces):
        yield from walk.visit(piece, (*path, Narrow(axis, i, i + 1), _as(piece)))


def _slice_backward(walk: Walk, node: fx.Node, path: Path) -> Iterator[Any]:
    piece, _, axis, start, stop, stride = arguments(node)
    yield from walk.visit(piece, (*path, _narrow(node, axis, start, stop, stride)))


def _slice_scatter(walk: Walk, node: fx.Node, path: Path) -> Iterator[Any]:
    given = arguments(node)
    defaults: tuple[Any, ...] = (0, None, None, 1)
    full, piece, axis, start, stop, stride = (*given, *defaults[len(given) - 2 :])
    if not is_zero(full):
        raise unlike(node)
    yield from walk.visit(piece, (*path, _narrow(node, axis, start, stop, stride)))


def _narrow(node: fx.Node, axis: int, start: int | None, stop: int | None, stride: int) -> Narrow:
    if stride != 1:
        raise unlike(node, " with a stride")
    axis %= len(shape(node))
    first, last, _ = slice(start, stop).indices(int(shape(node)[axis]))
    return Narrow(axis, first, last)


def _select_backward(walk: Walk, node: fx.Node, path: Path) -> Iterator[Any]:
    piece, _, axis, index = arguments(node)
    yield from walk.visit(piece, (*path, _one_of(node, axis, index), _as(piece)))


def _select_scatter(walk: Walk, node: fx.Node, path: Path) -> Iterator[Any]:
    full, piece, axis, index = arguments(node)
    if not is_zero(full):
        raise unlike(node)
    yield from walk.visit(piece, (*path, _one_of(node, axis, index), _as(piece)))


def _one_of(node: fx.Node, axis: int, index: int) -> Narrow:
    axis %= len(shape(node))
    index %= int(shape(node)[axis])
    return Narrow(axis, index, index + 1)


def _as(piece: fx.Node) -> View:
    return View(tuple(int(size) for size in shape(piece)))


# --- linear functions of the weight --------------------------------------------------------------

# NOTE: [A function of the parameter] Where the weight of a layer is ``f(W)`` and ``f`` is linear, the
# gradient of ``W`` is a sum over the same rows: for ``c W`` of ``c g_r a_r^T``, for ``W diag(v)`` of
# ``g_r (v a_r)^T``, for ``B W`` of ``(B^T g_r) a_r^T`` (a merged low-rank adapter). Each is a site.


def scaled_product(walk: Walk, node: fx.Node, path: Path) -> Iterator[Any]:
    """Yield the sites of a gradient times, or divided by, a number or a vector along one of its axes.

    Raises:
        unlike: a NoSite; the factor is a matrix, or comes from backward.
    """
    one, other = arguments(node)[:2]
    if isinstance(one, fx.Node) and one not in walk.backward:
        one, other = other, one
    if not _of_shape(one, node) or (isinstance(other, fx.Node) and other in walk.backward):
        raise unlike(node)
    axis = _scaled_axis(other, node)
    if axis is None:
        raise unlike(node)
    if isinstance(other, fx.Node) and _is_made_of(other, walk.param):
        raise unlike(node, " by a function of itself")
    divide = target(node) in DIVISIONS
    if axis == "all":
        yield from (_scaled(site, other, divide) for site in walk.visit(one, path))
        return
    for site in [in_short(site, one) for site in walk.visit(one, ())]:
        if site.path not in {(), (SWAP,)}:
            raise unlike(node)
        of_rows = (axis == "rows") == (site.path == ())
        side = "cotangent" if of_rows else "activation"
        operand = getattr(site, side)
        scaled = replace(site, **{side: Scaled(operand.node, operand, other, divide)})
        yield replace(scaled, path=(*path, *site.path))


def _is_made_of(node: fx.Node, param: str) -> bool:
    return any(n.meta.get(KEY) == Param(param) for n in upstream([node]))


def in_short(site: Any, gradient: fx.Node) -> Any:
    """A site of ``gradient`` with the shortest path: transpositions that undo each other are none."""
    return replace(site, path=simplify(site.path, tuple(int(size) for size in shape(gradient))))


DIVISIONS = {aten.div.Tensor, aten.div.Scalar}


def _scaled_axis(factor: Any, node: fx.Node) -> str | None:
    """What a factor of a matrix scales: all of it, its rows or its columns."""
    if not isinstance(factor, fx.Node) or factor.meta["val"].numel() == 1:
        return "all"
    sizes = shape(node)
    if len(sizes) != 2:
        return None
    by = (1, 1, *shape(factor))[-2:]
    if by == (1, sizes[1]):
        return "columns"
    return "rows" if by == (sizes[0], 1) else None


def _neg(walk: Walk, node: fx.Node, path: Path) -> Iterator[Any]:
    yield from (_scaled(site, -1) for site in walk.visit(source(node), path))


def _scaled(site: Any, by: Any, divide: bool = False) -> Any:
    """A site whose cotangents are scaled."""
    if not isinstance(by, fx.Node) and by == 1:
        return site
    if not isinstance(site, Site):
        raise NoSite("it is scaled")
    return replace(site, cotangent=Scaled(site.cotangent.node, site.cotangent, by, divide))


_RULES: dict[Any, Rule] = {
    aten.add.Tensor: _add,
    aten.sub.Tensor: _add,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.slice_backward.default: _slice_backward,
    aten.slice_scatter.default: _slice_scatter,
    aten.select_backward.default: _select_backward,
    aten.select_scatter.default: _select_scatter,
    aten.mul.Tensor: scaled_product,
    aten.mul.Scalar: scaled_product,
    aten.div.Tensor: scaled_product,
    aten.div.Scalar: scaled_product,
    aten.neg.default: _neg,
}
