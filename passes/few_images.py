"""``A`` of a convolution on a CPU, from the patches of a few images at a time.

Patches of all images would take many times the memory of the input. Those of a few are no larger than the
input or the output, stay in a cache, and are multiplied as any other rows: half of ``x^T x``, panel by panel.
With many channels convolutions are faster than these products, see :mod:`thor_fx.passes.patch_gram`.

Legend: N batch, E groups, C channels of one group, K taps of the kernel, Q output positions.
"""

from torch import Tensor

from .geometry import PARTS, Geometry, padded_input, windows
from .panels import upper_panels

MANY = 64  # channels


def images_at_once(x: Tensor, groups: int, g: Geometry, at_once: int) -> int:
    """How many images have patches that are no larger than ``at_once`` taps of all; 0 where there are none.

    And where it is left to convolutions.
    """
    if x.device.type != "cpu" or x.shape[1] // groups >= MANY:
        return 0
    return min(-(-len(x) // PARTS), len(x) * at_once // g.taps)


def gram_by_patches(x: Tensor, groups: int, g: Geometry, images: int) -> Tensor:
    """``sum_nq patch patch^T`` of every group.

    Args:
        x: (N, E C, *space).
        groups: E.
        g: of the convolution.
        images: how many are taken together.

    Returns:
        (E, C K, C K), in the dtype of ``x``, on the diagonal and above it.
    """
    side = x.shape[1] // groups * g.taps
    found = x.new_zeros(groups, side, side)
    for part in x.split(images):
        patches = _patches(padded_input(part, g), groups, g)
        for rows, later in upper_panels(side):
            found[:, rows, later].baddbmm_(patches[:, rows], patches[:, later].mT)
    return found


def _patches(padded: Tensor, groups: int, g: Geometry) -> Tensor:
    """(E, C K, N Q)."""
    seen = windows(padded, groups, g.kernel, g.dilation, g.window_stride)
    axes = [*range(2, 2 + len(g.kernel))]
    seen = seen.flip(axes) if g.transposed else seen
    return seen.flatten(2 + len(axes)).flatten(1, -2)
