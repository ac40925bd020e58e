"""The natural-gradient step of THOR: ``U = G_d^-1 (dL/dW) A_d^-1``.

That is what the methods with an inverse for either side do (``inverse``, :mod:`thor_fx.inverses`); the others
say there what they do. Damping ``lambda`` enters in one of four ways (``damping_rule``,
:mod:`thor_fx.refresh`):

* ``"factor"``: ``(A + lambda I)^-1`` and ``(G + lambda I)^-1``, THOR as it is documented;
* ``"sqrt"``: ``sqrt(lambda)`` on each, THOR as it is implemented in MindSpore;
* ``"pi"``: ``pi sqrt(lambda)`` on ``A``, ``sqrt(lambda) / pi`` on ``G``, where
  ``pi^2 = (tr A / dim A) / (tr G / dim G)`` (Martens & Grosse 2015, section 6.3);
* ``"relative"``: ``lambda tr A / dim A`` on ``A``, ``lambda tr G / dim G`` on ``G``: the fraction ``lambda``
  of the mean eigenvalue of every matrix. A matrix of zeros has a mean eigenvalue of 1 here.

Scales and shifts of normalisation layers take the elementwise rule ``g / (g^2 / n + d)`` with ``d``
equal to ``lambda`` under ``"factor"`` and ``"relative"``, and ``sqrt(lambda)`` otherwise, from the gradient
of every step. (Damping relative to ``g^2 / n`` would take longer steps the smaller the gradient is.)
Whatever has no factor keeps its gradient. All gradients are first divided by the loss scale.

With ``factor_decay`` the inverses are those of running averages (:mod:`thor_fx.averages`); with a refresh
rule they are recomputed between steps (:mod:`thor_fx.refresh_rules`) or beside them (:mod:`thor_fx.overlap`).

A bias that belongs to its layer is one more column of the gradient. Legend: L matrices of one shape, of
one layer or of several, updated in one batched product.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .averages import average
from .distributed.exchange import Exchange
from .factors import cotangent_scale, factor_pair
from .inverses import FAILED, METHODS, Inverse, Method, Pair, State, cut, in_a_row, join, replace, select
from .layers import Coverage, Layer
from .matrices import matrices, put_back
from .overlap import Overlap
from .passes.layout import Fisher, Rules
from .portions import portions
from .precision import wide
from .refresh import DampingRule, by_shape, per_side, refresh, root, spans
from .refresh_rules import RefreshRule
from .renewal import Memory, Renewal
from .schedule import Schedule
from .transform import Params, Signals, Taken, Transform, Updates, divided

Renewed = tuple[dict[str, State], dict[str, Tensor]]
"""Inverses by shape of layer, and how the attempts at them have ended: :func:`thor_fx.refresh.refresh`."""


class PreconditionState(NamedTuple):
    """What is kept between steps.

    Attributes:
        inverses: by shape of layer; what they are is up to the method (:mod:`thor_fx.inverses`).
        terms: ``n`` of the last factor step, 0-D.
        failures: since the start, 0-D int64: blocks whose inverse failed, and layers whose factors were not
            finite and did not enter the average.
        refreshes: steps in which inverses were recomputed, 0-D int64.
        memory: running averages of the factors, and what a refresh rule remembers; () without.
        failing: how often every block has failed in a row, int64 (L, U), by shape of layer
            (:mod:`thor_fx.inverses.attempts`).
    """

    inverses: dict[str, State]
    terms: Tensor
    failures: Tensor
    refreshes: Tensor
    memory: Memory | tuple[()] = ()
    failing: dict[str, Tensor] = {}  # noqa: RUF012 - never written


def precondition(
    damping: Schedule,
    *,
    damping_rule: DampingRule = "factor",
    block_size: int | None = 128,
    loss_scale: float = 1.0,
    batch_size: int | None = None,
    frequency: int = 100,
    rules: Rules | None = None,
    inverse: Inverse = "cholesky",
    factor_decay: float | None = None,
    refresh_rule: RefreshRule | Overlap | None = None,
    update_dtype: torch.dtype | None = None,
    exchange: Exchange | None = None,
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
        inverse: the method of inversion.
        factor_decay: of the running averages of factors; None: the inverses are those of one batch.
        refresh_rule: which inverses are recomputed after which step; None: all, in every factor step.
        update_dtype: what gradients and inverses are rounded to for their products; None: nothing.
        exchange: how ranks send each other inverses; None: all are computed here.
    """
    rules = rules or Rules(block_size=block_size, means=inverse == "eva")
    # a rule without averages keeps the factors of the last batch
    renewal = Renewal(factor_decay or 0.0, refresh_rule, frequency, block_size)
    remembers = factor_decay is not None or refresh_rule is not None
    method = METHODS[inverse]
    made = _Preconditioner(
        method,
        renewal,
        remembers,
        damping_rule,
        block_size,
        rules.fisher,
        loss_scale,
        batch_size,
        update_dtype,
        exchange,
    )
    hook = None if refresh_rule is None else made.between
    return Transform(made.init, made.update, {"damping": damping}, frequency, rules, inverse, hook)


