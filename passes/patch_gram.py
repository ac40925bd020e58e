"""``A`` of a convolution without its patches: one operator, called in every factor step.

NOTE: [No patches in memory] Row ``(i, k)`` of ``A`` is ``sum_q x_k[i, q] x[j, q s + l d]``, where ``x_k`` is
the input as tap ``k`` sees it. That is the weight gradient of the same convolution with ``x_k`` as its
cotangent: one call for every tap (or several taps at a time, as long as their slices are no larger
than input or output). ``A`` is symmetric, so earlier rows of the kernel are left out. Where the kernel moves
by one pixel, most of these sums are the same, and :mod:`thor_fx.passes.shifts` needs a fraction of them.
Convolutions of few channels are slow on a CPU, which multiplies the patches of a few images at a time:
:mod:`thor_fx.passes.few_images`.

NOTE: [One operator] As nodes of the graph the slices would be fused into one kernel that writes them all at
once, which is all patches; and there would be many nodes.

Legend: N batch, E groups, C channels of one group, K taps of the kernel, J taps at a time, Q positions.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .few_images import gram_by_patches, images_at_once
from .geometry import Geometry, in_parts, padded_input, positions_of, seen_by, weight_gradient
from .shifts import gram_by_shifts, shifts_pay

FEW = 2  # channels: patches of so few are multiplied in less time than there are calls for shifts


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
    shifts: bool = True,
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
        shifts: whether shifts may be used where they pay.

    Returns:
        (E, C K, C K), in the dtype of ``x``.
    """
    sizes = (kernel, stride, padding, dilation, output_padding)
    geometry = Geometry(*(tuple(size) for size in sizes), transposed)  # type: ignore[arg-type,call-arg]
    images = images_at_once(x, groups, geometry, at_once)
    narrow = images and x.shape[1] <= FEW * groups
    if shifts and not narrow and shifts_pay(x.shape, geometry):
        return _mirrored(gram_by_shifts(x, groups, geometry), geometry)
    if images:
        upper = gram_by_patches(x, groups, geometry, images)
        return upper.triu() + upper.triu(1).mT
    return _mirrored(gram_by_taps(x, groups, geometry, at_once), geometry)


@patch_gram.register_fake
def result_of(x: Tensor, groups: int, kernel: list[int], *_settings: Any) -> Tensor:
    """Memory for the result, not written to."""
    side = x.shape[1] // groups * math.prod(kernel)
    return x.new_empty(groups, side, side)


def gram_by_taps(x: Tensor, groups: int, g: Geometry, at_once: int) -> Tensor:
    """One call for ``at_once`` taps: (E, C, K, C, K), where the row of the second tap is no earlier."""
    channels = x.shape[1] // groups
    found = x.new_zeros(groups, channels, g.taps, channels, g.taps)
    for part in in_parts(x):
        padded = padded_input(part, g)
        for taps in _chunks(range(g.taps), at_once):
            seen = seen_by(padded, g, taps, groups)  # (N, E, C, J, Q)
            first = taps[0] // g.row
            later = slice(first * g.row, None)
            found[:, :, taps.start : taps.stop, :, later] += _weight_gradient(padded, g, seen, first)
    return found


def _weight_gradient(padded: Tensor, g: Geometry, seen: Tensor, first: int) -> Tensor:
    """Without the first rows of taps: (E, C, J, C, K')."""
    n, groups, c, j, _ = seen.shape
    skipped = first * g.dilation[0]
    cotangent = seen.reshape(n, groups * c * j, *positions_of(padded, g))
    # in reverse order the first taps are the last that the plain convolution has
    window = padded.narrow(2, 0 if g.transposed else skipped, padded.shape[2] - skipped)
    kernel = g.kernel[0] - first, *g.kernel[1:]
    found = weight_gradient(cotangent, window, kernel, g.window_stride, g.dilation, groups)
    found = found.flatten(2)
    found = found.flip(2) if g.transposed else found
    return found.view(groups, c, j, c, -1)


def _mirrored(upper: Tensor, g: Geometry) -> Tensor:
    """(E, C K, C K), symmetric, from the pairs (E, C, K, C, K) whose second tap is in no earlier row."""
    rows = torch.arange(g.taps, device=upper.device) // g.row
    whole = upper.where((rows >= rows[:, None])[:, None], upper.permute(0, 3, 4, 1, 2))
    return whole.flatten(3).flatten(1, 2)


def _chunks(taps: range, size: int) -> Iterator[range]:
    return (taps[i : i + size] for i in range(0, len(taps), size))
