"""How far the loss should fall: the change that the quadratic model of K-FAC predicts for a step.

For the step ``d`` that is really taken, whatever momentum, clips, decay and step length have made of it,
and the gradient ``g`` of the same batch::

    M(d) - M(0) = <g, d> + 1/2 <d, P^-1 d>

``P^-1`` of a layer is the curvature that the stored inverses are the inverse of, ``X -> G_d X A_d``:
factors as averaged, cut and damped in the last refresh. (Martens & Grosse 2015, section 6.5, with this
``F + lambda I`` in place of the exact Fisher matrix, which would take another forward pass.) For ``d = -lr
U`` and fresh inverses this is ``(lr^2 / 2 - lr) <U, g>``. What belongs to no layer has no curvature here: its
slope ``<g, d>`` counts alone.

The change is in the units of the loss as it is handed in: with ``loss_scale`` it carries that scale.

Legend: L matrices of one shape, F equal blocks along the diagonal, b their side.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .blocks import Blocks
from .layers import Coverage
from .matrices import matrices, put_back
from .precision import wide
from .precondition import PreconditionState
from .refresh import by_shape, spans
from .transform import Params, Signals, State, Transform, Updates, between_of_inner


class PredictedState(NamedTuple):
    """State of :func:`predict_change`: the inner one, and the change, 0-D; 0 once it is used."""

    inner: State
    change: Tensor


def predict_change(inner: Transform, curvature: Transform, loss_scale: float = 1.0) -> Transform:
    """``inner``, which also stores what its step should change, where ``signals.compares``.

    Args:
        inner: a whole chain, down to ``-lr``.
        curvature: :func:`apply_curvature`, in the groups of the preconditioner.
        loss_scale: the gradients carry it.
    """

    def init(params: Params, coverage: Coverage) -> PredictedState:
        some = next(iter(params.values()))
        change = torch.zeros((), dtype=wide(some), device=some.device)
        return PredictedState(inner.init(params, coverage), change)

    def update(
        updates: Updates, state: PredictedState, params: Params, signals: Signals
    ) -> tuple[Updates, PredictedState]:
        steps, after = inner.update(updates, state.inner, params, signals)
        if not signals.compares:
            return steps, PredictedState(after, state.change)
        bent: Updates = {}
        preconditioner = _preconditioner(after)
        if preconditioner is not None:
            bent, _ = curvature.update(steps, preconditioner, params, signals)
        slope = [_inner(updates[name], step) for name, step in steps.items()]
        bend = [_inner(b, steps[name]) * (loss_scale / 2) for name, b in bent.items()]
        change = torch.stack([*slope, *bend]).sum()
        return steps, PredictedState(after, change.to(state.change.dtype))

    return inner._replace(init=init, update=update, between=between_of_inner(inner))


def apply_curvature() -> Transform:
    """``d -> P^-1 d`` of what belongs to a layer, given the state of its preconditioner."""

    def update(
        updates: Updates, state: PreconditionState, params: Params, signals: Signals
    ) -> tuple[Updates, PreconditionState]:
        new: dict[str, Tensor] = {}
        for key, layers in by_shape(signals.coverage, params).items():
            inverses = state.inverses[key]
            for layer, place in zip(layers, spans(layers), strict=True):
                if layer.param not in updates:
                    continue
                for name in layer.params:
                    if name in updates:
                        new.setdefault(name, torch.zeros_like(updates[name]))
                input_, output = (tuple(part[place] for part in side) for side in inverses)
                step = matrices(layer, updates)  # (E, out, in)
                bent = solve(input_, solve(output, step.to(wide(step))).mT).mT
                put_back(layer, bent.to(step.dtype), new)
        return new, state

    return Transform(lambda _params, _coverage: (), update)


def solve(inverses: Blocks, x: Tensor) -> Tensor:
    """Multiply (L, d, k) by the block-diagonal matrices whose inverses are given; nothing given: by 1.

    An inverse of zeros, of a layer that never had factors and does not move, gives zeros.
    """
    if not inverses:
        return x
    if inverses[0].dim() == 2:
        diagonal = inverses[0].unsqueeze(-1).to(x.dtype)
        return torch.where(diagonal > 0, x / diagonal, torch.zeros_like(x))
    products, start = [], 0
    for part in inverses:
        layers, count, b, _ = part.shape
        stop = start + count * b
        tiled = x[:, start:stop].reshape(layers * count, b, -1)
        root, info = torch.linalg.cholesky_ex(part.reshape(-1, b, b).to(x.dtype))
        good = (info == 0)[:, None, None]
        root = torch.where(good, root, torch.eye(b, dtype=x.dtype, device=x.device))
        solved = torch.where(good, torch.cholesky_solve(tiled, root), torch.zeros_like(tiled))
        products.append(solved.reshape(layers, count * b, -1))
        start = stop
    return torch.cat(products, dim=1)


def _inner(one: Tensor, other: Tensor) -> Tensor:
    return (one.to(wide(one)) * other.to(wide(one))).sum()


def _preconditioner(state: Any) -> Any:
    """The state of the preconditioner, or those of all groups by label; None if there is none."""
    if isinstance(state, PreconditionState):
        return state
    values = list(state.values()) if isinstance(state, dict) else []
    if any(isinstance(value, PreconditionState) for value in values):
        return state
    inner = values or (state if isinstance(state, tuple) else ())
    return next((found for found in map(_preconditioner, inner) if found is not None), None)