@dataclass(frozen=True)
class _Preconditioner:
    """The functions of :func:`precondition`; all of them are pure."""

    method: Method
    renewal: Renewal
    remembers: bool
    damping_rule: DampingRule
    block_size: int | None
    fisher: Fisher
    loss_scale: float
    batch_size: int | None
    update_dtype: torch.dtype | None
    exchange: Exchange | None

    def init(self, params: Params, coverage: Coverage) -> PreconditionState:
        inverses, failing = {}, {}
        for key, layers in by_shape(coverage, params).items():
            one = _accumulator(params[layers[0].param])
            count, sides = sum(layer.groups for layer in layers), (layers[0].input, layers[0].output)
            inverses[key] = self.method.init(count, sides, self.block_size, one)
            units = self.method.units(sides, self.block_size)
            failing[key] = torch.zeros(count, units, dtype=torch.int64, device=one.device)
        any_param = _accumulator(next(iter(params.values())))
        terms = torch.full_like(any_param, self.batch_size or 1)
        like = {name: _accumulator(params[layer.param]) for name, layer in coverage.layers.items()}
        memory = self.renewal.init(coverage.layers, like) if self.remembers and like else ()
        none = torch.zeros_like(terms, dtype=torch.int64)
        return PreconditionState(inverses, terms, none, none.clone(), memory, failing)

    def update(
        self, updates: Updates, state: PreconditionState, params: Params, signals: Signals
    ) -> tuple[Updates, PreconditionState]:
        lam, groups = signals.hyper["damping"], by_shape(signals.coverage, params)
        terms = _terms(self.batch_size, signals.terms, state.terms)
        state = state if terms is state.terms else state._replace(terms=terms)
        if _present(signals):
            state = self._measured(state, groups, signals)
        new = divided(updates, self.loss_scale)
        for name in (norm for norm in signals.coverage.norms if norm in updates):
            new[name] = _elementwise(new[name], state.terms, root(self.damping_rule, lam))
        applied = {}
        for key, layers in groups.items():
            apply = partial(self._applied, terms=state.terms, lam=lam)
            changed, applied[key] = _apply(apply, layers, state.inverses[key], new)
            new |= changed
        if any(applied[key] is not kept for key, kept in state.inverses.items()):
            state = state._replace(inverses=applied)
        return new, state

    def _applied(self, kept: State, gradients: Tensor, terms: Tensor, lam: Tensor) -> tuple[Tensor, State]:
        """What the method makes of gradients (L, out, in), rounded or not, and what it keeps."""
        if self.update_dtype is None or gradients.dtype == torch.float64:
            return self.method.apply(kept, gradients.to(_dtype(kept, gradients)), terms, lam)
        rounded = pytree.tree_map(lambda part: part.to(self.update_dtype), kept)
        return self.method.apply(rounded, gradients.to(self.update_dtype), terms, lam)[0], kept

    def between(
        self, state: PreconditionState, params: Params, signals: Signals, taken: Taken
    ) -> tuple[PreconditionState, int | None]:
        if not isinstance(state.memory, Memory):  # no layers
            return state, None
        if isinstance(self.renewal.rule, Overlap):
            return self._beside(self.renewal.rule, state, state.memory, params, signals.coverage, taken), None
        lam = signals.hyper["damping"]
        layers = signals.coverage.layers

        def failing() -> Tensor:
            return _failing_layers(state.failing, by_shape(signals.coverage, params), layers)

        wanted, memory, due = self.renewal.choose(state.memory, layers, lam, taken, failing)
        state = state._replace(memory=memory)
        groups = self.renewal.kept(by_shape(signals.coverage, params)) if wanted else {}
        return self._renewed(state, groups, wanted, partial(average, memory.averages), lam), due

    def _beside(
        self,
        rule: Overlap,
        state: PreconditionState,
        memory: Memory,
        params: Params,
        coverage: Coverage,
        taken: Taken,
    ) -> PreconditionState:
        """The state with the inverses that were computed beside the last steps, where it is time for them."""
        phase, inverses, wanted = rule.phase(taken.step), state.inverses, taken.ready
        if phase == "rest":
            return state

        def invert() -> Renewed:
            assert isinstance(memory.damping, Tensor)
            before = state._replace(inverses=pytree.tree_map(_unknown, inverses))
            groups, factors = self.renewal.kept(by_shape(coverage, params)), partial(average, memory.averages)
            return self._inverted(before, groups, wanted, factors, memory.damping)

        inputs = pytree.tree_leaves((memory, state.failing))
        if phase == "invert":
            if taken.ahead is not None:
                taken.ahead.start(inputs, wanted, invert)
            return state
        found, outcomes = invert() if taken.ahead is None else taken.ahead.take(inputs, wanted, invert)
        known = pytree.tree_map(_known, found, inverses)
        return _with(state, known, outcomes)

    def _measured(
        self, state: PreconditionState, groups: dict[str, list[Layer]], signals: Signals
    ) -> PreconditionState:
        """The state after the factors of a step, with the inverses that are recomputed in it."""
        lam, present = signals.hyper["damping"], _present(signals)
        chosen = self.renewal.inverted(present, signals.refreshes)
        if not isinstance(state.memory, Memory):
            return self._renewed(state, groups, chosen, self._factors(signals, state.terms), lam)
        # a number of terms that is given ends in the product itself
        factors = self._factors(signals, self.batch_size or state.terms)
        layers = signals.coverage.layers
        memory, lost = self.renewal.measure(state.memory, layers, present, chosen, factors, lam)
        state = state._replace(memory=memory, failures=state.failures + lost)
        return self._renewed(state, self.renewal.kept(groups), chosen, partial(average, memory.averages), lam)

    def _factors(self, signals: Signals, terms: Tensor | float) -> Callable[[Layer], Pair]:
        assert signals.moments is not None
        measured = terms if signals.terms is None else signals.terms
        scale = cotangent_scale(self.fisher, terms, measured, self.loss_scale)
        return partial(factor_pair, signals.moments, scale=scale)

    def _renewed(
        self,
        state: PreconditionState,
        groups: dict[str, list[Layer]],
        wanted: Collection[str],
        factors: Callable[[Layer], Pair],
        lam: Tensor | float,
    ) -> PreconditionState:
        """The state with new inverses of some layers."""
        if not wanted:
            return state
        return _with(state, *self._inverted(state, groups, wanted, factors, lam))

    def _inverted(
        self,
        before: PreconditionState,
        groups: dict[str, list[Layer]],
        wanted: Collection[str],
        factors: Callable[[Layer], Pair],
        lam: Tensor | float,
    ) -> Renewed:
        """All inverses, with new ones of some layers; and how the attempts have ended."""
        damping = partial(per_side, self.damping_rule, lam)

        def renewed(names: Collection[str]) -> Renewed:
            chosen = {key: [layer.name in names for layer in layers] for key, layers in groups.items()}
            kept = before.inverses, before.failing
            return refresh(self.method, groups, chosen, factors, *kept, damping, self.block_size)

        if self.exchange is None:
            return renewed(wanted)
        return self.exchange.renewed(renewed, before.inverses, before.failing, groups, wanted)


