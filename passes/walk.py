"""The walk from a gradient back to the contractions that it is made of.

One rule per operator. A rule yields the sites that add up to its node, or raises :class:`NoSite`
with the reason. Along the way the *path* records where the current tensor lies in the gradient of
the parameter (:mod:`thor_fx.passes.reindex`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .nodes import CASTS, PERMUTES, RESHAPES, arguments, chain, permutation, shape, source, target
from .reindex import Narrow, Path, Permute, Step, View, part_name

aten = torch.ops.aten

ZEROS = {aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default}
FULLS = {aten.full.default, aten.full_like.default, aten.new_full.default}


@dataclass(frozen=True)
class Operand:
    """One side of a contraction: rows x features, or features x rows where ``transposed``.

    Further axes in front of these two are rows as well.
    """

    node: fx.Node
    transposed: bool

    @property
    def features(self) -> int:
        """The length of the side: what ``A`` or ``G`` is square in."""
        return int(shape(self.node)[-2 if self.transposed else -1])

    @property
    def rows(self) -> int | torch.SymInt:
        """The number of rows, over all leading axes; symbolic where the batch size is."""
        return self.node.meta["val"].numel() // self.features


@dataclass(frozen=True)
class Site:
    """One use of a weight: a summand ``sum_r g_r a_r^T`` of its gradient, with both operands.

    Attributes:
        param: name of the parameter.
        path: where the layer's (out, in) matrix lies in the parameter.
        gradient: the contraction.
        activation: the rows ``a_r``.
        cotangent: the rows ``g_r``.
        flipped: this use is of the layer's transposed matrix, and others are not (a tied
            auto-encoder: ``W`` and ``W.T``). Its activation then has ``out`` features.
    """

    param: str
    path: Path
    gradient: fx.Node
    activation: Operand
    cotangent: Operand
    flipped: bool = False

    @property
    def layer(self) -> str:
        """The parameter's name, with the part of it where the site covers no more than a part."""
        return self.param + part_name(self.path)

    @property
    def dims(self) -> tuple[int, int]:
        """``(out, in)`` of the layer."""
        dims = self.cotangent.features, self.activation.features
        return dims[::-1] if self.flipped else dims


class NoSite(Exception):
    """A walk ended at something that is no contraction. Its text is the reason."""


def unlike(node: fx.Node, detail: str = "") -> NoSite:
    """The reason for a gradient that ends in ``node``."""
    return NoSite(f"its gradient is {chain(node)}{detail}, no product of matrices")


@dataclass(frozen=True)
class Walk:
    """The contractions below the gradient of one parameter.

    Attributes:
        param: its name.
        backward: every node that depends on where backward starts.
    """

    param: str
    backward: set[fx.Node]

    def visit(self, node: fx.Node, path: Path) -> Iterator[Site]:
        """Yield the sites that add up to ``node``, which lies at ``path`` in the gradient.

        Raises:
            unlike: a NoSite with the reason.
        """
        operator = target(node)
        if operator in CASTS:
            yield from self.visit(source(node), path)
        elif operator in RESHAPES or operator in PERMUTES:
            yield from self.visit(source(node), (*path, _undo(node)))
        elif operator in _RULES:
            yield from _RULES[operator](self, node, path)
        elif not _is_zero(node):
            raise unlike(node)

    def contraction(self, gradient: fx.Node, left: fx.Node, right: fx.Node, path: Path) -> Site:
        """The site whose matrix is ``left @ right``, its operands told apart by where they come from.

        Raises:
            unlike: a NoSite; the product is not linear in the gradient of the loss.
        """
        depends = left in self.backward, right in self.backward
        rows_last, rows_first = _base(Operand(left, True)), _base(Operand(right, False))
        if depends == (True, False):
            return Site(self.param, path, gradient, activation=rows_first, cotangent=rows_last)
        if depends == (False, True):
            path = (*path, Permute((1, 0)))
            return Site(self.param, path, gradient, activation=rows_last, cotangent=rows_first)
        raise unlike(gradient, " with both or none of its operands from backward")


def _is_zero(node: fx.Node) -> bool:
    """Whether a node is a tensor of zeros: it adds nothing to a gradient."""
    if target(node) in FULLS:
        position = 2 if target(node) is aten.new_full.default else 1
        return bool(arguments(node)[position] == 0)
    return target(node) in ZEROS


def _base(operand: Operand) -> Operand:
    """The operand read through plain transpositions, so that factors use the tensor that exists."""
    node = operand.node
    if target(node) in PERMUTES and len(shape(node)) == 2 and permutation(node) == (1, 0):
        return _base(Operand(source(node), not operand.transposed))
    return operand


def _undo(node: fx.Node) -> Step:
    """The step from the layout of a view or permutation to that of its argument."""
    if target(node) in PERMUTES:
        order = permutation(node)
        return Permute(tuple(sorted(range(len(order)), key=order.__getitem__)))
    return View(tuple(int(size) for size in shape(source(node))))


# --- the rules -----------------------------------------------------------------------------------


def _mm(walk: Walk, node: fx.Node, path: Path) -> Iterator[Site]:
    left, right = arguments(node)
    yield walk.contraction(node, left, right, path)


