"""Damped inverses that cannot fail silently."""

import torch
from torch import Tensor


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


def damped_reciprocal(diagonals: Tensor, damping: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
    """``1 / (d + damping)`` of the diagonals of many diagonal matrices.

    A matrix that has no finite inverse keeps its previous one.

    Args:
        diagonals: shape (N, d).
        damping: broadcastable to (N, 1).
        previous: the last good inverses, shape (N, d).

    Returns:
        The inverses, shape (N, d), and how many matrices failed, an int64 0-D tensor.
    """
    inverse = 1 / (diagonals + damping)
    good = (inverse.isfinite() & (inverse > 0)).all(-1)
    return torch.where(good[:, None], inverse, previous), (~good).sum()
