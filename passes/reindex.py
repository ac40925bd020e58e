"""How the gradient matrix of a site lies inside the gradient of its parameter.

A path is a tuple of steps that leads from the parameter's layout to an ``(out, in)`` matrix, or to
``(E, out, in)`` matrices:
a ``Linear`` has the empty path, ``x @ W`` has ``(Permute((1, 0)),)``, the key part of a packed
projection ``(Narrow(0, d, 2 * d),)``. :func:`take` follows a path, :func:`put` writes a matrix back.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class View:
    """Reshape without changing the order of elements."""

    shape: tuple[int, ...]

    def take(self, t: Tensor) -> Tensor:
        """Forward."""
        return t.reshape(self.shape)

    def put(self, full: Tensor, part: Tensor) -> Tensor:
        """Back into the layout of ``full``."""
        return part.reshape(full.shape)


@dataclass(frozen=True)
class Permute:
    """Reorder axes."""

    order: tuple[int, ...]

    def take(self, t: Tensor) -> Tensor:
        """Forward."""
        return t.permute(self.order)

    def put(self, full: Tensor, part: Tensor) -> Tensor:  # noqa: ARG002 - one signature for all steps
        """Back into the layout of ``full``."""
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return part.permute(inverse)


@dataclass(frozen=True)
class Narrow:
    """Take positions ``start`` to ``stop`` of one axis."""

    axis: int
    start: int
    stop: int

    def take(self, t: Tensor) -> Tensor:
        """Forward."""
        return t.narrow(self.axis, self.start, self.stop - self.start)

    def put(self, full: Tensor, part: Tensor) -> Tensor:
        """Back into ``full``, whose other entries stay as they are."""
        return torch.slice_scatter(full, part, self.axis, self.start, self.stop)


Step = View | Permute | Narrow
Path = tuple[Step, ...]


def take(path: Path, t: Tensor) -> Tensor:
    """The ``(out, in)`` matrix, or matrices, inside a tensor of the parameter's shape."""
    for step in path:
        t = step.take(t)
    return t


def put(path: Path, full: Tensor, matrix: Tensor) -> Tensor:
    """``full`` with the matrix that ``path`` leads to replaced by ``matrix``."""
    if not path:
        return matrix
    step, rest = path[0], path[1:]
    return step.put(full, put(rest, step.take(full), matrix))


def part_name(path: Path) -> str:
    """What a layer that covers a part of its parameter is called behind the name: ``[0:64]``."""
    return "".join(f"[{':, ' * s.axis}{s.start}:{s.stop}]" for s in path if isinstance(s, Narrow))


def simplify(path: Path, shape: tuple[int, ...]) -> Path:
    """An equal path in the shortest form, so that uses spelled differently compare equal.

    Slices come first; what is left is looked at through strides: most chains of views and
    permutations are the identity or one transposition.
    """
    path = _slices_first(path, shape)
    head = tuple(step for step in path if isinstance(step, Narrow))
    if path[: len(head)] != head:
        return path
    part = torch.empty(take(head, torch.empty(shape, device="meta")).shape, device="meta")
    try:
        matrix = _as_view(path[len(head) :], part)
    except (RuntimeError, ValueError):  # a reshape that would copy
        return path
    order = _as_stored(matrix)
    stored = matrix.permute(order)
    if not stored.is_contiguous():
        return path
    back = tuple(sorted(range(matrix.dim()), key=order.__getitem__))
    permuted: Path = () if back == tuple(range(matrix.dim())) else (Permute(back),)
    return (*head, *_reshape(part, tuple(stored.shape)), *permuted)


def _as_stored(t: Tensor) -> list[int]:
    """The axes in the order in which they lie in memory; those of length 1 stay where they are."""
    long = [axis for axis in range(t.dim()) if t.shape[axis] > 1]
    strides = t.stride()
    ordered = iter(sorted(long, key=lambda axis: -strides[axis]))
    return [next(ordered) if t.shape[axis] > 1 else axis for axis in range(t.dim())]


def _slices_first(path: Path, shape: tuple[int, ...]) -> Path:
    """Move slices in front of the permutations and views that they follow, where that is possible."""
    steps = list(path)
    for end in range(len(steps)):
        for i in range(end, 0, -1):
            before = take(tuple(steps[: i - 1]), torch.empty(shape, device="meta")).shape
            swapped = _swap(steps[i - 1], steps[i], tuple(before))
            if swapped is None:
                break
            steps[i - 1 : i + 1] = swapped
    return tuple(steps)


def _swap(first: Step, second: Step, before: tuple[int, ...]) -> tuple[Step, Step] | None:
    """Two steps that do the same as ``first, second`` with the slice in front; None if there are none."""
    if not isinstance(second, Narrow):
        return None
    axis = second.axis
    if isinstance(first, Permute):
        return Narrow(first.order[axis], second.start, second.stop), first
    if isinstance(first, View) and before[: axis + 1] == first.shape[: axis + 1]:
        size = second.stop - second.start
        return second, View((*first.shape[:axis], size, *first.shape[axis + 1 :]))
    return None


def _as_view(path: Path, t: Tensor) -> Tensor:
    for step in path:
        t = t.view(step.shape) if isinstance(step, View) else step.take(t)
    return t


def _reshape(t: Tensor, shape: tuple[int, ...]) -> Path:
    return () if tuple(t.shape) == shape else (View(shape),)


def disjoint(paths: list[Path], shape: tuple[int, ...]) -> bool:
    """Whether no two of the (simplified) paths lead to the same entry of a parameter of this shape."""
    boxes = [_box(path, shape) for path in paths]
    pairs = ((a, b) for i, a in enumerate(boxes) for b in boxes[:i])
    return not any(
        all(a0 < b1 and b0 < a1 for (a0, a1), (b0, b1) in zip(a, b, strict=True)) for a, b in pairs
    )


def _box(path: Path, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """The range of every axis that a path leads to, as far as its slices come first."""
    box = [(0, size) for size in shape]
    for step in path:
        if not isinstance(step, Narrow):
            break
        start = box[step.axis][0]
        box[step.axis] = start + step.start, start + step.stop
    return box
