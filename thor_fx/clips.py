"""Bounds on all updates together.

* **Global norm** (Pascanu et al. 2013): ``U min(1, c / |U|)`` with ``|U|`` over all parameters.
* **KL**: a step ``-lr U`` changes the model's predictions by about ``lr^2 U^T F U / 2`` in Kullback-Leibler
  divergence. With ``U = F^-1 g``, ``U^T F U = <U, g>``, so that ``U min(1, sqrt(kappa / (lr^2 <U, g>)))``
  keeps twice the divergence below ``kappa`` (Ba et al. 2017, section 5).

Both look at all groups of parameters: splitting one group into two alike changes nothing.
"""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .layers import Coverage
from .precision import wide
from .schedule import Schedule
from .transform import (
    Hyper,
    Params,
    Signals,
    State,
    Taken,
    Transform,
    Updates,
    after,
    shrunk,
    stateless,
    within,
)

Clip = Literal["tensor", "global"]


def clip_by_global_norm(largest: float) -> Transform:
    """Scale all updates together down to an L2 norm of at most ``largest``."""

    def clip(updates: Updates, _params: Params, signals: Signals) -> Updates:
        norms = [torch.linalg.vector_norm(u, dtype=wide(u)) for u in updates.values()]
        norm = _together(norms, signals)
        return {name: shrunk(u, within(norm, largest)) for name, u in updates.items()}

    return stateless(clip)


def _together(norms: list[Tensor], signals: Signals) -> Tensor:
    if signals.world is None:
        return torch.linalg.vector_norm(torch.stack(norms))
    return signals.total([norm.square() for norm in norms]).sqrt()


class KLState(NamedTuple):
    """State of :func:`clip_by_kl`.

    Attributes:
        inner: that of the preconditioner.
        kl: twice the divergence that the last step would have had without the clip, 0-D.
    """

    inner: State
    kl: Tensor


def clip_by_kl(
    preconditioner: Transform,
    kappa: float,
    schedules: Mapping[str, Schedule],
    lr: Callable[[Hyper, str], Tensor | float],
    loss_scale: float = 1.0,
) -> Transform:
    """``preconditioner``, with all its updates scaled by ``min(1, sqrt(kappa / sum lr^2 <U, g>))``.

    The sum runs over what belongs to a layer: the rest has no ``F``. ``g`` is what the preconditioner
    is given (a gradient, or an average of gradients), so that the sum is never negative.

    Args:
        preconditioner: ``U`` from ``g``.
        kappa: the bound.
        schedules: what ``lr`` reads.
        lr: ``(hyper-parameters, name of a parameter) -> its learning rate``.
        loss_scale: the gradients carry it, and ``U`` does not.
    """

    def init(params: Params, coverage: Coverage) -> KLState:
        some = next(iter(params.values()))
        unknown = torch.zeros((), dtype=wide(some), device=some.device)
        return KLState(preconditioner.init(params, coverage), unknown)

    def update(updates: Updates, state: KLState, params: Params, signals: Signals) -> tuple[Updates, KLState]:
        new, inner = preconditioner.update(updates, state.inner, params, signals)
        terms = [
            lr(signals.hyper, name) ** 2 * (u.to(wide(u)) * updates[name]).sum()
            for name, u in new.items()
            if name in signals.coverage.preconditioned
        ]
        if not terms and signals.world is None:
            return new, state._replace(inner=inner)
        square = signals.total(terms) / loss_scale
        small = square <= kappa  # also where rounding makes it negative
        scale = torch.where(small, torch.ones_like(square), (kappa / square).sqrt())
        scale = torch.where(square.isinf(), torch.nan, scale)  # as in thor_fx.transform.within
        clipped = {name: shrunk(u, scale) for name, u in new.items()}
        return clipped, KLState(inner, square.to(state.kl.dtype))

    def between(state: KLState, params: Params, signals: Signals, taken: Taken) -> tuple[KLState, int | None]:
        inner, due = after(preconditioner, state.inner, params, signals, taken)
        return state._replace(inner=inner), due

    merged = {**preconditioner.schedules, **schedules}
    hook = None if preconditioner.between is None else between
    return preconditioner._replace(init=init, update=update, between=hook, schedules=merged)
