"""By Newton's iteration, from matrix products alone: no factorisation (Schulz 1933; Higham 2008, ch. 7).

Let ``c`` bound the largest eigenvalue of ``M + d I``, so that those of ``Y = (M + d I) / c`` lie between
``l = d / c`` and 1. With ``X = I`` at first, every step squares the residual ``I - Y X``::

    X <- s X        s = 2 / (1 + l)           eigenvalues of Y X now lie around 1
    X <- 2 X - X Y X                          and now between 4 l / (1 + l)^2 and 1, the next l

The scale ``s`` (Pan & Schreiber 1991) makes the smallest eigenvalue grow by 4 and not by 2 in a
step. Rounding does not pile up, because every residual is formed from the matrix itself. (The *coupled*
form carries ``Y X`` along: as many products, and a larger error.)

The number of steps is fixed when the graph is traced: enough for ``d / c`` at :data:`FLOOR`. ``c`` is the
smaller of the trace and of the largest absolute row sum. Whatever has not converged then, be it that the
damping is smaller or that the matrix is too ill-conditioned for its dtype, keeps its previous inverse and
is counted: the test is ``|I - Y X|_F <= TOLERANCE``.

NOTE: [Not symmetric] ``X`` is symmetric up to rounding, and that rounding must stay where it is: it is small
in ``I - Y X`` and large in ``I - X Y``. Hence ``X`` times a gradient is accurate in every eigendirection, the
sharp ones included, and ``(X + X^T) / 2`` would not be. Gradients are multiplied by ``X`` from the left on
either side (:func:`thor_fx.blocks.precondition`).
"""

import torch
from torch import Tensor

from .method import diagonals
from .pair import pair_method

FLOOR = {torch.float32: 1e-6, torch.float64: 1e-9}
"""The smallest damping, relative to the bound ``c``, that the number of steps is made for."""

TOLERANCE = {torch.float32: 0.1, torch.float64: 1e-6}
"""The largest residual of an inverse that counts as one."""


def steps(dtype: torch.dtype) -> int:
    """How many steps bring the floor to the rounding error of a dtype.

    Example:
        >>> steps(torch.float32), steps(torch.float64)
        (14, 20)
    """
    smallest, count = FLOOR[dtype], 0
    while 1 - smallest > torch.finfo(dtype).eps:
        smallest, count = 4 * smallest / (1 + smallest) ** 2, count + 1
    return count


def damped_inverse(matrices: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """``(M + d I)^-1`` of many symmetric positive semi-definite matrices, by Newton's iteration.

    Args:
        matrices: shape (N, b, b), float32 or float64.
        damping: broadcastable to (N, 1, 1), positive.

    Returns:
        The inverses, shape (N, b, b), and which of them are good, a boolean tensor of shape (N,).
    """
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    damped = matrices + damping * eye
    bound = _bound(damped)
    smallest = damping / bound
    y = damped / bound
    x = eye.expand_as(y)  # never x + x.mT: see NOTE: [Not symmetric]
    for _ in range(steps(matrices.dtype)):
        x = x * (2 / (1 + smallest))
        x = torch.baddbmm(x, x, y @ x, beta=2, alpha=-1)
        smallest = 4 * smallest / (1 + smallest) ** 2
    residual = torch.linalg.matrix_norm(eye - y @ x)
    inverse = x / bound
    good = (residual <= TOLERANCE[matrices.dtype]) & inverse.isfinite().all(dim=(-2, -1))  # a NaN is neither
    return inverse, good


def _bound(damped: Tensor) -> Tensor:
    """At least the largest eigenvalue, and no square that may overflow: (N, 1, 1)."""
    trace = diagonals(damped).sum(-1)
    return trace.minimum(damped.abs().sum(-1).amax(-1))[:, None, None]


# two products in every step, and one for the residual; float64 takes more steps
NEWTON_SCHULZ = pair_method(
    damped_inverse,
    flops=lambda b: (4 * steps(torch.float32) + 2) * b**3,
    symmetric=False,  # see NOTE: [Not symmetric]
)
