"""The natural-gradient step of THOR: ``U = G_d^-1 (dL/dW) A_d^-1``.

Damping ``lambda`` enters in one of three ways (``damping_rule``, :mod:`thor_fx.refresh`):

* ``"factor"``: ``(A + lambda I)^-1`` and ``(G + lambda I)^-1``, THOR as it is documented;
* ``"sqrt"``: ``sqrt(lambda)`` on each, THOR as it is implemented in MindSpore;
* ``"pi"``: ``pi sqrt(lambda)`` on ``A``, ``sqrt(lambda) / pi`` on ``G``, where
  ``pi^2 = (tr A / dim A) / (tr G / dim G)`` (Martens & Grosse 2015, section 6.3).

Scales and shifts of normalisation layers take the elementwise rule ``g / (g^2 / n + d)`` with ``d``
equal to ``lambda`` under ``"factor"`` and ``sqrt(lambda)`` otherwise, from the gradient of every
step. Whatever has no factor keeps its gradient. All gradients are first divided by the loss scale.

With ``factor_decay`` the inverses are those of running averages (:mod:`thor_fx.averages`); with a refresh
rule they are recomputed between steps (:mod:`thor_fx.refresh_rules`).

A bias that belongs to its layer is one more column of the gradient. Legend: L matrices of one shape, of
one layer or of several, updated in one batched product.
"""

from collections.abc import Callable, Collection
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import blocks
from .averages import average
from .factors import factor_pair
from .layers import Coverage, Layer
from .passes.layout import Rules
from .passes.reindex import put, take
from .refresh import DampingRule, InversePair, Pair, by_shape, per_side, refresh, root, spans
from .refresh_rules import RefreshRule
from .renewal import Memory, Renewal
from .schedule import Schedule
from .transform import Params, Signals, Taken, Transform, Updates


class PreconditionState(NamedTuple):
    """What is kept between steps.

    Attributes:
        inverses: by shape of layer.
        terms: ``n`` of the last factor step, 0-D.
        failures: since the start, 0-D int64: blocks whose inverse failed and was kept, and layers whose
            factors were not finite and did not enter the average.
        memory: running averages of the factors, and what a refresh rule remembers; () without.
    """

    inverses: dict[str, InversePair]
    terms: Tensor
    failures: Tensor
    memory: Memory | tuple[()] = ()


def precondition(
    damping: Schedule,
    *,
    damping_rule: DampingRule = "factor",
    block_size: int | None = 128,
    loss_scale: float = 1.0,
    batch_size: int | None = None,
    frequency: int = 100,
    rules: Rules | None = None,
    factor_decay: float | None = None,
    refresh_rule: RefreshRule | None = None,
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
        factor_decay: of the running averages of factors; None: the inverses are those of one batch.
        refresh_rule: which inverses are recomputed after which step; None: all, in every factor step.
    """
    rules = rules or Rules(block_size=block_size)
    # a rule without averages keeps the factors of the last batch
    renewal = Renewal(factor_decay or 0.0, refresh_rule, frequency, block_size)
    remembers = factor_decay is not None or refresh_rule is not None

    def init(params: Params, coverage: Coverage) -> PreconditionState:
        inverses = {}
        for key, layers in by_shape(coverage, params).items():
            one = _accumulator(params[layers[0].param])
            count, sides = sum(layer.groups for layer in layers), (layers[0].input, layers[0].output)
            # NOTE: zeros and not identities: a layer that never had a good inverse does not move
            inverses[key] = InversePair(*(blocks.zeros(count, side, block_size, one) for side in sides))
        any_param = _accumulator(next(iter(params.values())))
        terms = torch.full_like(any_param, batch_size or 1)
        like = {name: _accumulator(params[layer.param]) for name, layer in coverage.layers.items()}
        memory = renewal.init(coverage.layers, like) if remembers and coverage.layers else ()
        return PreconditionState(inverses, terms, torch.zeros_like(terms, dtype=torch.int64), memory)

    def renew(
        state: PreconditionState,
        groups: dict[str, list[Layer]],
        wanted: Collection[str],
        factors: Callable[[Layer], Pair],
        lam: Tensor | float,
    ) -> PreconditionState:
        if not wanted:
            return state
        chosen = {key: [layer.name in wanted for layer in layers] for key, layers in groups.items()}
        damping = partial(per_side, damping_rule, lam)
        inverses, failed = refresh(groups, chosen, factors, state.inverses, damping, block_size)
        return state._replace(inverses=inverses, failures=state.failures + failed)

    def remember(state: PreconditionState, signals: Signals, renewed: set[str]) -> tuple[Memory, Tensor]:
        assert isinstance(state.memory, Memory)
        assert signals.moments is not None
        terms = state.terms if batch_size is None else batch_size  # a number ends in the product itself
        measured = partial(factor_pair, signals.moments, terms=terms, loss_scale=loss_scale)
        layers, present = signals.coverage.layers, _present(signals)
        return renewal.measure(state.memory, layers, present, renewed, measured)

    def update(
        updates: Updates, state: PreconditionState, params: Params, signals: Signals
    ) -> tuple[Updates, PreconditionState]:
        lam = signals.hyper["damping"]
        groups = by_shape(signals.coverage, params)
        terms = _terms(batch_size, signals.terms, state.terms)
        state = state if terms is state.terms else state._replace(terms=terms)
        present = _present(signals)
        if signals.moments and present:
            renewed = renewal.inverted(present, signals.refreshes)
            if isinstance(state.memory, Memory):
                memory, lost = remember(state, signals, renewed)
                state = state._replace(memory=memory, failures=state.failures + lost)
                kept = renewal.kept(groups)
                state = renew(state, kept, renewed, partial(average, memory.averages), lam)
            else:
                measured = partial(factor_pair, signals.moments, terms=terms, loss_scale=loss_scale)
                state = renew(state, groups, renewed, measured, lam)
        new = {name: u / loss_scale for name, u in updates.items()}
        for name in set(signals.coverage.norms) & set(updates):
            new[name] = _elementwise(new[name], state.terms, root(damping_rule, lam))
        for key, layers in groups.items():
            new |= _apply(layers, state.inverses[key], new)
        return new, state

    def between(
        state: PreconditionState, params: Params, signals: Signals, taken: Taken
    ) -> tuple[PreconditionState, int | None]:
        if not isinstance(state.memory, Memory):  # no layers
            return state, None
        lam = signals.hyper["damping"]
        wanted, memory, due = renewal.choose(state.memory, signals.coverage.layers, lam, taken)
        state = state._replace(memory=memory)
        groups = renewal.kept(by_shape(signals.coverage, params)) if wanted else {}
        return renew(state, groups, wanted, partial(average, memory.averages), lam), due

    hook = None if refresh_rule is None else between
    return Transform(init, update, {"damping": damping}, frequency, rules, hook)


def _present(signals: Signals) -> set[str]:
    """The layers that have factors in this step."""
    moments = signals.moments or {}
    layers = signals.coverage.layers.items()
    return {name for name, layer in layers if any(sums.name in moments for sums in layer.sums)}


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
