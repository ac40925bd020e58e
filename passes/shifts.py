"""``A`` of a convolution whose kernel moves by one pixel, from shifts instead of pairs of taps.

Entry ``((i, k), (j, l))`` sums ``x[i, p] x[j, p + (l - k) d]`` over the pixels ``p`` that tap ``k`` sees: all
but some at the border. So most of it depends on the *shift* ``l - k`` only, and along an axis there are
``2 K - 1`` shifts, not ``K^2``. The pixels are cut into runs that a tap sees all of or none of: rows at the
top, those between, rows at the bottom, and so along every axis. With ``T(R)`` the sums over the pixels of a
run, for all shifts,

    A[k, l] = sum of T(R)[l - k] over the runs R that tap k sees.

A is symmetric, so shifts along the first axis that are negative are not needed. ``T`` is the weight
gradient of a convolution of ``x`` with itself; at the border there are so few pixels that a product of what
is written down is faster. A 3 x 3 kernel takes 15 sums over the image, each pixel once; from pairs of taps it
would be 81.

Legend: N batch, E groups, C channels of one group, K taps of the kernel, R runs.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import Geometry, in_parts, weight_gradient, windows


class Run(NamedTuple):
    """Neighbouring pixels along one axis, and the taps that see all of them: the others see none."""

    start: int
    length: int
    taps: range


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
    def runs(self) -> list[Run]:
        """All pixels that some tap sees, cut where a tap starts or stops to see them."""
        seen = [self._seen_by(tap) for tap in range(self.kernel)]
        cuts = sorted({edge for pixels in seen for edge in (pixels.start, pixels.stop)})
        runs = []
        for start, stop in itertools.pairwise(cuts):
            if taps := [k for k, pixels in enumerate(seen) if start in pixels]:
                runs.append(Run(start, stop - start, range(taps[0], taps[-1] + 1)))
        return runs

    def seen(self, like: Tensor) -> Tensor:
        """One where a tap sees a run, else zero: (K, R)."""
        taps = torch.arange(self.kernel, device=like.device)  # no copy from the host, which would wait
        columns = [(taps >= run.taps.start) & (taps < run.taps.stop) for run in self.runs]
        return torch.stack(columns, 1).to(like.dtype)

    def places(self, tap: int) -> tuple[slice, slice]:
        """Which taps ``l`` are wanted beside one, and their shifts from it."""
        if self.first:
            return slice(tap, None), slice(0, self.kernel - tap)
        return slice(None), slice(self.kernel - 1 - tap, 2 * self.kernel - 1 - tap)

    def beside(self, run: Run) -> tuple[range, int, int]:
        """The pixels that those of a run are multiplied with, and how many zeros on both sides."""
        start = run.start + self.shifts.start * self.dilation
        stop = run.start + run.length + (self.kernel - 1) * self.dilation
        inside = range(max(0, start), min(self.size, stop))
        return inside, inside.start - start, stop - inside.stop

    def _seen_by(self, tap: int) -> range:
        """The pixels that a tap sees; it also sees zeros beside them."""
        last = self.size + self.padding - (self.kernel - 1 - tap) * self.dilation
        return range(max(0, tap * self.dilation - self.padding), max(0, min(self.size, last)))


def axes_of(space: Sequence[int], g: Geometry) -> list[Axis]:
    """Of an input whose size along every axis is in ``space``."""
    sizes = zip(space, g.kernel, g.padding, g.dilation, strict=True)
    return [Axis(*each, first=i == 0) for i, each in enumerate(sizes)]


def shifts_pay(shape: Sequence[int], g: Geometry) -> bool:
    """Whether shifts take at most half the products of pairs of taps, in at most three times as many calls.

    Args:
        shape: of the input, (N, E C, *space).
        g: of the convolution.
    """
    if g.transposed or any(s != 1 for s in g.stride):
        return False
    axes = axes_of(shape[2:], g)
    shifts = math.prod(len(axis.shifts) for axis in axes)
    pixels = math.prod(axis.size for axis in axes)
    seen = math.prod(a.size + 2 * a.padding - a.dilation * (a.kernel - 1) for a in axes)
    calls = math.prod(len(axis.runs) for axis in axes)
    return 2 * shifts * pixels <= g.taps**2 * seen and 0 < calls <= 3 * g.taps


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
    every = itertools.product(*(axis.runs for axis in axes))
    by_run = torch.stack([_sums(x, groups, axes, runs) for runs in every])  # (R, E C, C, *shifts)
    seen = functools.reduce(torch.kron, [axis.seen(x) for axis in axes])  # (K, R)
    by_tap = (seen @ by_run.flatten(1)).view(-1, *by_run.shape[1:]).unflatten(1, (groups, channels))
    found = x.new_zeros(groups, channels, g.taps, channels, *g.kernel)
    for tap, place in enumerate(itertools.product(*map(range, g.kernel))):
        taps, shifts = zip(*(axis.places(k) for axis, k in zip(axes, place, strict=True)), strict=True)
        found[:, :, tap, :, *taps] = by_tap[tap, ..., *shifts]
    return found.flatten(4)


def _sums(x: Tensor, groups: int, axes: list[Axis], runs: tuple[Run, ...]) -> Tensor:
    """``sum_np x[i, p] x[j, p + shift]`` over the pixels of some runs: (E C, C, *shifts)."""
    pixels, every = math.prod(run.length for run in runs), math.prod(x.shape[2:])
    shifts, dilation = [len(axis.shifts) for axis in axes], [axis.dilation for axis in axes]
    sums = _sums_by_product if pixels * math.prod(shifts) <= every else _sums_by_convolution
    parts = in_parts(x) if 2 * pixels > every else (x,)
    found = (sums(*_pixels(part, axes, runs), shifts, dilation, groups) for part in parts)
    return functools.reduce(Tensor.add_, found)


def _pixels(x: Tensor, axes: list[Axis], runs: tuple[Run, ...]) -> tuple[Tensor, Tensor]:
    """Those of some runs, and those that they are multiplied with."""
    rows = beside = x
    margins: list[int] = []
    for i, (axis, run) in enumerate(zip(axes, runs, strict=True), start=2):
        inside, *zeros = axis.beside(run)
        rows = rows.narrow(i, run.start, run.length)
        beside = beside.narrow(i, inside.start, len(inside))
        margins = [*zeros, *margins]
    return rows, F.pad(beside, margins) if any(margins) else beside


def _sums_by_convolution(
    rows: Tensor, beside: Tensor, shifts: list[int], dilation: list[int], groups: int
) -> Tensor:
    return weight_gradient(rows, beside, shifts, (1,) * len(shifts), dilation, groups)


def _sums_by_product(
    rows: Tensor, beside: Tensor, shifts: list[int], dilation: list[int], groups: int
) -> Tensor:
    """The same for a few pixels: all that they are multiplied with is written down."""
    seen = windows(beside, groups, shifts, dilation, (1,) * len(shifts))  # (E, C, *shifts, N, *pixels)
    own = rows.unflatten(1, (groups, -1)).movedim(0, 2)  # (E, C, N, *pixels)
    found = own.flatten(2) @ seen.flatten(2 + len(shifts)).flatten(1, -2).mT
    return found.view(rows.shape[1], -1, *shifts)
