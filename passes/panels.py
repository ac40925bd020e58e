"""``x^T x`` on a CPU, without half of the work: one operator.

What lies on the diagonal and above it is computed panel by panel, and mirrored. With p panels that is
``(p + 1) / 2p`` of the work of a product, and two more passes over the result, which many rows make up for.
Results are symmetric to the last bit.

NOTE: [Panels in one call] As nodes of the graph the panels would be put together by a kernel that a compiler
has to write, build and run over all of the result; and it would have to know how many rows there are.

Legend: R rows, F features; any axes in front.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

PANEL = 96  # features
FEATURES = 256  # fewer make too few panels
WIDE = 512  # features: from here on as many rows are enough, if they are not rounded
ROWS = 4  # for every feature, else


def many(rows: int, features: int, dtype: torch.dtype) -> bool:
    """Whether there is so much to multiply that panels are faster than one product."""
    exact = dtype in {torch.float32, torch.float64}
    return rows >= (features if exact and features >= WIDE else ROWS * features)


def by_panels(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether ``x^T x`` of rows (..., R, F) multiplied in ``dtype`` is left to the operator.

    It looks at the rows again: a symbolic number counts as many here.
    """
    rows, features = x.shape[-2:]
    wide = x.device.type == "cpu" and isinstance(features, int) and features >= FEATURES
    return wide and (not isinstance(rows, int) or many(rows, features, dtype))


def result_of(x: Tensor) -> Tensor:
    """Memory for the result, not written to."""
    features = x.shape[-1]
    return x.new_empty((*x.shape[:-2], features, features))


@torch.library.custom_op("thor_fx::gram_by_panels", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def gram_by_panels(x: Tensor) -> Tensor:
    """``x^T x`` of rows (..., R, F), in their dtype: (..., F, F)."""
    rows, features = x.shape[-2:]
    return panel_by_panel(x) if many(rows, features, x.dtype) else x.mT @ x


gram_by_panels.register_fake(result_of)


def panel_by_panel(x: Tensor) -> Tensor:
    """What the operator does with many rows."""
    features, out = x.shape[-1], result_of(x)
    for panel, later in upper_panels(features):
        end = min(panel.stop, features)
        corner, beside = (x[..., panel].mT @ x[..., later]).split([end - panel.start, features - end], -1)
        out[..., panel, panel] = corner.triu() + corner.triu(1).mT
        out[..., panel, end:] = beside
        out[..., end:, panel] = beside.mT
    return out


def upper_panels(features: int) -> Iterator[tuple[slice, slice]]:
    """The rows of every panel, and the columns from its corner on."""
    return ((slice(start, start + PANEL), slice(start, None)) for start in range(0, features, PANEL))


def flops_of_panels(x: Tensor, **_result: Any) -> int:
    """Floating-point operations of the operator, where there are many rows."""
    features, rows = x.shape[-1], x.shape[:-1].numel()
    return sum(2 * rows * min(PANEL, width) * width for width in range(features, 0, -PANEL))
