"""What a factor loses when only the blocks of its diagonal are kept (Chen et al. 2021).

With ``A`` the factor and ``B`` its blocks, both as dense matrices::

    loss = 1 - sqrt(lmax(B B^T) / lmax(A A^T)) = 1 - |B|_2 / |A|_2

where ``|.|_2`` is the spectral norm: for a symmetric matrix its largest eigenvalue in absolute value, and for
a block-diagonal one the largest over the blocks. It is 0 where nothing is cut, and grows as blocks shrink.

Legend: L matrices of one shape, F equal blocks along the diagonal, b their side.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import blocks


def spectral_losses(matrices: Tensor, block_sizes: Sequence[int]) -> Tensor:
    """The loss of symmetric matrices at every block size.

    Args:
        matrices: shape (L, d, d), finite.
        block_sizes: C sides of blocks.

    Returns:
        Shape (L, C); a matrix of zeros loses nothing.

    Example:
        >>> ones = torch.ones(1, 8, 8)  # lmax = 8, and b for a block of b
        >>> [round(loss, 3) for loss in spectral_losses(ones, [1, 2, 4, 8])[0].tolist()]
        [0.875, 0.75, 0.5, 0.0]
    """
    exact = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
    whole = _norm(exact)  # (L,)
    kept = [whole if b >= matrices.shape[-1] else _norm_of_blocks(exact, b) for b in block_sizes]
    ratios = torch.stack(kept, -1) / whole.unsqueeze(-1)
    return torch.where(whole.unsqueeze(-1) > 0, 1 - ratios, 0.0).clamp(min=0.0)


def _norm_of_blocks(matrices: Tensor, block_size: int) -> Tensor:
    parts = blocks.diagonal_blocks(matrices, block_size)  # (L, F, b, b) each
    return torch.stack([_norm(part).amax(1) for part in parts]).amax(0)


def _norm(matrices: Tensor) -> Tensor:
    if matrices.shape[-1] == 1:  # thousands of numbers, and not thousands of eigenvalue problems
        return matrices[..., 0, 0].abs()
    return torch.linalg.eigvalsh(matrices).abs().amax(-1)
