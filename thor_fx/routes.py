"""Two transforms in one: what belongs to a layer goes one way, everything else the other.

What has no factors is vectors (biases, scales and shifts of norms) and weights without a Kronecker form;
:class:`~thor_fx.layers.Coverage` says which.
"""

from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from .layers import Coverage
from .per_coverage import PerCoverage
from .transform import Params, Signals, State, Taken, Transform, Updates, after, chain, earliest

NOTHING = chain()
"""The transform that changes nothing."""


class RouteState(NamedTuple):
    """The states of both ways; () where no parameter goes."""

    layers: State
    others: State


def by_coverage(layers: Transform, others: Transform) -> Transform:
    """``layers`` for the parameters that a layer preconditions, ``others`` for the rest.

    Args:
        layers: sees the part of the coverage that speaks of its parameters, as ``others`` does.
        others: may be :data:`NOTHING`, which passes updates on.
    """
    both = chain(layers, others, shared=True)  # checks that they agree
    parts: PerCoverage[Coverage] = PerCoverage()
    inside: PerCoverage[frozenset[str]] = PerCoverage()

    def split(tensors: Params, coverage: Coverage) -> tuple[Params, Params]:
        return _split(tensors, inside.get(coverage, None, lambda: coverage.preconditioned))

    def told(signals: Signals, names: Params) -> Signals:
        own, whole = frozenset(names), signals.coverage
        return replace(signals, coverage=parts.get(whole, own, lambda: whole.restrict(own)))

    def init(params: Params, coverage: Coverage) -> RouteState:
        ways = zip((layers, others), split(params, coverage), strict=True)
        return RouteState(
            *(tx.init(own, coverage.restrict(frozenset(own))) if own else () for tx, own in ways)
        )

    def update(
        updates: Updates, state: RouteState, params: Params, signals: Signals
    ) -> tuple[Updates, RouteState]:
        routes = split(params, signals.coverage), split(updates, signals.coverage)
        new: dict[str, Tensor] = {}
        states = []
        for tx, old, own, mine in zip((layers, others), state, *routes, strict=True):
            changed, after = mine, old
            if mine:
                changed, after = tx.update(mine, old, own, told(signals, own))
            states.append(after)
            new |= changed
        return {name: new[name] for name in updates}, RouteState(*states)

    def between(
        state: RouteState, params: Params, signals: Signals, taken: Taken
    ) -> tuple[RouteState, int | None]:
        states, dues = [], []
        for tx, old, own in zip((layers, others), state, split(params, signals.coverage), strict=True):
            new, due = after(tx, old, own, told(signals, own), taken) if own else (old, None)
            states.append(new)
            dues.append(due)
        return RouteState(*states), earliest(dues)

    return both._replace(init=init, update=update, between=between if both.between else None)


def _split(tensors: Params, inside: frozenset[str]) -> tuple[Params, Params]:
    return (
        {name: tensor for name, tensor in tensors.items() if name in inside},
        {name: tensor for name, tensor in tensors.items() if name not in inside},
    )
