"""Operands of convolutions: the patches that a kernel sees, and the pixels that it makes.

``A`` sums over batch and output positions ``q`` the outer products of patches ``x[i, q s + k d]`` (KFC,
Grosse & Martens 2016, section 3). A patch has C K features for the C channels of the input, so
writing all patches down takes K times the memory of the input.

NOTE: [No patches in memory] Row ``(i, k)`` of ``A`` is ``sum_q x_k[i, q] x[j, q s + l d]``, where ``x_k`` is
the input as tap ``k`` sees it. That is the weight gradient of the same convolution with ``x_k`` as its
cotangent: one call for every tap (or several taps at a time, as long as their slices are no larger
than input or output). Where patches hardly overlap, they are simply written down.

Legend: N batch, E groups, C channels of one group, K taps of the kernel, Q output positions, J taps at
a time. A transposed convolution is the plain one of its stuffed input, with the taps in reverse order.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .nodes import shape
from .operands import Operand, Reduction, widened


@dataclass(frozen=True)
class Geometry:
    """Where a kernel looks: one entry for every spatial axis."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    transposed: bool

    @property
    def taps(self) -> int:
        """K."""
        return math.prod(self.kernel)

    @property
    def window_stride(self) -> tuple[int, ...]:
        """By how much the kernel moves over the (stuffed) input."""
        return (1,) * len(self.kernel) if self.transposed else self.stride

    @property
    def pointwise(self) -> bool:
        """Whether every patch is one pixel and every pixel one patch."""
        still = all(s == 1 for s in self.stride) and not any((*self.padding, *self.output_padding))
        return self.taps == 1 and still


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

    @property
    def batch_axes(self) -> tuple[int, ...]:
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
        """(..., blocks, size, size) of whole channels: ``size`` is a multiple of K."""
        channels = size // self.geometry.taps
        x = values[0].unflatten(1, (self.groups, -1))
        pad = -x.shape[2] % channels
        x = F.pad(x, (0, 0) * (x.dim() - 3) + (0, pad)).flatten(1, 2)
        found = self._correlated(x, x.shape[1] // channels)
        return found.unflatten(0, (self.groups, -1)) if self.groups > 1 else found

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
        """J: as many taps as make a slice no larger than the input or the output of the convolution."""
        channels, spots = shape(self.node)[1], math.prod(self.positions)
        return max(1, max(math.prod(x.shape[1:]), self.outputs * spots) // (channels * spots))

    def _correlated(self, x: Tensor, groups: int) -> Tensor:
        """``sum_nq patch patch^T`` of every group: (groups, C K, C K)."""
        g = self.geometry
        sizes = [list(g.kernel), list(g.stride), list(g.padding), list(g.dilation), list(g.output_padding)]
        found: Tensor = torch.ops.thor_fx.patch_gram(
            widened(x), groups, *sizes, g.transposed, self._at_once(x)
        )
        return found


# NOTE: [One operator] The loop below is an operator of its own. As nodes of the graph its slices would be
# fused into one kernel that writes them all at once, which is all patches; and there would be many nodes.


@torch.library.custom_op("thor_fx::patch_gram", mutates_args=())
def patch_gram(
    x: Tensor,
    groups: int,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    output_padding: list[int],
    transposed: bool,
    at_once: int,
) -> Tensor:
    """``sum_nq patch patch^T`` of every group, by correlation.

    Args:
        x: (N, E C, *space).
        groups: E.
        kernel: its size, and so the next four, along every spatial axis.
        stride: of the convolution.
        padding: on both sides.
        dilation: of the kernel.
        output_padding: of a transposed convolution.
        transposed: whether it is one.
        at_once: how many taps are taken together.

    Returns:
        (E, C K, C K), in the dtype of ``x``.
    """
    sizes = (kernel, stride, padding, dilation, output_padding)
    geometry = Geometry(*(tuple(size) for size in sizes), transposed)  # type: ignore[arg-type,call-arg]
    side = x.shape[1] // groups * geometry.taps
    found = x.new_zeros(groups, side, side)
    for part in x.split(max(1, -(-x.shape[0] // PARTS))):
        padded = padded_input(part, geometry)
        bands = []
        for taps in _chunks(range(geometry.taps), at_once):
            seen = seen_by(padded, geometry, taps, groups)  # (N, E, C, J, Q)
            bands.append(_weight_gradient(padded, geometry, seen))  # (E, C, J, C K)
        found += torch.cat(bands, 2).flatten(1, 2)
    return found


@patch_gram.register_fake
def _(x: Tensor, groups: int, kernel: list[int], *_settings: Any) -> Tensor:
    side = x.shape[1] // groups * math.prod(kernel)
    return x.new_empty(groups, side, side)


PARTS = 8  # of the batch, one after the other


def _weight_gradient(padded: Tensor, g: Geometry, seen: Tensor) -> Tensor:
    n, groups, c, j, _ = seen.shape
    axes = len(g.kernel)
    cotangent = seen.reshape(n, groups * c * j, *positions_of(padded, g))
    weight = padded.new_empty(groups * c * j, c, *g.kernel)
    _, found, _ = torch.ops.aten.convolution_backward(
        cotangent, padded, weight, None, g.window_stride, (0,) * axes, g.dilation,
        False, (0,) * axes, groups, [False, True, False],
    )  # fmt: skip
    found = found.flatten(2)
    found = found.flip(2) if g.transposed else found
    return found.reshape(groups, c, j, -1)


def padded_input(x: Tensor, g: Geometry) -> Tensor:
    """The input on which the convolution is one without padding (and, if transposed, stride)."""
    if not g.transposed:
        return F.pad(x, [p for p in reversed(g.padding) for _ in (0, 1)])
    for axis, stride in enumerate(g.stride, start=2):
        if stride > 1:  # zeros between the pixels
            size = x.shape[axis]
            x = F.pad(x.unsqueeze(axis + 1), [0, 0] * (x.dim() - axis - 1) + [0, stride - 1])
            x = x.flatten(axis, axis + 1).narrow(axis, 0, (size - 1) * stride + 1)
    margins = []
    for k, p, d, o in zip(g.kernel, g.padding, g.dilation, g.output_padding, strict=True):
        margins.append((d * (k - 1) - p, d * (k - 1) - p + o))
    return F.pad(x, [m for pair in reversed(margins) for m in pair])


def positions_of(padded: Tensor, g: Geometry) -> list[int]:
    """How many places a kernel has along every axis."""
    axes = zip(padded.shape[2:], g.kernel, g.dilation, g.window_stride, strict=True)
    return [(size - d * (k - 1) - 1) // s + 1 for size, k, d, s in axes]


def seen_by(padded: Tensor, g: Geometry, taps: Any, groups: int) -> Tensor:
    """The input as some taps see it: (N, E, C, J, Q)."""
    offsets = list(itertools.product(*map(range, g.kernel)))
    offsets = offsets[::-1] if g.transposed else offsets
    x, positions = padded.unflatten(1, (groups, -1)), positions_of(padded, g)
    seen = [_slice(x, g, positions, offsets[k]).flatten(3) for k in taps]
    return torch.stack(seen, 3) if len(seen) > 1 else seen[0].unsqueeze(3)  # one is not copied again


def _slice(x: Tensor, g: Geometry, positions: list[int], offset: tuple[int, ...]) -> Tensor:
    axes = zip(offset, g.dilation, g.window_stride, positions, strict=True)
    for axis, (k, d, s, q) in enumerate(axes, start=3):
        x = x[(slice(None),) * axis + (slice(k * d, k * d + s * (q - 1) + 1, s),)]
    return x


def _chunks(taps: range, size: int) -> Iterator[range]:
    return (taps[i : i + size] for i in range(0, len(taps), size))


def _by_group(rows: Tensor, groups: int) -> Tensor:
    """(N, E F) as (E, N, F); one group has no axis."""
    return rows.unflatten(1, (groups, -1)).movedim(1, 0) if groups > 1 else rows
