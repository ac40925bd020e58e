"""The natural-gradient step of THOR: ``U = G_d^-1 (dL/dW) A_d^-1``.

Damping ``lambda`` enters in one of three ways (``damping_rule``, :mod:`thor_fx.refresh`):

* ``"factor"``: ``(A + lambda I)^-1`` and ``(G + lambda I)^-1``, THOR as it is documented;
* ``"sqrt"``: ``sqrt(lambda)`` on each, THOR as it is implemented in MindSpore;
* ``"pi"``: ``pi sqrt(lambda)`` on ``A``, ``sqrt(lambda) / pi`` on ``G``, where
  ``pi^2 = (tr A / dim A) / (tr G / dim G)`` (Martens & Grosse 2015, section 6.3).

Scales and shifts of normalisation layers take the elementwise rule ``g / (g^2 / n + d)`` with ``d``
equal to ``lambda`` under ``"factor"`` and ``sqrt(lambda)`` otherwise, from the gradient of every
step. Whatever has no factor keeps its gradient. All gradients are first divided by the loss scale.

A bias that belongs to its layer is one more column of the gradient. Legend: L matrices of one shape, of
one layer or of several, updated in one batched product.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import blocks
from .factors import cotangent_scale, factor_pair
from .layers import Coverage, Layer
from .passes.layout import Rules
from .passes.reindex import put, take
from .refresh import DampingRule, InversePair, by_shape, per_side, refresh, root, spans
from .schedule import Schedule
from .transform import Params, Signals, Transform, Updates


class PreconditionState(NamedTuple):
    """What is kept between steps.

    Attributes:
        inverses: by shape of layer.
        terms: ``n`` of the last factor step, 0-D.
        failures: blocks whose inverse failed and was kept, since the start, 0-D int64.
    """

    inverses: dict[str, InversePair]
    terms: Tensor
    failures: Tensor


def precondition(
    damping: Schedule,
    *,
    damping_rule: DampingRule = "factor",
    block_size: int | None = 128,
    loss_scale: float = 1.0,
    batch_size: int | None = None,
    frequency: int = 100,
    rules: Rules | None = None,
) -> Transform:
    """Multiply the gradient of every layer by its damped inverse factors.

    Args:
        damping: ``lambda`` per step.
        damping_rule: see the top of this module.
        block_size: side of the diagonal blocks; None keeps factors whole.
        loss_scale: the caller multiplies the loss by it; gradients are divided by it.
        batch_size: terms ``n`` that the loss averages over; None: as read off the graph.
        frequency: the inverses are recomputed in step 0 and every ``frequency`` steps.
        rules: which factors; None: the whole ones of all layers.
    """
    rules = rules or Rules(block_size=block_size)

    def init(params: Params, coverage: Coverage) -> PreconditionState:
        inverses = {}
        for key, layers in by_shape(coverage, params).items():
            like = _accumulator(params[layers[0].param])
            count, sides = sum(layer.groups for layer in layers), (layers[0].input, layers[0].output)
            # NOTE: zeros and not identities: a layer that never had a good inverse does not move
            inverses[key] = InversePair(*(blocks.zeros(count, side, block_size, like) for side in sides))
        any_param = _accumulator(next(iter(params.values())))
        terms = torch.full_like(any_param, batch_size or 1)
        return PreconditionState(inverses, terms, torch.zeros_like(terms, dtype=torch.int64))

    def update(
        updates: Updates, state: PreconditionState, params: Params, signals: Signals
    ) -> tuple[Updates, PreconditionState]:
        lam = signals.hyper["damping"]
        groups = by_shape(signals.coverage, params)
        terms = _terms(batch_size, signals.terms, state.terms)
        state = state if terms is state.terms else state._replace(terms=terms)
        if signals.moments and groups:
            n = terms if signals.terms is None else signals.terms
            scale = cotangent_scale(rules.fisher, terms, n, loss_scale)
            measured = partial(factor_pair, signals.moments, scale=scale)
            present = {
                key: [any(sums.name in signals.moments for sums in layer.sums) for layer in layers]
                for key, layers in groups.items()
            }
            damping = partial(per_side, damping_rule, lam)
            inverses, failed = refresh(groups, present, measured, state.inverses, damping, block_size)
            state = PreconditionState(inverses, terms, state.failures + failed)
        new = {name: u / loss_scale for name, u in updates.items()}
        for name in set(signals.coverage.norms) & set(updates):
            new[name] = _elementwise(new[name], state.terms, root(damping_rule, lam))
        for key, layers in groups.items():
            new |= _apply(layers, state.inverses[key], new)
        return new, state

    return Transform(init, update, {"damping": damping}, frequency, rules)


def _accumulator(tensor: Tensor) -> Tensor:
    """A 0-D tensor in the dtype that factors are kept in."""
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return torch.zeros((), dtype=dtype, device=tensor.device)


def _terms(batch_size: int | None, measured: Tensor | None, previous: Tensor) -> Tensor:
    if batch_size is not None or measured is None:
        return previous
    return measured.to(previous.dtype)


def _apply(layers: list[Layer], inverses: InversePair, gradients: Updates) -> dict[str, Tensor]:
    present = [layer.param in gradients for layer in layers]
    if not any(present):
        return {}
    inverses = inverses.select(spans(layers), present)
    shown = [layer for layer, here in zip(layers, present, strict=True) if here]
    matrices = torch.cat([_matrices(layer, gradients) for layer in shown])  # (L, out, in)
    working = matrices.to(_dtype(inverses, matrices))
    preconditioned = blocks.precondition(inverses.output, working, inverses.input).to(matrices.dtype)
    new = dict(gradients)
    for layer, place in zip(shown, spans(shown), strict=True):
        _put_back(layer, preconditioned[place], new)
    return {name: new[name] for layer in shown for name in layer.params if name in new}


def _dtype(inverses: InversePair, matrices: Tensor) -> torch.dtype:
    return next((part.dtype for side in inverses for part in side), matrices.dtype)


def _matrices(layer: Layer, gradients: Updates) -> Tensor:
    """The gradient of a layer as (E, out, in), with the column of its bias."""
    weight = take(layer.path, gradients[layer.param]).reshape(layer.groups, layer.out, -1)
    if layer.bias is None:
        return weight
    if layer.bias not in gradients:
        return torch.nn.functional.pad(weight, (0, 1))
    column = take(layer.bias_path, gradients[layer.bias]).reshape(layer.groups, layer.out, 1)
    return torch.cat([weight, column.to(weight.dtype)], -1)


def _put_back(layer: Layer, matrices: Tensor, gradients: dict[str, Tensor]) -> None:
    """Write (E, out, in) back into the gradients of a layer."""
    if layer.bias is not None:
        if layer.bias in gradients:
            old = gradients[layer.bias]
            part = take(layer.bias_path, old)
            column = matrices[..., -1].reshape(part.shape).to(old.dtype)
            gradients[layer.bias] = put(layer.bias_path, old, column)
        matrices = matrices[..., :-1]
    old = gradients[layer.param]
    gradients[layer.param] = put(layer.path, old, matrices.reshape(take(layer.path, old).shape))


def _elementwise(gradient: Tensor, terms: Tensor, damping: Tensor | float) -> Tensor:
    scale = gradient**2 / terms + damping
    return torch.where(scale > 0, gradient / scale, torch.zeros_like(gradient))  # 0/0 without damping
