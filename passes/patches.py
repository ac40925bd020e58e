"""Operands of convolutions: the patches that a kernel sees, and the pixels that it makes.

``A`` sums over batch and output positions ``q`` the outer products of patches ``x[i, q s + k d]`` (KFC,
Grosse & Martens 2016, section 3). A patch has C K features for the C channels of the input, so
writing all patches down takes K times the memory of the input, and is done only where they hardly overlap.
Otherwise see :mod:`thor_fx.passes.patch_gram`.

Legend: N batch, E groups, C channels of one group, K taps of the kernel, Q output positions, J taps at
a time.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import switches
from .geometry import Geometry, padded_input, positions_of, seen_by
from .nodes import shape
from .operands import Operand, Reduction, widened
from .patch_gram import patch_gram

WHOLE = 8  # blocks: fewer are cut from the whole, because convolutions of a few channels are slow


@dataclass(frozen=True)
class Pixels(Operand):
    """Every pixel of ``node`` (N, E C, *space) is a row of C features."""

    count_groups: int = 1

    @property
    def groups(self) -> int:
        """E."""
        return self.count_groups

    @property
    def features(self) -> int:
        """C."""
        return int(shape(self.node)[1]) // self.groups

    def read(self, *values: Tensor) -> Tensor:
        """(N Q, C) or (E, N Q, C)."""
        x = widened(values[0]).flatten(2)  # (N, E C, Q)
        if self.groups == 1:
            return x.mT.flatten(0, 1)
        return x.unflatten(1, (self.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)

    def gram(self, *values: Tensor) -> Tensor:
        """(C, C) or (E, C, C). Image by image, which needs no copy of the rows, where that is smaller."""
        x = widened(values[0]).flatten(2).unflatten(1, (self.groups, -1))  # (N, E, C, Q)
        if not (isinstance(x.shape[3], int) and self.features <= x.shape[3]):
            return super().gram(*values)
        found = (x @ x.mT).sum(0)
        return found if self.groups > 1 else found.squeeze(0)

    def blocks(self, size: int, *values: Tensor) -> Tensor:
        """(..., blocks, size, size), image by image where that is smaller."""
        x = widened(values[0]).flatten(2).unflatten(1, (self.groups, -1))  # (N, E, C, Q)
        if not (isinstance(x.shape[3], int) and size <= x.shape[3]):
            return super().blocks(size, *values)
        tiles = F.pad(x, (0, 0, 0, -self.features % size)).unflatten(2, (-1, size))
        found = (tiles @ tiles.mT).sum(0)
        return found if self.groups > 1 else found.squeeze(0)

    @property
    def batch_axes(self) -> tuple[int, ...]:
        """The first axis."""
        return (0,)

    @property
    def row_axes(self) -> tuple[int | None, ...]:
        """The first axis."""
        return (0,)

    def pool(self, reduction: Reduction, axis: int, *values: Tensor) -> Tensor:  # noqa: ARG002 - always 0
        """(N, C) or (E, N, C)."""
        x = widened(values[0]).flatten(2)
        return _by_group(x.mean(2) if reduction == "mean" else x.sum(2), self.groups)


@dataclass(frozen=True)
class Patches(Operand):
    """What the kernel sees at every output position of a convolution of ``node`` (N, E C, *space).

    Features are ordered as in ``weight.flatten(1)``: channel by channel, tap by tap.
    """

    count_groups: int
    geometry: Geometry
    positions: tuple[Any, ...]
    outputs: int

    @property
    def groups(self) -> int:
        """E."""
        return self.count_groups

    @property
    def features(self) -> int:
        """C K."""
        return int(shape(self.node)[1]) // self.groups * self.geometry.taps

    @property
    def rows(self) -> Any:
        """N Q."""
        return shape(self.node)[0] * math.prod(self.positions)

    def read(self, *values: Tensor) -> Tensor:
        """(N Q, C K) or (E, N Q, C K): all patches, written down."""
        seen = self._seen(self._padded(values[0]), range(self.geometry.taps))  # (N, E, C, K, Q)
        rows = seen.permute(1, 0, 4, 2, 3).flatten(3).flatten(1, 2)
        return rows if self.groups > 1 else rows.squeeze(0)

    def gram(self, *values: Tensor) -> Tensor:
        """(C K, C K) or (E, C K, C K), see the note at the top of this module."""
        if self._at_once(values[0]) >= self.geometry.taps:
            return super().gram(*values)
        found = self._correlated(values[0], self.groups)
        return found if self.groups > 1 else found.squeeze(0)

    def squares(self, *values: Tensor) -> Tensor:
        """(C K,) or (E, C K)."""
        x = self._padded(values[0])
        return self._by_tap([self._seen(x, [k]).square().sum((0, 3, 4)) for k in self._taps()])

    def blocks(self, size: int, *values: Tensor) -> Tensor:
        """(..., blocks, size, size). Blocks begin and end anywhere, so each is cut from whole channels."""
        x = values[0].unflatten(1, (self.groups, -1))
        windows = _windows(self.features, self.geometry.taps, size)
        if x.shape[2] <= WHOLE * windows.width:
            return _diagonal_blocks(self.gram(*values), size)
        missing = windows.starts[-1] + windows.width - x.shape[2]
        x = F.pad(x, (0, 0) * (x.dim() - 3) + (0, max(0, missing)))
        seen = torch.stack([x[:, :, first : first + windows.width] for first in windows.starts], 2)
        found = self._correlated(seen.flatten(1, 3), self.groups * len(windows.starts))
        found = found.unflatten(0, (self.groups, -1))  # (E, blocks, width K, width K)
        cut = [found[:, i, o : o + size, o : o + size] for i, o in enumerate(windows.offsets)]
        blocks = torch.stack(cut, 1)
        return blocks if self.groups > 1 else blocks.squeeze(0)

    def total(self, *values: Tensor) -> Tensor:
        """(C K,) or (E, C K)."""
        x = self._padded(values[0])
        return self._by_tap([self._seen(x, [k]).sum((0, 3, 4)) for k in self._taps()])

    def count(self, *values: Tensor) -> Tensor:
        """N Q."""
        x = self._padded(values[0])
        rows = x.shape[0] * math.prod(self._positions(x))
        return torch.full((), rows, dtype=x.dtype, device=x.device)

    @property
    def batch_axes(self) -> tuple[int, ...]:
        """The first axis."""
        return (0,)

    @property
    def row_axes(self) -> tuple[int | None, ...]:
        """The first axis."""
        return (0,)

    def pool(self, reduction: Reduction, axis: int, *values: Tensor) -> Tensor:  # noqa: ARG002 - always 0
        """(N, C K) or (E, N, C K)."""
        x = self._padded(values[0])
        sums = torch.stack([self._seen(x, [k]).sum((3, 4)) for k in self._taps()], -1)  # (N, E, C, K)
        if reduction == "mean":
            sums = sums / math.prod(self._positions(x))
        return _by_group(sums.flatten(1), self.groups)

    # --- slices ------------------------------------------------------------------------------------

    def _taps(self) -> range:
        return range(self.geometry.taps)

    def _by_tap(self, found: list[Tensor]) -> Tensor:
        """(E, C) of every tap as (C K,) or (E, C K)."""
        rows = torch.stack(found, -1).flatten(1)
        return rows if self.groups > 1 else rows.squeeze(0)

    def _padded(self, x: Tensor) -> Tensor:
        return padded_input(widened(x), self.geometry)

    def _positions(self, padded: Tensor) -> list[int]:
        return positions_of(padded, self.geometry)

    def _seen(self, padded: Tensor, taps: Any) -> Tensor:
        return seen_by(padded, self.geometry, taps, self.groups)

    # --- correlation -------------------------------------------------------------------------------

    def _at_once(self, x: Tensor) -> int:
        """J: as many taps as make a slice no larger than the input or the output of the convolution.

        Sizes of one image are numbers here, also where the size of the batch is a symbol.
        """
        spots = math.prod(map(int, self.positions))
        most = max(math.prod(map(int, x.shape[1:])), self.outputs * spots)
        return max(1, most // (int(shape(self.node)[1]) * spots))

    def _correlated(self, x: Tensor, groups: int) -> Tensor:
        """``sum_nq patch patch^T`` of every group: (groups, C K, C K)."""
        g = self.geometry
        sizes = [list(g.kernel), list(g.stride), list(g.padding), list(g.dilation), list(g.output_padding)]
        settings = (*sizes, g.transposed, self._at_once(x))
        return patch_gram(widened(x), groups, *settings, shifts=switches.is_on("shifts"))


class _Windows(NamedTuple):
    """The channels that the blocks of a factor lie in: ``width`` of them from each of ``starts``.

    Attributes:
        starts: the first channel of every block.
        offsets: where the block begins among the features of its channels.
        width: channels.
    """

    starts: list[int]
    offsets: list[int]
    width: int


def _windows(features: int, taps: int, size: int) -> _Windows:
    begins = range(0, features, size)
    starts = [begin // taps for begin in begins]
    offsets = [begin % taps for begin in begins]
    return _Windows(starts, offsets, max(-(-(offset + size) // taps) for offset in offsets))


def _diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """(..., F, F) as (..., blocks, size, size), the last one padded."""
    short = -matrix.shape[-1] % size
    tiles = F.pad(matrix, (0, short, 0, short)).unflatten(-1, (-1, size)).unflatten(-3, (-1, size))
    return tiles.diagonal(dim1=-4, dim2=-2).movedim(-1, -3).contiguous()


def _by_group(rows: Tensor, groups: int) -> Tensor:
    """(N, E F) as (E, N, F); one group has no axis."""
    return rows.unflatten(1, (groups, -1)).movedim(1, 0) if groups > 1 else rows
