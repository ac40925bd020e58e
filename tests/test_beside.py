"""Rounds of one rank, without others; :mod:`test_distributed` has several ranks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from thor_fx.distributed.beside import Beside
from thor_fx.passes.outputs import Factor

A, B, C = (Factor(name, "A") for name in "abc")


class Alone:
    """In place of a lane and of what sends along it: the sums are those of this rank."""

    def __init__(self, plan: Sequence[Sequence[Factor]]) -> None:
        self.averages, self.counted = True, torch.zeros((), requires_grad=True)
        self.readers: dict[str, int] = {}
        self.sent: list[dict[str, float]] = []
        self._plan = plan

    def plan(self, _sending: Any, _slots: Any) -> list[Sequence[Factor]]:
        return list(self._plan)

    def send(self, factors: Mapping[Factor, Tensor], buckets: Any) -> Callable[[], Mapping[Factor, Tensor]]:
        assert buckets == [list(factors)]
        self.sent.append({factor.layer: float(value) for factor, value in factors.items()})
        return lambda: factors


class Rank:
    """What backward passes deliver."""

    def __init__(self, *plan: Sequence[Factor]) -> None:
        self.lane, self.due = Alone(plan), True
        self.slots = {factor: torch.zeros((), requires_grad=True) for factor in (A, B, C)}
        lane: Any = self.lane
        self.beside = Beside(lane, lane, self.slots, lambda: self.due)

    def backward(self, *made: tuple[Factor, float], averages: bool = True) -> None:
        """Factors are made in this order."""
        self.lane.averages = averages
        for factor, value in made:
            (self.slots[factor] * value).backward()
        self.lane.counted.backward(torch.ones(()))

    def settle(self) -> dict[str, float]:
        return {factor.layer: float(value) for factor, value in self.beside.settle().items()}


def test_a_bucket_leaves_with_the_last_of_its_factors():
    rank = Rank([C], [A, B])
    rank.backward((C, 3.0), (B, 2.0))
    assert rank.lane.sent == [{"c": 3.0}]
    rank.backward((A, 1.0))
    assert rank.lane.sent == [{"c": 3.0}, {"a": 1.0, "b": 2.0}]


def test_buckets_leave_in_the_order_of_the_plan():
    rank = Rank([C], [B], [A])
    rank.backward((A, 1.0), (B, 2.0))
    assert rank.lane.sent == []
    rank.backward((C, 3.0))
    assert rank.lane.sent == [{"c": 3.0}, {"b": 2.0}, {"a": 1.0}]


def test_what_a_rank_has_not_made_is_sent_as_zeros():
    rank = Rank([C], [B, A])
    rank.backward((A, 1.0))
    assert rank.settle() == {"a": 1.0, "b": 0.0, "c": 0.0}
    assert rank.lane.sent == [{"c": 0.0}, {"b": 0.0, "a": 1.0}]


def test_passes_that_are_not_averaged_are_kept_for_the_next():
    rank = Rank([C], [B], [A])
    rank.backward((A, 1.0), (B, 2.0), (C, 3.0), averages=False)
    assert rank.lane.sent == []
    rank.backward((C, 30.0), (B, 20.0), (A, 10.0))
    assert rank.lane.sent == [{"c": 33.0}, {"b": 22.0}, {"a": 11.0}]
    assert rank.settle() == {"a": 11.0, "b": 22.0, "c": 33.0}
    assert all(slot.grad is None for slot in rank.slots.values())


@pytest.mark.parametrize("made", [[A, B, C], [C], []])
def test_there_is_a_round_for_every_pass_whatever_it_makes(made):
    rank = Rank([C], [B, A])
    rank.backward(*((factor, 1.0) for factor in made))
    rank.backward((C, 1.0), (B, 1.0), (A, 1.0))
    sums = rank.settle()
    assert len(rank.lane.sent) == 4
    assert sums == {factor.layer: 1.0 + (factor in made) for factor in (A, B, C)}


def test_there_is_no_round_where_none_is_due():
    rank = Rank([C], [B, A])
    rank.due = False
    rank.backward()
    assert rank.settle() == {}
    assert rank.lane.sent == []


def test_nothing_is_counted_twice():
    rank = Rank([C], [B, A])
    rank.backward((C, 1.0), (B, 1.0), (A, 1.0))
    assert rank.settle() == {"a": 1.0, "b": 1.0, "c": 1.0}
    assert rank.settle() == {}


def test_one_that_is_closed_leaves_slots_alone():
    rank = Rank([C], [B, A])
    rank.beside.close()
    rank.backward((C, 1.0), (B, 1.0), (A, 1.0))
    assert rank.lane.sent == []
    assert all(slot.grad is not None for slot in rank.slots.values())
    assert rank.settle() == {}