# NOTE: [NaN is the last state] What is computed beside the steps must not read inverses that they may write
# (EKFAC's moments). So it gets NaN in their place, which stays where an inversion fails or a layer is not
# wanted, and nowhere else: what a method calls good is finite. The state has the last word at installation.


def _unknown(part: Tensor) -> Tensor:
    return part.new_full((), torch.nan).expand(part.shape)


def _known(new: Tensor, old: Tensor) -> Tensor:
    return torch.where(new.isnan(), old, new)


def _with(
    state: PreconditionState, inverses: dict[str, State], outcomes: Mapping[str, Tensor]
) -> PreconditionState:
    """The state with new inverses."""
    failed = torch.stack([(ended >= FAILED).sum() for ended in outcomes.values()]).sum()
    failing = {key: in_a_row(state.failing[key], ended) for key, ended in outcomes.items()}
    return state._replace(
        inverses=inverses,
        failures=state.failures + failed,
        refreshes=state.refreshes + 1,
        failing={**state.failing, **failing},
    )


def _failing_layers(
    failing: Mapping[str, Tensor], groups: Mapping[str, list[Layer]], layers: Collection[str]
) -> Tensor:
    """Which layers have blocks whose last attempt failed, bool (layers,), in the order of ``layers``."""
    flags = {
        layer.name: failing[key][place].any()
        for key, group in groups.items()
        for layer, place in zip(group, spans(group), strict=True)
    }
    return torch.stack([flags[name] for name in layers])


