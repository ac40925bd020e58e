"""By Cholesky factorisation of every damped block, which cannot fail silently.

A CPU's library is slow with small matrices, and fast with products of matrices, so a matrix is halved::

    M = [[A, B^T],  L = [[L_A,  0 ],  B_A = B L_A^-T,  S = D - B_A B_A^T  (the Schur complement)
         [B, D  ]]       [B_A, L_S]]

    M^-1 = [[A^-1 + X^T S^-1 X, -X^T S^-1],  X = B A^-1
            [        -S^-1 X,      S^-1  ]]

until what is left is small (Higham 2002, Accuracy and Stability of Numerical Algorithms, chapters 10 and 14).
``M`` is positive definite if and only if ``A`` and ``S`` are. ``S`` comes from the factor of ``A`` and not
from its inverse, whose error is that of the factor squared.

Legend: N matrices of side b.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .method import all_positive, diagonals
from .pair import pair_method

SMALL = 32  # no larger matrix is left to the library of a CPU; a GPU gets all of them whole


class Inverted(NamedTuple):
    """Damped matrices, taken apart.

    Attributes:
        root: the lower triangular factor, (N, b, b).
        inverse: (N, b, b).
        good: which of them have an inverse, (N,).
    """

    root: Tensor
    inverse: Tensor
    good: Tensor


def damped_inverse(matrices: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """``(M + d I)^-1`` of many symmetric positive semi-definite matrices, by Cholesky.

    ``cholesky_ex`` reports failure in a tensor, which survives compilation and needs no synchronisation;
    compiled ``cholesky`` does not.

    Args:
        matrices: shape (N, b, b).
        damping: broadcastable to (N, 1, 1).

    Returns:
        The inverses, shape (N, b, b), and which of them are good, a boolean tensor of shape (N,).
    """
    small = SMALL if matrices.device.type == "cpu" else matrices.shape[-1]
    _, inverse, good = _invert(matrices, damping, small)
    return inverse, good


def _invert(matrices: Tensor, damping: Tensor, small: int) -> Inverted:
    b = matrices.shape[-1]
    if b <= small:
        return _whole(matrices + damping * torch.eye(b, dtype=matrices.dtype, device=matrices.device))
    half = small * -(-b // (2 * small))
    below = matrices[:, half:, :half]
    first = _invert(matrices[:, :half, :half], damping, small)
    corner = torch.linalg.solve_triangular(first.root.mT, below, upper=True, left=False)
    schur = torch.baddbmm(matrices[:, half:, half:], corner, corner.mT, alpha=-1)
    second = _invert(schur, damping, small)
    x = below @ first.inverse
    side = second.inverse @ x
    top = torch.baddbmm(first.inverse, x.mT, side)
    return Inverted(
        _square(first.root, torch.zeros_like(below).mT, corner, second.root),
        _square(top, -side.mT, -side, second.inverse),
        first.good & second.good & _positive(top),
    )


def _square(top_left: Tensor, top_right: Tensor, bottom_left: Tensor, bottom_right: Tensor) -> Tensor:
    return torch.cat([torch.cat([top_left, top_right], -1), torch.cat([bottom_left, bottom_right], -1)], -2)


def _whole(damped: Tensor) -> Inverted:
    # the library reads and writes columns, and the matrices are symmetric: no copy has to turn them
    root, info = torch.linalg.cholesky_ex(damped.mT)
    factored = info == 0
    usable = torch.where(factored[:, None, None], root, torch.ones_like(root))
    inverse = torch.cholesky_inverse(usable).mT  # it raises on a zero pivot
    return Inverted(root, inverse, factored & _positive(inverse))


# NOTE: [The diagonal tells] An inverse is ``R^T R`` with ``R`` the inverse of the root, so each entry of its
# diagonal is the sum of the squares of a column of ``R``: finite if and only if the column is. An infinite
# entry of M's diagonal makes that of the inverse zero.
def _positive(inverse: Tensor) -> Tensor:
    return all_positive(diagonals(inverse))


CHOLESKY = pair_method(damped_inverse, flops=lambda b: b**3)  # b^3/3, and 2 b^3/3 for the inverse from it
