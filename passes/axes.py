"""Where the axes of a view lie in the tensor that it is a view of.

An axis is a run of *atoms*, ``(stride, size)`` in the contiguous layout of that tensor, slowest first. Views
that split and merge axes, and permutations, keep atoms: so two views of one tensor can be compared without
its values.
"""

from collections.abc import Iterable
from typing import Any

from torch import fx

from .nodes import CASTS, PERMUTES, RESHAPES, permutation, shape, source, target

Atom = tuple[Any, Any]
Axis = tuple[Atom, ...]


def axes_of(node: fx.Node) -> tuple[fx.Node, list[Axis | None]]:
    """What a chain of views, permutations and casts starts from, and where the axes of its result lie there.

    Returns:
        The first node of the chain, and the axes of ``node``; None for one that mixes others, or that may do
        so where sizes are symbolic.
    """
    steps: list[fx.Node] = []
    while target(node) in CASTS | RESHAPES | PERMUTES:
        steps.append(node)
        node = source(node)
    axes = _own_axes(shape(node))
    for step in reversed(steps):
        if target(step) in PERMUTES:
            axes = [axes[axis] for axis in permutation(step)]
        elif target(step) in RESHAPES:
            axes = _regrouped(_known(axes), shape(step))
    return node, axes


def merged(axes: Iterable[Axis]) -> Axis:
    """Several axes as one: the same for all that run over the same entries in the same order."""
    found: list[Atom] = []
    for stride, size in (atom for axis in axes for atom in axis):
        if found and _same(found[-1][0], stride * size):
            found[-1] = stride, found[-1][1] * size
        else:
            found.append((stride, size))
    return tuple((str(stride), str(size)) for stride, size in found)


def _own_axes(sizes: tuple[Any, ...]) -> list[Axis | None]:
    axes: list[Axis | None] = []
    stride: Any = 1
    for size in reversed(sizes):
        axes.insert(0, () if _same(size, 1) else ((stride, size),))
        stride = stride * size
    return axes


def _known(axes: list[Axis | None]) -> list[Atom]:
    """The atoms behind the last axis that is not known."""
    atoms: list[Atom] = []
    for axis in reversed(axes):
        if axis is None:
            break
        atoms = [*axis, *atoms]
    return atoms


def _regrouped(atoms: list[Atom], sizes: tuple[Any, ...]) -> list[Axis | None]:
    """The atoms, in their order, as axes of these sizes; from the last one on, as far as they fit."""
    axes: list[Axis | None] = [None] * len(sizes)
    for place in reversed(range(len(sizes))):
        axis = _taken(atoms, sizes[place])
        if axis is None:
            break
        axes[place] = axis
    return axes


def _taken(atoms: list[Atom], size: Any) -> Axis | None:
    """Take an axis of this size from the end of the atoms, the first of which may be cut in two."""
    axis: Axis = ()
    have: Any = 1
    while not _same(have, size):
        if not atoms:
            return None
        stride, length = atoms.pop()
        if isinstance(size, int) and isinstance(length, int) and have * length > size:
            inner = size // have
            if have * inner != size or length % inner:
                return None
            atoms.append((stride * inner, length // inner))
            length = inner
        axis, have = ((stride, length), *axis), have * length
    return axis


def _same(one: Any, other: Any) -> bool:
    """Whether two sizes are one expression: to compare symbols by value would guard on them."""
    return str(one) == str(other)
