"""Sums over all ranks of numbers that one rank each waits for.

An all-reduce leaves every rank with one piece of the sums, and then gives all pieces to all ranks. Where a
number has one reader, the second half is not needed. Numbers lie in the order of their readers::

    wanted   | of rank 0   | of rank 1       | of rank 2 |
    pieces   |   rank 0    |   rank 1    |   rank 2    |    equal, the last one padded

Every rank adds up its piece (a reduce-scatter), and hands on what others wait for: where readers want about
as much, next to nothing; never more than an all-reduce would send.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from torch import Tensor
from torch.nn.functional import pad

from .collectives import World, wait


@dataclass(frozen=True)
class Shares:
    """How the numbers of several readers lie behind each other, and in which pieces they are added up.

    Attributes:
        lengths: how many numbers each rank waits for.

    Example:
        >>> shares = Shares((4, 1, 1))
        >>> shares.piece, shares.held(0, by=1), shares.moved(0), shares.moved(2)
        (2, 2, 2, 0)
    """

    lengths: tuple[int, ...]

    @cached_property
    def stops(self) -> tuple[int, ...]:
        """Where the numbers of each reader end."""
        return tuple(accumulate(self.lengths))

    @property
    def piece(self) -> int:
        """How many numbers a rank adds up."""
        return -(-self.stops[-1] // len(self.lengths))

    @property
    def padding(self) -> int:
        """How many zeros fill the last piece."""
        return self.piece * len(self.lengths) - self.stops[-1]

    @property
    def in_place(self) -> bool:
        """Whether every piece is what its rank waits for, so that nothing is handed on."""
        return not any(self.moved(reader) for reader in range(len(self.lengths)))

    def held(self, reader: int, by: int) -> int:
        """How many of the numbers of a reader are added up by a rank."""
        stop, first = self.stops[reader], by * self.piece
        start = stop - self.lengths[reader]
        return max(0, min(stop, first + self.piece) - max(start, first))

    def moved(self, reader: int) -> int:
        """How many of the numbers of a reader are added up by others."""
        return self.lengths[reader] - self.held(reader, by=reader)


@dataclass(frozen=True)
class Delivery:
    """One collective, or two, for the numbers of all readers.

    Attributes:
        world: the ranks.
        shares: what each of them waits for.
    """

    world: World
    shares: Shares

    def start(self, numbers: Tensor) -> Tensor:
        """Begin to add up flat numbers, which lie in the order of their readers."""
        return self.world.scattered_sum(pad(numbers, (0, self.shares.padding)))

    def hand_on(self, started: Tensor) -> Tensor:
        """Wait for the piece of this rank, and begin to send what others wait for."""
        piece, rank, ranks = wait(started), self.world.rank, range(self.world.size)
        if self.shares.in_place:
            return piece
        gives = [self.shares.held(reader, by=rank) for reader in ranks]
        gets = [self.shares.held(rank, by=other) for other in ranks]
        return self.world.exchange(piece[: sum(gives)], gives, gets)

    def arrived(self, handed_on: Tensor) -> Tensor:
        """The sums that this rank waits for."""
        found = handed_on if self.shares.in_place else wait(handed_on)
        return found[: self.shares.lengths[self.world.rank]]


def deliver(deliveries: Sequence[Delivery], started: Sequence[Tensor]) -> list[Tensor]:
    """The sums that this rank waits for, of several deliveries that run together."""
    handed_on = [delivery.hand_on(one) for delivery, one in zip(deliveries, started, strict=True)]
    return [delivery.arrived(one) for delivery, one in zip(deliveries, handed_on, strict=True)]