def _present(signals: Signals) -> set[str]:
    """The layers that have factors in this step."""
    moments = signals.moments or {}
    layers = signals.coverage.layers.items()
    return {name for name, layer in layers if any(sums.name in moments for sums in layer.sums)}


def _accumulator(tensor: Tensor) -> Tensor:
    """A 0-D tensor in the dtype that factors are kept in."""
    return torch.zeros((), dtype=wide(tensor), device=tensor.device)


def _terms(batch_size: int | None, measured: Tensor | None, previous: Tensor) -> Tensor:
    if batch_size is not None or measured is None:
        return previous
    return measured.to(previous.dtype)


def _apply(
    apply: Callable[[State, Tensor], tuple[Tensor, State]],
    layers: list[Layer],
    state: State,
    gradients: Updates,
) -> tuple[dict[str, Tensor], State]:
    """The updates of the layers of one shape, and what the method keeps of them."""
    present = [layer.param in gradients for layer in layers]
    if not any(present):
        return {}, state
    used = select(state, spans(layers), present)
    shown = [layer for layer, here in zip(layers, present, strict=True) if here]
    new, parts = dict(gradients), portions(shown, gradients[shown[0].param])
    own = cut(used, [sum(layer.groups for layer in few) for few in parts])
    changed = [_apply_to_few(apply, *each, gradients, new) for each in zip(parts, own, strict=True)]
    after = join(used, own, changed)
    kept = state if after is used else replace(state, spans(layers), present, after)
    return {name: new[name] for layer in shown for name in layer.params if name in new}, kept


def _apply_to_few(
    apply: Callable[[State, Tensor], tuple[Tensor, State]],
    layers: list[Layer],
    state: State,
    gradients: Updates,
    new: dict[str, Tensor],
) -> State:
    """Write the updates of layers into ``new``; what the method keeps."""
    each = [matrices(layer, gradients) for layer in layers]
    stacked = each[0] if len(each) == 1 else torch.cat(each)  # (L, out, in); a copy where there are several
    preconditioned, after = apply(state, stacked)
    preconditioned = preconditioned.to(stacked.dtype)
    for layer, place in zip(layers, spans(layers), strict=True):
        put_back(layer, preconditioned[place], new)
    return after


def _dtype(state: State, stacked: Tensor) -> torch.dtype:
    return next((part.dtype for field in state for part in field), stacked.dtype)


def _elementwise(gradient: Tensor, terms: Tensor, damping: Tensor | float) -> Tensor:
    scale = gradient**2 / terms + damping
    return torch.where(scale > 0, gradient / scale, torch.zeros_like(gradient))  # 0/0 without damping
