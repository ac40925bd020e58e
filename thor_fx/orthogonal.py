"""Steps whose matrices are orthogonal: all directions that a preconditioned update has, at one length.

With the singular values ``U = P S Q^T`` of a layer's update, an (out, in) matrix with the column of a joint
bias, the step is ``P Q^T sqrt(max(1, out / in))``, up to the accuracy of the iteration: Muon's step (Jordan
et al. 2024), from the natural gradient in place of the gradient. Where ``step_norm="spectral"`` has the right
Frobenius norm and a few of the directions take most of it, here each of them has its share. ``P Q^T``
is what a bound on the spectral norm of the step asks for (Bernstein & Newhouse 2024).

The iteration is Muon's, with its coefficients, which trade accuracy for speed:

    X <- a X + (b X X^T + c (X X^T)^2) X

It starts from ``U / |U U^T|^(1/2)``, which bounds singular values as ``U / |U|`` does, and more closely (four
times, where 256 of them are equal); ``X X^T`` is needed anyhow. So three steps bring what is above a fiftieth
of the bound into [0.68, 1.2], where Muon takes five.

Products are in bfloat16 as in Muon; those of float64 stay in float64.

Where a layer has groups (a grouped convolution, experts), each of its matrices is orthogonal. A zero stays
zero. What belongs to no layer is left alone.

Legend: L matrices of one shape, of one layer or of several.
"""

import torch
from torch import Tensor

from .matrices import matrices, norm, put_back, unit
from .portions import portions
from .refresh import by_shape, spans
from .transform import Params, Signals, Transform, Updates, stateless

COEFFICIENTS = 3.4445, -4.7750, 2.0315  # a, b, c
STEPS = 3


def orthogonalize() -> Transform:
    """Give the matrices of every layer singular values near ``sqrt(max(1, out / in))``."""

    def update(updates: Updates, params: Params, signals: Signals) -> Updates:
        new = dict(updates)
        for layers in by_shape(signals.coverage, params).values():
            present = [layer for layer in layers if layer.param in updates]
            if not present:
                continue
            for few in portions(present, updates[present[0].param]):
                steps = _steps(torch.cat([matrices(layer, updates) for layer in few]))
                for layer, place in zip(few, spans(few), strict=True):
                    put_back(layer, steps[place], new)
        return new

    return stateless(update)


def _steps(stacked: Tensor) -> Tensor:
    """(L, out, in)."""
    out, in_ = stacked.shape[-2:]
    wide = stacked if out <= in_ else stacked.mT
    steps = newton_schulz(unit(wide).to(_working(stacked.dtype))).to(stacked.dtype)
    return (steps if out <= in_ else steps.mT) * max(1.0, out / in_) ** 0.5


def newton_schulz(wide: Tensor) -> Tensor:
    """The nearly orthogonal matrices along (L, out, in), where ``out <= in``; no square may overflow."""
    a, b, c = COEFFICIENTS
    gram = wide @ wide.mT
    bound = norm(gram)
    bound = torch.where(bound > 0, bound, torch.ones_like(bound))
    x, gram = wide / bound.sqrt(), gram / bound
    for step in range(STEPS):
        gram = gram if step == 0 else x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _working(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.bfloat16
