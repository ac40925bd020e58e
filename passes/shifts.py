"""``A`` of a convolution whose kernel moves by one pixel, from shifts instead of pairs of taps.

Entry ``((i, k), (j, l))`` sums ``x[i, p] x[j, p + (l - k) d]`` over the pixels ``p`` that tap ``k`` sees: all
but some at the border. So most of it depends on the *shift* ``l - k`` only, and along an axis there are
``2 K - 1`` shifts, not ``K^2``. With ``T(P)`` the same sums over a set ``P`` of pixels, for all shifts,

    A[k, l] = T(all)[l - k] - sum of T(r)[l - k] over the rows r that tap k does not see
                            - the same over columns + over the pixels where two such lines meet

and so on for three axes. A is symmetric, so shifts along the first axis that are negative are not needed.
Every ``T`` is the weight gradient of a convolution of ``x`` with itself. A 3 x 3 kernel takes 15 sums over
the image and as many over its border; from pairs of taps it would be 81 sums over the image.

Legend: N batch, E groups, C channels of one group, K taps of the kernel, S shifts.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import Geometry, in_parts, weight_gradient


class Line(NamedTuple):
    """Pixels along one axis: all (``border`` is False), or a single one that some tap does not see."""

    start: int
    length: int
    border: bool


@dataclass(frozen=True)
class Axis:
    """One spatial axis of the input and of the kernel.

    Attributes:
        first: whether only shifts of at least 0 are wanted.
    """

    size: int
    kernel: int
    padding: int
    dilation: int
    first: bool

    @property
    def shifts(self) -> range:
        """The shifts, in taps."""
        return range(0 if self.first else 1 - self.kernel, self.kernel)

    @property
    def lines(self) -> list[Line]:
        """All pixels, and those that some tap does not see, one by one."""
        seen_by_all = range(self._start(self.kernel - 1), self._stop(0))
        border = [p for p in range(self.size) if p not in seen_by_all]
        return [Line(0, self.size, border=False), *(Line(p, 1, border=True) for p in border)]

    def weights(self, line: Line, like: Tensor) -> Tensor:
        """With which factor the sums over a line enter the entry of a pair of taps: (S, K, K)."""
        shifts = torch.arange(self.shifts.start, self.shifts.stop, device=like.device)
        taps = torch.arange(self.kernel, device=like.device)
        chosen = taps - taps[:, None] == shifts[:, None, None]
        if not line.border:
            return chosen.to(like.dtype)
        start = (taps * self.dilation - self.padding).clamp_min(0)
        stop = (taps * self.dilation + self._stop(0)).clamp_max(self.size)
        unseen = (start > line.start) | (stop <= line.start)
        return -(chosen & unseen[:, None]).to(like.dtype)

    def window(self, x: Tensor, line: Line, axis: int) -> Tensor:
        """What the pixels of a line are multiplied with: ``x`` at all their shifts, zero outside."""
        start = line.start + self.shifts.start * self.dilation
        stop = line.start + line.length + (self.kernel - 1) * self.dilation
        inside = max(0, start), min(self.size, stop)
        x = x.narrow(axis, inside[0], inside[1] - inside[0])
        margins = [0, 0] * (x.dim() - 1 - axis) + [inside[0] - start, stop - inside[1]]
        return F.pad(x, margins) if any(margins) else x

    def _start(self, tap: int) -> int:
        return max(0, tap * self.dilation - self.padding)

    def _stop(self, tap: int) -> int:
        return min(self.size, self.size + self.padding - (self.kernel - 1 - tap) * self.dilation)


def axes_of(space: Sequence[int], g: Geometry) -> list[Axis]:
    """Of an input whose size along every axis is in ``space``."""
    sizes = zip(space, g.kernel, g.padding, g.dilation, strict=True)
    return [Axis(*each, first=i == 0) for i, each in enumerate(sizes)]


def shifts_pay(shape: Sequence[int], g: Geometry) -> bool:
    """Whether shifts take at most half the products of pairs of taps, in at most twice as many calls.

    Args:
        shape: of the input, (N, E C, *space).
        g: of the convolution.
    """
    if g.transposed or any(s != 1 for s in g.stride):
        return False
    axes = axes_of(shape[2:], g)
    shifts = math.prod(len(axis.shifts) for axis in axes)
    pixels = math.prod(axis.size + len(axis.lines) - 1 for axis in axes)
    seen = math.prod(a.size + 2 * a.padding - a.dilation * (a.kernel - 1) for a in axes)
    calls = math.prod(len(axis.lines) for axis in axes)
    return 2 * shifts * pixels <= g.taps**2 * seen and calls <= 2 * g.taps


def gram_by_shifts(x: Tensor, groups: int, g: Geometry) -> Tensor:
    """``sum_nq patch patch^T`` of every group, where the row of the second tap is no earlier.

    Args:
        x: (N, E C, *space).
        groups: E.
        g: of the convolution, with stride 1.

    Returns:
        (E, C, K, C, K), in the dtype of ``x``; zero elsewhere.
    """
    axes, channels = axes_of(x.shape[2:], g), x.shape[1] // groups
    found = x.new_zeros(x.shape[1] * channels, g.taps**2)
    for lines in itertools.product(*(axis.lines for axis in axes)):
        sums = _sums(x, groups, axes, lines)
        found.addmm_(sums.view(len(found), -1), _weights(axes, lines, x))
    return found.view(groups, channels, channels, g.taps, g.taps).transpose(2, 3)


def _weights(axes: list[Axis], lines: tuple[Line, ...], like: Tensor) -> Tensor:
    """(S, K K)."""
    found = like.new_ones(1, 1, 1)
    for axis, line in zip(axes, lines, strict=True):
        found = torch.kron(found, axis.weights(line, like))
    return found.flatten(1)


def _sums(x: Tensor, groups: int, axes: list[Axis], lines: tuple[Line, ...]) -> Tensor:
    """``sum_np x[i, p] x[j, p + shift]`` over the pixels of some lines: (E C, C, *shifts)."""
    parts = (x,) if any(line.border for line in lines) else in_parts(x)
    shifts, dilation = [len(axis.shifts) for axis in axes], [axis.dilation for axis in axes]
    total: Tensor | None = None
    for part in parts:
        rows = window = part
        for i, (axis, line) in enumerate(zip(axes, lines, strict=True), start=2):
            rows = rows.narrow(i, line.start, line.length)
            window = axis.window(window, line, i)
        found = weight_gradient(rows, window, shifts, (1,) * len(axes), dilation, groups)
        total = found if total is None else total.add_(found)
    assert total is not None, "there is a batch"
    return total
