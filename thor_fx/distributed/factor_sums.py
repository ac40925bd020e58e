"""Factors on their way: the triangles of a bucket to all ranks, or each layer's to the rank that reads it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..passes.layout import layer_of
from ..passes.outputs import Factor
from ..passes.sides import Side
from .collectives import World, wait_all
from .delivery import Delivery, Shares, deliver
from .packing import joined, pack, packed_numel, unpack

Bucket = Sequence[Factor]
Hands = Sequence[Bucket]
"""Of a bucket, what every rank reads, in the order of ranks."""


@dataclass(frozen=True)
class FactorSums:
    """Sums of factors over all ranks.

    Attributes:
        world: the ranks.
        sides: of every factor.
        readers: by layer, the rank that alone reads its factors; all ranks read the others.
        dtype: what numbers are rounded to while they travel; None: nothing.
    """

    world: World
    sides: Mapping[Factor, Side]
    readers: Mapping[str, int]
    dtype: torch.dtype | None

    def start(
        self, factors: Mapping[Factor, Tensor], buckets: Sequence[Bucket]
    ) -> Callable[[], dict[Factor, Tensor]]:
        """Begin to add up; what is returned waits for the factors that this rank reads."""
        shared, owned = self.shared(buckets), self.owned(buckets)
        sums = [self.world.sum(self._flat(factors, bucket)) for bucket in shared]
        deliveries = [Delivery(self.world, self.shares(hands)) for hands in owned]
        whole = [[factor for hand in hands for factor in hand] for hands in owned]
        pieces = [d.start(self._flat(factors, bucket)) for d, bucket in zip(deliveries, whole, strict=True)]
        dtypes = {factor: value.dtype for factor, value in factors.items()}  # the values are not kept

        def arrived() -> dict[Factor, Tensor]:
            mine = [*shared, *(hands[self.world.rank] for hands in owned)]
            flats = [*wait_all(sums), *deliver(deliveries, pieces)]
            found: dict[Factor, Tensor] = {}
            for bucket, flat in zip(mine, flats, strict=True):
                found |= self._parted(flat, bucket, dtypes)
            return found

        return arrived

    def shared(self, buckets: Sequence[Bucket]) -> list[Bucket]:
        """What all ranks read, of every bucket."""
        kept = ([factor for factor in bucket if self._reader(factor) is None] for bucket in buckets)
        return [bucket for bucket in kept if bucket]

    def owned(self, buckets: Sequence[Bucket]) -> list[Hands]:
        """What one rank each reads, of every bucket."""
        ranks = range(self.world.size)
        kept = ([[f for f in bucket if self._reader(f) == rank] for rank in ranks] for bucket in buckets)
        return [hands for hands in kept if any(hands)]

    def shares(self, hands: Hands) -> Shares:
        """How many numbers every rank waits for."""
        return Shares(tuple(sum(packed_numel(self.sides[factor]) for factor in hand) for hand in hands))

    def _reader(self, factor: Factor) -> int | None:
        return self.readers.get(layer_of(factor.layer))

    def _flat(self, factors: Mapping[Factor, Tensor], bucket: Bucket) -> Tensor:
        pieces = [pack(factors[factor], self.sides[factor]) for factor in bucket]
        return joined(pieces, self.dtype or pieces[0].dtype)

    def _parted(
        self, flat: Tensor, bucket: Bucket, dtypes: Mapping[Factor, torch.dtype]
    ) -> dict[Factor, Tensor]:
        pieces = flat.split([packed_numel(self.sides[factor]) for factor in bucket])
        return {
            factor: unpack(piece.to(dtypes[factor]), self.sides[factor])
            for factor, piece in zip(bucket, pieces, strict=True)
        }
