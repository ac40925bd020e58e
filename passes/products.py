"""Products of rows with themselves: where nearly all of the work of a factor step is.

``x^T x`` is symmetric, so half of a general product of matrices is wasted on it. On a CPU, long sides are
cut into panels (:mod:`thor_fx.passes.panels`). A GPU is slower with a few small products than with a large
one: there, one kernel of our own leaves the half out where tensor cores multiply
(:mod:`thor_fx.passes.symmetric` says where), and else it is one product.

Legend: R rows, F features; any axes in front.
"""

import torch
from torch import Tensor

from . import switches
from .panels import by_panels, gram_by_panels
from .symmetric import by_kernel, gram_by_kernel


def gram(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``x^T x`` of rows (..., R, F): (..., F, F).

    Args:
        x: the rows.
        dtype: what the rows are rounded to for the product; None: as they are.
    """
    if not switches.is_on("symmetric_products"):
        return product(x.mT, x, dtype)
    rounded = x.dtype if dtype is None or x.dtype == torch.float64 else dtype
    if by_kernel(x, rounded):
        return gram_by_kernel(x.to(rounded)).to(x.dtype)
    if by_panels(x, rounded):
        return gram_by_panels(x.to(rounded)).to(x.dtype)
    return product(x.mT, x, dtype)


def block_grams(x: Tensor, size: int, dtype: torch.dtype | None = None) -> Tensor:
    """The blocks of the diagonal of ``x^T x``, the last one padded: (..., blocks, size, size).

    What lies beside the blocks is never computed.
    """
    tiles = torch.nn.functional.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))
    tiles = tiles.transpose(-3, -2)  # (..., blocks, R, size)
    return product(tiles.mT, tiles, dtype)


def product(left: Tensor, right: Tensor, dtype: torch.dtype | None) -> Tensor:
    """``left @ right`` of inputs rounded to ``dtype``, summed and returned in the dtype that they have.

    NOTE: [Sums of rounded inputs] A GPU sums in float32 and returns that. A CPU sums in float32 and rounds
    the sum once more.
    """
    if dtype is None or left.dtype == torch.float64:
        return left @ right
    a, b = left.to(dtype), right.to(dtype)
    if not a.is_cuda:
        return (a @ b).to(left.dtype)
    if a.dim() == 2:
        return torch.mm(a, b, out_dtype=left.dtype)
    a, b = torch.broadcast_tensors(a, b) if a.shape[:-2] != b.shape[:-2] else (a, b)
    found = torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out_dtype=left.dtype)
    return found.unflatten(0, left.shape[:-2])
