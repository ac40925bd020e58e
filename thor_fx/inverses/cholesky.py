"""By Cholesky factorisation of every damped block, which cannot fail silently."""

import torch
from torch import Tensor

from .pair import pair_method


def damped_inverse(matrices: Tensor, damping: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
    """``(M + d I)^-1`` of many symmetric positive semi-definite matrices, by Cholesky.

    A matrix that has no finite inverse keeps its previous one. ``cholesky_ex`` reports failure in a
    tensor, which survives compilation and needs no synchronisation; compiled ``cholesky`` does not.

    Args:
        matrices: shape (N, b, b).
        damping: broadcastable to (N, 1, 1).
        previous: the last good inverses, shape (N, b, b).

    Returns:
        The inverses, shape (N, b, b), and how many of them failed, an int64 0-D tensor.
    """
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    damped = matrices + damping * eye
    usable = damped.isfinite().all(dim=(-2, -1))
    root, info = torch.linalg.cholesky_ex(torch.where(usable[:, None, None], damped, eye))
    usable &= info == 0
    inverse = torch.cholesky_inverse(torch.where(usable[:, None, None], root, eye))  # raises on a zero pivot
    good = usable & inverse.isfinite().all(dim=(-2, -1))
    return torch.where(good[:, None, None], inverse, previous), (~good).sum()


CHOLESKY = pair_method(damped_inverse, flops=lambda b: b**3)  # b^3/3, and 2 b^3/3 for the inverse from it
