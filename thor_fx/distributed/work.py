"""Who inverts what, where ranks share the work (KAISA, Pauloski et al. 2021).

==============  ===========================================================================================
``"none"``      every rank inverts the factors of all layers, which all ranks have
``"inverse"``   each layer belongs to one rank, which inverts its factors and sends the result to all. All
                ranks hold all inverses, and precondition all gradients. KAISA's COMM-OPT
``"gradient"``  each layer belongs to one rank, which alone holds its inverses and averages, preconditions its
                gradient, and sends that: in every step, but a rank holds ``1/W`` of the state, and factors
                go to their owner alone. MEM-OPT
``"auto"``      the one of these that a step takes least time with, by the model below
==============  ===========================================================================================

Let ``r`` and ``s`` be the operations of refresh and of preconditioning of all layers, ``r'`` and ``s'`` those
of the rank that has most, ``F`` its rate, and let ``send(b) = W latency + b / bandwidth``. Per
``N = frequency`` steps the three take::

    none       r / F  + send(factors)                     +  N  s / F
    inverse    r' / F + send(factors) + send(inverses)    +  N  s / F
    gradient   r' / F                                     +  N (s' / F + send(gradients))

``send(factors)`` is the half of their sum over all ranks that tells all of them (:mod:`.delivery`).

:data:`RATES` are round numbers of the kind of device, so that all ranks come to the same choice in every run.
What is as fast as another is not worth its messages: the first of the three wins.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from ..layers import Coverage, Layer
from ..per_coverage import PerCoverage
from ..precision import wide
from ..transform import Params, Signals, State, Taken, Transform, Updates, after
from .exchange import Exchange
from .packing import packed_numel

WorkSharing = Literal["none", "inverse", "gradient", "auto"]
Mode = Literal["none", "inverse", "gradient"]


class Rates(NamedTuple):
    """What a device and its links do, in round numbers.

    Attributes:
        flops: operations in a second.
        bandwidth: bytes that a rank sends in a second.
        latency: seconds until a message arrives.
    """

    flops: float
    bandwidth: float
    latency: float


RATES = {"cpu": Rates(5e10, 1e9, 1e-4), "cuda": Rates(1e13, 2e10, 2e-5)}


@dataclass(frozen=True)
class SharedWork:
    """How ranks share the work of one preconditioner.

    Attributes:
        exchange: what they send each other.
        sharing: as the user says.
        frequency: steps between refreshes.
        modes: those to choose from.
    """

    exchange: Exchange
    sharing: WorkSharing
    frequency: int
    modes: tuple[Mode, ...]

    def mode(self, coverage: Coverage, params: Params) -> Mode:
        """What is done with these layers."""
        if self.sharing != "auto":
            return self.sharing
        if not coverage.layers:
            return "none"
        some = next(params[layer.param] for layer in coverage.layers.values())
        itemsize = wide(some).itemsize
        seconds = self.seconds(coverage.layers, RATES.get(some.device.type, RATES["cuda"]), itemsize)
        return min(self.modes, key=lambda mode: round(seconds[mode], 9))

    def seconds(self, layers: Mapping[str, Layer], rates: Rates, itemsize: int) -> dict[Mode, float]:
        """What ``frequency`` steps take in each mode, without what they take in all: the model above."""
        operations, owners = self.exchange.operations(layers), self.exchange.owners(layers)
        ranks, every = self.exchange.world.size, self.frequency
        refresh, apply, refresh_most, apply_most = 0, 0, [0] * ranks, [0] * ranks
        for name, work in operations.items():
            refresh, apply = refresh + work.refresh_flops, apply + work.step_flops
            refresh_most[owners[name]] += work.refresh_flops
            apply_most[owners[name]] += work.step_flops
        inverses = itemsize * self.exchange.numbers(layers)
        factors = itemsize * sum(packed_numel(side) for layer in layers.values() for side in layer.measured)
        gradients = itemsize * sum(n.input.groups * n.input.dim * n.output.dim for n in layers.values())

        def send(size: int) -> float:
            return ranks * rates.latency + size / rates.bandwidth

        dearest = max(refresh_most) / rates.flops
        return {
            "none": refresh / rates.flops + send(factors) + every * apply / rates.flops,
            "inverse": dearest + send(factors) + send(inverses) + every * apply / rates.flops,
            "gradient": dearest + every * (max(apply_most) / rates.flops + send(gradients)),
        }

    def held(self, coverage: Coverage, params: Params) -> Coverage:
        """The coverage of what this rank holds inverses of."""
        return self._own(coverage) if self.mode(coverage, params) == "gradient" else coverage

    def _own(self, coverage: Coverage) -> Coverage:
        mine = self.exchange.mine(coverage.layers)
        kept = {name: layer for name, layer in coverage.layers.items() if name in mine}
        return dataclasses.replace(coverage, layers=kept)

    def shared(self, alone: Transform, exchanging: Transform) -> Transform:
        """The preconditioner of all ranks together.

        Args:
            alone: a preconditioner that knows of no other rank.
            exchanging: one that sends and gets inverses.
        """
        modes: PerCoverage[Mode] = PerCoverage()
        parts: PerCoverage[Coverage] = PerCoverage()

        def mode(coverage: Coverage, params: Params) -> Mode:
            return modes.get(coverage, None, lambda: self.mode(coverage, params))

        def acting(coverage: Coverage, params: Params) -> Transform:
            return exchanging if mode(coverage, params) == "inverse" else alone

        def seen(signals: Signals, params: Params) -> Signals:
            whole = signals.coverage
            return signals.within(parts.get(whole, None, lambda: self.held(whole, params)))

        def init(params: Params, coverage: Coverage) -> State:
            return acting(coverage, params).init(params, self.held(coverage, params))

        def update(updates: Updates, state: State, params: Params, signals: Signals) -> tuple[Updates, State]:
            coverage = signals.coverage
            own = seen(signals, params)
            new, state = acting(coverage, params).update(updates, state, params, own)
            if mode(coverage, params) == "gradient":
                new = self._everybodys(new, coverage)
            return new, state

        def between(state: State, params: Params, signals: Signals, taken: Taken) -> tuple[State, int | None]:
            own = seen(signals, params)
            return after(acting(signals.coverage, params), state, params, own, taken.within(own.coverage))

        hook = None if alone.between is None else between
        return alone._replace(init=init, update=update, between=hook)

    def _everybodys(self, updates: Updates, coverage: Coverage) -> Updates:
        """The updates, those of every layer as its owner has made them."""
        owners = self.exchange.owners(coverage.layers)
        sent: list[dict[str, Tensor]] = [{} for _ in range(self.exchange.world.size)]
        for name, layer in coverage.layers.items():
            sent[owners[name]] |= {param: updates[param] for param in layer.params if param in updates}
        arrived = [update for hand in self.exchange.broadcast(sent) for update in hand.items()]
        return {**updates, **dict(arrived)}


def everything(coverage: Coverage, _params: Params) -> Coverage:
    """What a rank holds inverses of, where every rank does all of the work."""
    return coverage
