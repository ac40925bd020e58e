"""Parameters of which every rank has a part, and one rank, its owner, makes the update.

Every rank sends its parts of a gradient to the owner of the parameter, which puts them together; the update
goes back the same way. Each is one all-to-all for all parameters. Where several ranks have the same part
(replicas) the first of them sends it, and all of them get it back.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..layers import Coverage
from .boxes import Box, together
from .collectives import World, wait
from .packing import joined


class Leg(NamedTuple):
    """A part of a parameter that one rank sends and one gets; both may be the same."""

    name: str
    box: Box
    source: int
    target: int


@dataclass(frozen=True)
class Parts:
    """Who has what.

    Attributes:
        world: the ranks.
        shapes: of whole parameters, by name; all ranks have the same names in the same order.
        boxes: by name, the part that each rank has, in the order of ranks.
        owners: by name, the rank that makes the update.
    """

    world: World
    shapes: Mapping[str, tuple[int, ...]]
    boxes: Mapping[str, Sequence[Box]]
    owners: Mapping[str, int]

    @cached_property
    def own(self) -> frozenset[str]:
        """The parameters of this rank."""
        return frozenset(name for name, owner in self.owners.items() if owner == self.world.rank)

    def readers(self, coverage: Coverage, _params: Mapping[str, Tensor]) -> dict[str, int]:
        """The rank that alone reads the factors of a layer, its owner."""
        return {name: self.owners[layer.param] for name, layer in coverage.layers.items()}

    def held(self, coverage: Coverage, _params: Mapping[str, Tensor]) -> Coverage:
        """The part of a coverage that speaks of this rank's parameters."""
        return coverage.restrict(self.own)

    def stand_ins(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's own parameters as zeros, which take no memory: for their shape, dtype and device."""
        own = {name: part for name, part in parts.items() if name in self.own}
        return {name: part.new_zeros(()).expand(self.shapes[name]) for name, part in own.items()}

    def to_owners(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's own parameters, whole.

        Args:
            parts: by name, those of this rank; all ranks pass the same names.
        """
        pieces: dict[str, dict[Box, Tensor]] = {}
        for same in _by_dtype(parts):
            legs = [leg for name in same for leg in self._to_owner(name)]
            for leg, part in self._carried(legs, lambda leg: parts[leg.name], same):
                pieces.setdefault(leg.name, {})[leg.box] = part
        return {name: together(pieces[name]) for name in parts if name in pieces}

    def to_holders(self, wholes: Mapping[str, Tensor], parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parts of this rank.

        Args:
            wholes: this rank's own parameters.
            parts: by name, tensors of the shapes, dtypes and device of the result; all ranks pass the same
                names.
        """
        found: dict[str, Tensor] = {}
        for same in _by_dtype(parts):
            legs = [leg for name in same for leg in self._to_holders(name)]
            carried = self._carried(legs, lambda leg: leg.box.of(wholes[leg.name]), same)
            found |= {leg.name: part for leg, part in carried}
        return {name: found[name] for name in parts}

    def _to_owner(self, name: str) -> Iterator[Leg]:
        ranks: dict[Box, int] = {}
        for rank, box in enumerate(self.boxes[name]):
            ranks.setdefault(box, rank)
        return (Leg(name, box, rank, self.owners[name]) for box, rank in ranks.items())

    def _to_holders(self, name: str) -> Iterator[Leg]:
        return (Leg(name, box, self.owners[name], rank) for rank, box in enumerate(self.boxes[name]))

    def _carried(
        self, legs: Sequence[Leg], sent: Callable[[Leg], Tensor], like: Mapping[str, Tensor]
    ) -> list[tuple[Leg, Tensor]]:
        """What this rank gets.

        Args:
            legs: of all ranks, in an order that is the same for all.
            sent: what goes the way of a leg of this rank.
            like: some tensors in the dtype and on the device of all that is sent.
        """
        me, ranks = self.world.rank, range(self.world.size)
        going = [[leg for leg in legs if (leg.source, leg.target) == (me, rank)] for rank in ranks]
        coming = [[leg for leg in legs if (leg.source, leg.target) == (rank, me)] for rank in ranks]
        pieces = [sent(leg) for hand in going for leg in hand]
        flat = joined(pieces) if pieces else next(iter(like.values())).new_empty(0)
        arrived = wait(self.world.exchange(flat, _sizes(going), _sizes(coming)))
        expected = [leg for hand in coming for leg in hand]
        parts = arrived.split([leg.box.numel for leg in expected]) if expected else []
        return [(leg, part.view(leg.box.shape)) for leg, part in zip(expected, parts, strict=True)]


def _sizes(hands: Sequence[Sequence[Leg]]) -> list[int]:
    return [sum(leg.box.numel for leg in hand) for hand in hands]


def _by_dtype(parts: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    kinds: dict[torch.dtype, dict[str, Tensor]] = {}
    for name, part in parts.items():
        kinds.setdefault(part.dtype, {})[name] = part
    return list(kinds.values())
