"""Adam (Kingma & Ba 2015), as ``torch.optim.Adam`` computes it.

::

    m = b1 m + (1 - b1) g         v = b2 v + (1 - b2) g^2
    u = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

``t`` counts the steps in which the parameter had a gradient. With decoupled weight decay and a learning
rate behind it, this is AdamW (Loshchilov & Hutter 2019).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .layers import Coverage
from .precision import wide
from .transform import Params, Signals, Transform, Updates

BETAS = 0.9, 0.999  # as in torch
EPS = 1e-8


class AdamState(NamedTuple):
    """Running averages of the gradient and of its square, and the steps so far, by parameter."""

    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]
    step: dict[str, Tensor]


def adam() -> Transform:
    """The step of Adam with learning rate 1, upward."""

    def init(params: Params, _: Coverage) -> AdamState:
        counts = {name: torch.zeros((), dtype=wide(p), device=p.device) for name, p in params.items()}
        mean, square = ({name: torch.zeros_like(p) for name, p in params.items()} for _ in range(2))
        return AdamState(mean, square, counts)

    def update(
        updates: Updates, state: AdamState, _params: Params, _signals: Signals
    ) -> tuple[Updates, AdamState]:
        b1, b2 = BETAS
        means = {name: b1 * state.exp_avg[name] + (1 - b1) * g for name, g in updates.items()}
        squares = {name: b2 * state.exp_avg_sq[name] + (1 - b2) * g**2 for name, g in updates.items()}
        counts = {name: state.step[name] + 1 for name in updates}
        new = {
            name: means[name] / (1 - b1**t) / ((squares[name] / (1 - b2**t)).sqrt() + EPS)
            for name, t in counts.items()
        }
        # NOTE: an infinite average would stop its number for good; so this step is none (skip_nonfinite)
        new = {name: torch.where(squares[name].isfinite(), u, torch.nan) for name, u in new.items()}
        kept = zip(state, (means, squares, counts), strict=True)
        return new, AdamState(*({**old, **changed} for old, changed in kept))

    return Transform(init, update)
