"""By eigendecomposition of every block: ``(M + d I)^-1 = Q (D + d I)^-1 Q^T``.

The result is that of Cholesky. It costs more, and does not fail where rounding has made a semi-definite
matrix slightly indefinite and damping is smaller than that: negative eigenvalues of the size of rounding
errors count as zero.
"""

import torch
from torch import Tensor

from .method import all_positive
from .pair import pair_method

FLOPS_PER_CUBE = 9
"""Of one decomposition, about: ``9 b^3`` (Golub & Van Loan 2013, section 8.3)."""


def damped_inverse(matrices: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """``(M + d I)^-1`` of many symmetric positive semi-definite matrices, by eigendecomposition.

    Args:
        matrices: shape (N, b, b).
        damping: broadcastable to (N, 1, 1).

    Returns:
        The inverses, shape (N, b, b), and which of them are good, a boolean tensor of shape (N,).
    """
    values, vectors, good = decompose(matrices)
    reciprocal = 1 / (values + damping.squeeze(-1))
    good = good & all_positive(reciprocal)
    inverse = (vectors * reciprocal.unsqueeze(-2)) @ vectors.mT
    return inverse, good


def decompose(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues (N, b), in ascending order and not negative; eigenvectors (N, b, b); which are good (N,).

    A matrix is bad if it is not finite, or has an eigenvalue that is more negative than rounding makes it.
    """
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    usable = matrices.isfinite().all(dim=(-2, -1))
    values, vectors = torch.ops.thor_fx.eigh(torch.where(usable[:, None, None], matrices, eye))
    rounding = matrices.shape[-1] * torch.finfo(matrices.dtype).eps * values.abs().amax(-1, keepdim=True)
    good = usable & (values.isfinite() & (values >= -rounding)).all(-1) & vectors.isfinite().all(dim=(-2, -1))
    return values.clamp(min=0), vectors, good


# NOTE: [eigh raises] ``torch.linalg.eigh`` has no form that reports failure in a tensor: one matrix that does
# not converge raises for all of them, in a compiled graph too. So this is an operator that says NaN instead.


@torch.library.custom_op("thor_fx::eigh", mutates_args=())
def eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (N, b) and eigenvectors (N, b, b); NaN for a matrix that does not converge."""
    try:
        values, vectors = torch.linalg.eigh(matrices)
    except torch.linalg.LinAlgError:
        if len(matrices) == 1:
            return torch.full_like(matrices[:, 0], torch.nan), torch.full_like(matrices, torch.nan)
        pairs = [eigh(matrix) for matrix in matrices.split(1)]
        return torch.cat([values for values, _ in pairs]), torch.cat([vectors for _, vectors in pairs])
    return values, vectors.contiguous()


@eigh.register_fake
def _(matrices: Tensor) -> tuple[Tensor, Tensor]:
    return matrices.new_empty(matrices.shape[:-1]), matrices.new_empty(matrices.shape)


EIGEN = pair_method(damped_inverse, flops=lambda b: (FLOPS_PER_CUBE + 2) * b**3)
