"""What becomes of a block ``M`` that has no inverse with its damping ``d``.

It keeps its last good inverse. One that never had any gets that of a diagonal matrix::

    D = diag(sum_j |M_ij|) + d I          D^-1 g is the first-order direction, entry by entry

``D >= M + d I``, because no row of the difference has a diagonal entry below the sum of the others
(Gershgorin; Horn & Johnson 2013, theorem 6.1.10): the step is never longer than the natural one would be. A
row of zeros has no gradient, and gets 0. Where a sum is infinite or NaN there is no bound, and no step is
known to be short enough: the block stands still.

At its next attempts it is damped by more, as long as they fail::

    10^k max(d, FLOOR tr M)               k: failures in a row, at most MOST

The floor is what makes a damping of nothing, or of little beside ``M``, grow. A block that was not finite is
no matter of damping, and does not count.

Legend: N blocks of side b, or diagonals of length b; L matrices with U of either in each.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .method import diagonals, over

GOOD = 1
"""How an attempt has ended: there is an inverse. 0: there was no attempt."""

FAILED = 2
"""There is none with this damping."""

NOT_FINITE = 3
"""There is no block, but NaN or infinity."""

FLOOR = 1e-7
"""The least damping beside the trace that a second attempt begins from: about the rounding of float32."""

MOST = 4
"""So many failures in a row count: damping grows by 10^4 at most."""


def strength(parts: Tensor, damping: Tensor, failing: Tensor) -> Tensor:
    """The damping of the next attempt, (N,).

    Args:
        parts: blocks (N, b, b), or diagonals (N, b).
        damping: by the user's rule, (N,).
        failing: how often every block has failed in a row, (N,).
    """
    diagonal = parts if parts.dim() == 2 else diagonals(parts)
    more = 10.0**failing * torch.maximum(damping, FLOOR * diagonal.sum(-1))
    return torch.where(failing > 0, more, damping)


def bounds(parts: Tensor) -> Tensor:
    """The diagonals of matrices that are no smaller, (N, b)."""
    return parts.abs() if parts.dim() == 2 else parts.abs().sum(-1)


def ended(good: Tensor, above: Tensor) -> Tensor:
    """How attempts have ended, from which are good and the bounds: (N,)."""
    bad = torch.where(above.isfinite().all(-1), FAILED, NOT_FINITE)
    return torch.where(good, GOOD, bad)


def first_order(above: Tensor, damping: Tensor) -> Tensor:
    """``D^-1``, from the bounds (N, b) and the damping (N,); 0 where it would not be finite."""
    inverse = 1 / (above + damping[:, None])
    usable = over(above.isfinite().all(-1), inverse) & inverse.isfinite()
    return torch.where(usable, inverse, torch.zeros_like(inverse))


def in_a_row(failing: Tensor, outcomes: Tensor) -> Tensor:
    """How often every block has failed in a row, (L, U), after some attempts."""
    failed = torch.where(outcomes == FAILED, (failing + 1).clamp(max=MOST), failing)
    return torch.where(outcomes == GOOD, torch.zeros_like(failing), failed)


def by_matrix(outcomes: Sequence[Tensor], like: Tensor) -> Tensor:
    """How the attempts at all blocks of L matrices have ended, (L, U); nothing can go wrong with nothing."""
    if not outcomes:
        return torch.full_like(like, GOOD)
    return torch.cat([part.reshape(len(like), -1) for part in outcomes], 1)
