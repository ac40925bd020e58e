"""Where the kernel of a convolution looks, and what it sees there.

A transposed convolution is the plain one of its stuffed input, with the taps in reverse order.

Legend: N batch, E groups, C channels of one group, J taps at a time, Q output positions.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


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
    def row(self) -> int:
        """How many taps have the same place along the first axis."""
        return self.taps // self.kernel[0]

    @property
    def window_stride(self) -> tuple[int, ...]:
        """By how much the kernel moves over the (stuffed) input."""
        return (1,) * len(self.kernel) if self.transposed else self.stride

    @property
    def pointwise(self) -> bool:
        """Whether every patch is one pixel and every pixel one patch."""
        still = all(s == 1 for s in self.stride) and not any((*self.padding, *self.output_padding))
        return self.taps == 1 and still


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


def windows(
    x: Tensor, groups: int, kernel: Sequence[int], dilation: Sequence[int], stride: Sequence[int]
) -> Tensor:
    """All that a kernel sees of (N, E C, *space), everywhere: a view, (E, C, *kernel, N, *positions)."""
    x, axes = x.unflatten(1, (groups, -1)).movedim(0, 2), len(kernel)
    for axis, (k, d, s) in enumerate(zip(kernel, dilation, stride, strict=True), start=3):
        x = x.unfold(axis, d * (k - 1) + 1, s)[..., ::d]
    return x.movedim([*range(-axes, 0)], [*range(2, 2 + axes)])


PARTS = 8


def in_parts(x: Tensor) -> tuple[Tensor, ...]:
    """A batch in at most eight parts, to be taken in turn: convolutions copy what they are given."""
    return x.split(max(1, -(-len(x) // PARTS)))


def weight_gradient(
    cotangent: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """That of the convolution of ``x`` without padding: (E C', C, *kernel), contiguous.

    Args:
        cotangent: (N, E C', *positions).
        x: (N, E C, *space).
        kernel: its size along every axis.
        stride: of the convolution.
        dilation: of the kernel.
        groups: E.
    """
    none = (0,) * len(kernel)
    weight = x.new_empty(cotangent.shape[1], x.shape[1] // groups, *kernel)
    _, found, _ = torch.ops.aten.convolution_backward(
        cotangent, x, weight, None, stride, none, dilation, False, none, groups, [False, True, False]
    )
    return found.contiguous()
