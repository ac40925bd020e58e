"""Factors that are added up over ranks before an update sees them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from ..factors import Moments, flat_moments, moments_of
from ..layers import Coverage
from ..passes.layout import layer_of
from ..passes.outputs import Factor
from ..transform import Params
from .averaging import Averaging, members
from .factor_sums import Bucket, FactorSums
from .faults import waiting_for_others


@dataclass(frozen=True)
class Sending:
    """How the factors of some layers are added up.

    Attributes:
        averaging: how they travel.
        found: the layers.
        params: the parameters, by name.
    """

    averaging: Averaging
    found: Coverage
    params: Params

    @cached_property
    def readers(self) -> Mapping[str, int]:
        """By layer, the rank that alone reads its factors; all ranks read the others."""
        return self.averaging.readers(self.found, self.params)

    @cached_property
    def _sums(self) -> FactorSums:
        return self.averaging.factor_sums(self.found, self.readers)

    def buckets(self, factors: Mapping[Factor, Tensor], found: Coverage | None = None) -> list[Bucket]:
        """What travels together of the factors of some layers, or of all; their values are not read."""
        itemsize = next((factor.element_size() for factor in factors.values()), 0)
        layers = self.averaging.buckets(self.found if found is None else found, itemsize, self.readers)
        return members(layers, factors)

    def send(
        self, factors: Mapping[Factor, Tensor], buckets: Sequence[Bucket] | None = None
    ) -> Callable[[], dict[Factor, Tensor]]:
        """Begin to add up factors over all ranks; what is returned waits for those that this rank reads.

        All ranks call this together, in one order.

        Args:
            factors: those of this rank.
            buckets: what travels together; None: see :meth:`buckets`.
        """
        waiting = partial(waiting_for_others, self.averaging.world, "to add up factors")
        with waiting(), torch.no_grad():
            arrived = self._sums.start(factors, self.buckets(factors) if buckets is None else buckets)

        def awaited() -> dict[Factor, Tensor]:
            with waiting(), torch.no_grad():
                return arrived()

        return awaited

    def of_all_ranks(
        self, moments: Mapping[str, Moments], arrived: Mapping[Factor, Tensor]
    ) -> dict[str, Moments]:
        """Moments of the rows of this rank, with factors of all rows where this rank reads them.

        Args:
            moments: with factors that have not been sent.
            arrived: sums of those that have.
        """
        flat = flat_moments({n: m for n, m in moments.items() if layer_of(n) in self.found.layers})
        own = {d: value for d, value in flat.items() if isinstance(d, Factor)}
        counts = {d: value for d, value in flat.items() if d not in own}
        sums = dict(arrived)
        for factor, value in (self.send(own)() if own else {}).items():
            sums[factor] = sums[factor] + value if factor in sums else value
        return moments_of(counts | sums)
