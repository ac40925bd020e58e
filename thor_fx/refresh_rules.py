"""When inverses are recomputed from the averaged factors: rules for ``refresh=``.

Factors are measured in step 0 and every ``frequency`` steps. Without a rule, every factor step also
inverts. With one, step 0 inverts all layers, later factor steps only measure, and the rule says which
layers are inverted *after* which step; the new inverses act from the next step on.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from . import blocks
from .arguments import check_integer, check_number
from .layers import Layer
from .passes.sides import Side

Name = TypeVar("Name")

Verdict = Literal["refresh", "keep", "freeze"]


@dataclass(frozen=True)
class Every:
    """All inverses are recomputed after every step whose number is a multiple of ``steps``.

    From the factors that there are then: ``steps`` need not be a multiple of ``frequency``, but must not
    be less, or the same factors would be inverted twice.

    Raises:
        TypeError: ``steps`` is no integer.
        ValueError: ``steps`` is less than 1.

    Example:
        >>> import thor_fx
        >>> tx = thor_fx.thor(0.1, 0.03, 0.9, frequency=10, factor_decay=0.95, refresh=Every(50))
    """

    steps: int

    def __post_init__(self) -> None:
        check_integer("steps", self.steps)


@dataclass(frozen=True)
class Staggered:
    """Every layer is recomputed once per interval, in ``parts`` portions of like cost.

    Portion ``i`` comes after the steps whose number is ``i * interval // parts`` modulo the interval, so
    no step recomputes all. The first interval is served by step 0.

    Args:
        parts: how many portions.
        steps: the interval; None: ``frequency``.

    Raises:
        TypeError: an argument is no integer.
        ValueError: an argument is less than 1, or there are more parts than steps.

    Example:
        >>> Staggered(parts=4, steps=100)
        Staggered(parts=4, steps=100)
    """

    parts: int
    steps: int | None = None

    def __post_init__(self) -> None:
        check_integer("parts", self.parts)
        check_integer("steps", self.steps, optional=True)
        if self.steps is not None and self.steps < self.parts:
            raise ValueError(f"steps must be at least parts = {self.parts}, got {self.steps}")


@dataclass(frozen=True)
class ByTrace:
    """THOR's rule: a layer is recomputed when the trace of its curvature has changed enough.

    After every factor step, for every layer, with its averaged factors ``F = A (x) G``::

        Delta = | |tr(F + lambda I)| - |tr(F' + lambda I)| | / |tr(F' + lambda I)|

        Delta > w1          its inverses are recomputed
        w2 <= Delta <= w1   they are kept
        Delta < w2          they are kept for good: the layer is frozen

    (Chen et al. 2021, section 3.2). ``F'`` are the factors that the present inverses were made of: where
    the paper keeps a layer it sets ``F_k = F_(k-1)``. A layer whose ``Delta`` is not a number is recomputed.

    A kept layer saves its inversion, a frozen one all inversions to come; its factors are still summed,
    in a graph that is compiled for all layers, until all layers are frozen: then no step measures anything.
    Deciding waits for the device, once in every factor step.

    Args:
        w1: THOR: 0.01.
        w2: at most ``w1``. THOR: 0; THOR_stop: 0.001, with ``w1=0.01``; THOR_NT: both 0.
        growth: the interval between factor steps, at first ``frequency``, is multiplied by this after a
            factor step in which no layer was recomputed.
        longest: the interval grows to at most so many steps; None: without bound.

    Raises:
        TypeError: an argument is no number.
        ValueError: an argument is out of its range.

    Example:
        >>> ByTrace(0.01, 0.001).verdict(100.5, 100.0)
        'keep'
        >>> [ByTrace(0.01, 0.001).verdict(now, 100.0) for now in (102, 98, 100.05)]
        ['refresh', 'refresh', 'freeze']
    """

    w1: float = 0.01
    w2: float = 0.0
    growth: float = 1.0
    longest: int | None = None

    def __post_init__(self) -> None:
        check_number("w1", self.w1)
        check_number("w2", self.w2)
        if self.w2 > self.w1:
            raise ValueError(f"w2 must be at most w1 = {self.w1}, got {self.w2}")
        check_number("growth", self.growth)
        if self.growth < 1:
            raise ValueError(f"growth must be >= 1, got {self.growth}")
        check_integer("longest", self.longest, optional=True)

    def verdict(self, now: float, before: float) -> Verdict:
        """What to do with a layer, from ``tr(F + lambda I)`` of its factors now and before."""
        delta = abs(abs(now) - abs(before)) / abs(before) if before else math.nan
        if not delta <= self.w1:  # NaN, too
            return "refresh"
        return "freeze" if delta < self.w2 else "keep"

    def grown(self, interval: int) -> int:
        """The interval after ``interval``."""
        longer = math.ceil(interval * self.growth)
        return longer if self.longest is None else max(interval, min(longer, self.longest))


RefreshRule = Every | Staggered | ByTrace


def check_refresh(rule: RefreshRule | None, frequency: int) -> None:
    """Refuse what is no rule, or one that does not go with ``frequency``.

    Raises:
        TypeError: ``rule`` is no rule.
        ValueError: it would invert the same factors twice, or has more parts than steps.
    """
    if rule is None:
        return
    if not isinstance(rule, RefreshRule):
        allowed = "None, thor_fx.Every(...), thor_fx.Staggered(...) or thor_fx.ByTrace(...)"
        raise TypeError(f"refresh must be {allowed}, got {type(rule).__name__}: {rule!r}")
    if isinstance(rule, ByTrace):
        if rule.longest is not None and rule.longest < frequency:
            raise ValueError(f"refresh must not have longest < frequency = {frequency}, got {rule}")
        return
    steps, parts = _interval(rule, frequency), _parts(rule)
    if steps < frequency:
        raise ValueError(
            f"refresh must have steps >= frequency = {frequency}, got {rule}: the same factors would be "
            "inverted more than once"
        )
    if steps < parts:
        raise ValueError(
            f"refresh must have an interval of at least {parts} steps, and frequency is {frequency}: "
            f"got {rule}; give it steps=..."
        )


def portion_due(rule: Every | Staggered, step: int, frequency: int) -> int | None:
    """Which portion of the layers is recomputed after step ``step``; None: none.

    Example:
        >>> [portion_due(Staggered(2, steps=5), step, 1) for step in range(11)]
        [None, None, None, None, None, 0, None, 1, None, None, 0]
    """
    interval, parts = _interval(rule, frequency), _parts(rule)
    if step < interval:  # step 0 has served the first interval
        return None
    starts = [i * interval // parts for i in range(parts)]
    place = step % interval
    return starts.index(place) if place in starts else None


def portions(rule: Every | Staggered, costs: Mapping[str, int]) -> list[list[str]]:
    """The layers in portions of like cost, one for each part of the rule."""
    return dealt(costs, _parts(rule))


def dealt(costs: Mapping[Name, int], hands: int) -> list[list[Name]]:
    """The layers in portions of like cost: the dearest first, each to the cheapest portion so far.

    No two portions differ by more than the dearest layer; none is above 4/3 of the best (Graham 1969).

    Example:
        >>> dealt({"a": 3, "b": 5, "c": 2}, 2)
        [['b'], ['a', 'c']]
    """
    found: list[list[Name]] = [[] for _ in range(hands)]
    totals = [0] * len(found)
    for name in sorted(costs, key=lambda name: -costs[name]):
        cheapest = totals.index(min(totals))
        found[cheapest].append(name)
        totals[cheapest] += costs[name]
    return found


def inversion_costs(layers: Mapping[str, Layer], block_size: int | None) -> dict[str, int]:
    """What it costs to invert the factors of every layer: the sum of ``b^3`` over all blocks."""
    return {
        name: _cost(layer.input, block_size) + _cost(layer.output, block_size)
        for name, layer in layers.items()
    }


def _cost(side: Side, block_size: int | None) -> int:
    if side.kind in {"identity", "diagonal"}:
        return side.groups * side.dim * (side.kind == "diagonal")
    return side.groups * sum(count * b**3 for count, b in blocks.sizes(side, block_size))


def _interval(rule: Every | Staggered, frequency: int) -> int:
    return frequency if rule.steps is None else rule.steps


def _parts(rule: Every | Staggered) -> int:
    return rule.parts if isinstance(rule, Staggered) else 1
