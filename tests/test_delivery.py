"""Sums of which every rank gets its own: who adds up what, and what is handed on."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from thor_fx.distributed.delivery import Shares


def delivered(shares: Shares, total: Tensor) -> list[Tensor]:
    """What every rank gets, by the counts of what each pair of ranks sends."""
    ranks = range(len(shares.lengths))
    padded = torch.cat([total, total.new_zeros(shares.padding)])
    sent = [
        piece.split([*(shares.held(r, by=rank) for r in ranks), _rest(shares, rank)])
        for rank, piece in enumerate(padded.split(max(1, shares.piece))[: len(ranks)])
    ]
    return [torch.cat([parts[reader] for parts in sent]) for reader in ranks]


def _rest(shares: Shares, rank: int) -> int:
    return shares.piece - sum(shares.held(r, by=rank) for r in range(len(shares.lengths)))


lengths = st.lists(st.integers(0, 9), min_size=2, max_size=5).filter(any)


@given(lengths)
def test_every_rank_gets_its_own_numbers_in_order(lengths):
    shares = Shares(tuple(lengths))
    total = torch.arange(sum(lengths))
    found = delivered(shares, total)
    assert all(torch.equal(one, want) for one, want in zip(found, total.split(lengths), strict=True))


@given(lengths)
def test_no_rank_sends_or_gets_more_than_in_an_all_reduce(lengths):
    shares, ranks = Shares(tuple(lengths)), range(len(lengths))
    for rank in ranks:
        given = sum(shares.held(r, by=rank) for r in ranks if r != rank)
        assert given <= shares.piece
        assert shares.moved(rank) <= shares.piece * (len(lengths) - 1)


@pytest.mark.parametrize(
    ("lengths", "moved"), [((3, 3, 3), [0, 0, 0]), ((5, 4), [0, 0]), ((4, 5), [0, 1]), ((0, 0, 9), [0, 0, 6])]
)
def test_what_is_wanted_where_it_is_added_up_is_not_sent(lengths, moved):
    shares = Shares(lengths)
    assert [shares.moved(rank) for rank in range(len(lengths))] == moved
    assert shares.in_place == (not any(moved))
