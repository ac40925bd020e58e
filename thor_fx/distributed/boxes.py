"""Parts of tensors that lie in a grid: taken out, and put together again."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, order=True)
class Box:
    """A part of a tensor.

    Attributes:
        offset: the first index along every axis.
        shape: of the part; a part without elements may lie anywhere.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    def of(self, whole: Tensor) -> Tensor:
        """The part of a tensor.

        Example:
            >>> Box((1,), (2,)).of(torch.arange(4))
            tensor([1, 2])
        """
        for axis, (start, length) in enumerate(zip(self.offset, self.shape, strict=True)):
            if length != whole.shape[axis]:
                whole = whole.narrow(axis, start if length else 0, length)
        return whole


def together(parts: Mapping[Box, Tensor]) -> Tensor:
    """The tensor whose parts these are; they cover it, and no two of them overlap.

    Example:
        >>> whole = torch.arange(6).view(2, 3)
        >>> boxes = [Box((0, 0), (2, 2)), Box((0, 2), (2, 1))]
        >>> together({box: box.of(whole) for box in boxes}).equal(whole)
        True
    """
    return _along(0, dict(sorted(parts.items(), key=lambda part: part[0].offset)))


def _along(axis: int, parts: dict[Box, Tensor]) -> Tensor:
    if len(parts) == 1:
        return next(iter(parts.values()))
    slabs: dict[int, dict[Box, Tensor]] = {}
    for box, part in parts.items():
        slabs.setdefault(box.offset[axis], {})[box] = part
    return torch.cat([_along(axis + 1, slab) for slab in slabs.values()], axis)