def _bmm(walk: Walk, node: fx.Node, path: Path) -> Iterator[Site]:
    batch, rows, cols = shape(node)
    if batch != 1:
        raise unlike(node, f" with {batch} slices (one factor pair per slice is not supported yet)")
    yield from _mm(walk, node, (*path, View((int(rows), int(cols)))))


def _addmm(walk: Walk, node: fx.Node, path: Path) -> Iterator[Site]:
    summand, left, right = _unscaled(node)[:3]
    yield from walk.visit(summand, path)
    yield walk.contraction(node, left, right, path)


def _add(walk: Walk, node: fx.Node, path: Path) -> Iterator[Site]:
    todo = [node]  # no recursion: a recurrent net adds one summand per time step
    while todo:
        summand = todo.pop()
        if target(summand) is not aten.add.Tensor:
            yield from walk.visit(summand, path)
            continue
        for part in reversed(_unscaled(summand)[:2]):
            if not isinstance(part, fx.Node) or shape(part) != shape(node):
                raise unlike(summand)
            todo.append(part)


def _unscaled(node: fx.Node) -> tuple[Any, ...]:
    if any(scale != 1 for scale in node.kwargs.values()):
        raise unlike(node, " with a factor")
    return arguments(node)


def _cat(walk: Walk, node: fx.Node, path: Path) -> Iterator[Site]:
    pieces, axis, *_ = (*arguments(node), 0)
    axis, start = axis % len(shape(node)), 0
    for piece in pieces:
        stop = start + int(shape(piece)[axis])
        yield from walk.visit(piece, (*path, Narrow(axis, start, stop)))
        start = stop


def _slice_backward(walk: Walk, node: fx.Node, path: Path) -> Iterator[Site]:
    piece, _, axis, start, stop, stride = arguments(node)
    yield from walk.visit(piece, (*path, _narrow(node, axis, start, stop, stride)))


def _slice_scatter(walk: Walk, node: fx.Node, path: Path) -> Iterator[Site]:
    given = arguments(node)
    defaults: tuple[Any, ...] = (0, None, None, 1)
    full, piece, axis, start, stop, stride = (*given, *defaults[len(given) - 2 :])
    if not _is_zero(full):
        raise unlike(node)
    yield from walk.visit(piece, (*path, _narrow(node, axis, start, stop, stride)))


def _narrow(node: fx.Node, axis: int, start: int | None, stop: int | None, stride: int) -> Narrow:
    if stride != 1:
        raise unlike(node, " with a stride")
    axis %= len(shape(node))
    first, last, _ = slice(start, stop).indices(int(shape(node)[axis]))
    return Narrow(axis, first, last)


def _sum(walk: Walk, node: fx.Node, path: Path) -> Iterator[Site]:
    """A weight that was expanded over leading axes: the sum over them of a batched product."""
    product, axes = arguments(node)[:2]
    sizes, flipped = shape(product), False
    if len(sizes) < 3 or sorted(axis % len(sizes) for axis in axes) != list(range(len(sizes) - 2)):
        raise unlike(node)
    while target(product) in CASTS | RESHAPES | PERMUTES:
        flipped ^= _swaps_last_two(product, node)
        product = source(product)
    if target(product) is not aten.bmm.default:
        raise unlike(node)
    path = (*path, View((int(sizes[-2]), int(sizes[-1]))))
    left, right = arguments(product)
    yield walk.contraction(product, left, right, (*path, Permute((1, 0))) if flipped else path)


def _swaps_last_two(step: fx.Node, node: fx.Node) -> bool:
    """Whether a view or permutation swaps the last two axes; it must not mix them with others."""
    dims = len(shape(step))
    if target(step) in PERMUTES:
        last = permutation(step)[-2:]
        if set(last) == {dims - 2, dims - 1}:
            return last == (dims - 1, dims - 2)
    elif shape(source(step))[-2:] == shape(step)[-2:]:
        return False
    raise unlike(node)


def _outer(walk: Walk, node: fx.Node, path: Path) -> Iterator[Site]:
    """A single row: the broadcast product of a column (n, 1) and a row (m,) or (1, m)."""
    column, row = arguments(node)
    if _sizes(column)[-1:] != (1,):
        column, row = row, column
    sizes = shape(node)
    if len(sizes) != 2 or _sizes(column) != (sizes[0], 1) or _sizes(row) not in {sizes[1:], (1, sizes[1])}:
        raise unlike(node)
    yield walk.contraction(node, column, row, path)


def _sizes(value: Any) -> tuple[int, ...]:
    return shape(value) if isinstance(value, fx.Node) else ()


Rule = Callable[[Walk, fx.Node, Path], Iterator[Site]]
_RULES: dict[Any, Rule] = {
    aten.mm.default: _mm,
    aten.bmm.default: _bmm,
    aten.addmm.default: _addmm,
    aten.add.Tensor: _add,
    aten.cat.default: _cat,
    aten.slice_backward.default: _slice_backward,
    aten.slice_scatter.default: _slice_scatter,
    aten.sum.dim_IntList: _sum,
    aten.mul.Tensor: _outer,
}
