"""Embeddings, against products with one-hot and multi-hot rows that are written down."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import models
import oracle
import thor_fx
from dense import assert_factors, case, close, kept, solve, updates
from models import random
from training import (
    assert_moved,
    assert_same,
    build,
    by_both_doors,
    by_drop_in_door,
    by_functional_door,
    snapshot,
)

D = torch.float64
V, WIDTH, PAD = 7, 4, 2
TOKENS = torch.tensor([[0, 2, 1], [5, 1, 1], [2, 2, 3], [6, 1, 0]])
PARAMS = {"w": random(1, D, V, WIDTH), "head": random(2, D, 3, WIDTH)}


def loss_of(h, p, tap=models.no_tap):
    """Of (batch, positions, WIDTH): one term for every datum."""
    h = h.tanh().mean(1)
    return tap("head", h, h @ p["head"].T).sin().sum(-1).mean()


def lookup(tap, p, tokens, padding=None, layer="w"):
    """Rows of the table, as products with one-hot rows; lookups of the padding are no rows."""
    flat = tokens.flatten() % V
    counted = torch.ones_like(flat, dtype=torch.bool) if padding is None else flat != padding
    hot = F.one_hot(flat, V).to(D)[counted]
    found = p["w"].detach()[flat].index_put((counted,), tap(layer, hot, hot @ p["w"]))
    return found.unflatten(0, tokens.shape)


def expect(padding=None, tokens=TOKENS):
    def forward(tap, p, tokens):
        return loss_of(lookup(tap, p, tokens, padding), p, tap)

    return case(forward, PARAMS, tokens, terms=len(tokens))


LOOKUPS = {
    "embedding": lambda p, t: F.embedding(t, p["w"]),
    "indexing": lambda p, t: p["w"][t],
    "index_select": lambda p, t: p["w"].index_select(0, t.flatten()).view(*t.shape, WIDTH),
    "negative": lambda p, t: p["w"][t - V],
    "mixed signs": lambda p, t: p["w"][torch.where(t > 3, t - V, t)],
    "scaled": lambda p, t: F.embedding(t, p["w"], scale_grad_by_freq=True),
}


@pytest.mark.parametrize("how", LOOKUPS)
def test_every_spelling_of_a_lookup(how):
    found = thor_fx.factors(lambda p, t: loss_of(LOOKUPS[how](p, t), p), PARAMS, TOKENS)
    assert_factors(found, oracle.factors(expect()))
    assert found["w"].kind == "embedding"
    counts = torch.bincount(TOKENS.flatten(), minlength=V)
    close(found["w"].A, counts.to(D) / TOKENS.numel(), 1e-14)


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("padding", [PAD, PAD - V])
def test_lookups_of_the_padding_are_no_rows(scale, padding):
    def loss_fn(p, t):
        return loss_of(F.embedding(t, p["w"], padding_idx=padding, scale_grad_by_freq=scale), p)

    found = thor_fx.factors(loss_fn, PARAMS, TOKENS)
    expected = oracle.factors(expect(PAD))
    assert expected["w"].A[PAD, PAD] == 0
    A, G = expected["w"].A.diagonal(), expected["w"].G
    close(found["w"].A, A)
    close(found["w"].G, G)


def test_a_table_of_matrices():
    """W[idx] where every entry is (2, 3): one side has its six numbers."""
    w = random(3, D, V, 2, 3)

    def forward(tap, p, tokens):
        hot = F.one_hot(tokens, V).to(D)
        return tap("w", hot, hot @ p["w"].flatten(1)).sin().sum(-1).mean()

    def loss_fn(p, tokens):
        return p["w"][tokens].sin().sum((-1, -2)).mean()

    tokens = TOKENS[:, 0]
    assert_factors(
        thor_fx.factors(loss_fn, {"w": w}, tokens),
        oracle.factors(case(forward, {"w": w}, tokens, terms=4)),
    )


def test_a_table_that_is_looked_up_twice():
    def forward(tap, p, one, two):
        return loss_of(lookup(tap, p, one), p, tap) + loss_of(lookup(tap, p, two), p, tap)

    def loss_fn(p, one, two):
        return loss_of(F.embedding(one, p["w"]), p) + loss_of(p["w"][two], p)

    batch = TOKENS, TOKENS[:, :2].flip(0)
    assert_factors(
        thor_fx.factors(loss_fn, PARAMS, *batch), oracle.factors(case(forward, PARAMS, *batch, terms=4))
    )


@pytest.mark.parametrize("rule", ["factor", "sqrt", "pi"])
@pytest.mark.parametrize("scale", [False, True])
def test_the_update_is_a_dense_solve(rule, scale):
    """The gradient is the one that torch makes, scaled by frequency or not; the factors are the same."""

    def loss_fn(p, t):
        return loss_of(F.embedding(t, p["w"], scale_grad_by_freq=scale), p)

    pair = oracle.factors(expect())["w"]
    _, gradients = oracle.loss_and_gradients(expect())
    gradient = gradients["w"]
    if scale:
        gradient = gradient / torch.bincount(TOKENS.flatten(), minlength=V).clamp(min=1)[:, None]
    found = updates(loss_fn, PARAMS, TOKENS, damping_rule=rule)["w"]
    close(found, solve(kept(pair.A, "diagonal"), pair.G, gradient.T, rule).T)


# --- bags ------------------------------------------------------------------------------------------

ENTRIES = torch.tensor([0, 1, 1, 3, 5, 2, 1, 6, 6, 6])
STARTS = torch.tensor([0, 3, 3, 5, 10])  # the second bag and the last are empty
WEIGHTS = random(4, D, len(ENTRIES))


def multi_hot(weights, mode, padding):
    rows = torch.zeros(len(STARTS), V, dtype=D)
    ends = [*STARTS[1:].tolist(), len(ENTRIES)]
    for bag, (start, end) in enumerate(zip(STARTS.tolist(), ends, strict=True)):
        members = [i for i in range(start, end) if ENTRIES[i] != padding]
        for i in members:
            share = 1 / len(members) if mode == "mean" else 1
            rows[bag, ENTRIES[i]] += share * (1 if weights is None else weights[i])
    return rows


@pytest.mark.parametrize("padding", [None, 1])
@pytest.mark.parametrize("mode", ["sum", "mean", "weighted"])
@pytest.mark.parametrize("last", [False, True])
def test_bags(mode, padding, last):
    weights = (WEIGHTS,) if mode == "weighted" else ()
    name = "sum" if weights else mode
    starts = torch.cat([STARTS, torch.tensor([len(ENTRIES)])]) if last else STARTS

    def loss_fn(p, entries, starts, *weights):
        options = {"per_sample_weights": weights[0]} if weights else {}
        h = F.embedding_bag(
            entries, p["w"], starts, mode=name, padding_idx=padding, include_last_offset=last, **options
        )
        return loss_of(h[:, None], p)

    def forward(tap, p, *_):
        rows = multi_hot(WEIGHTS if weights else None, name, padding)
        return loss_of(tap("w", rows, rows @ p["w"])[:, None], p, tap)

    expected = case(forward, PARAMS, terms=len(STARTS))
    batch = ENTRIES, starts, *weights
    assert_factors(thor_fx.factors(loss_fn, PARAMS, *batch), oracle.factors(expected))
    pair, gradient = oracle.factors(expected)["w"], oracle.loss_and_gradients(expected)[1]["w"]
    close(
        updates(loss_fn, PARAMS, *batch)["w"],
        solve(kept(pair.A, "diagonal"), pair.G, gradient.T).T,
    )


def test_the_maximum_of_a_bag_is_no_linear_map():
    def loss_fn(p, entries, starts):
        return loss_of(F.embedding_bag(entries, p["w"], starts, mode="max")[:, None], p)

    report = thor_fx.explain(loss_fn, PARAMS, ENTRIES, STARTS)
    assert "the maximum of a bag" in report.coverage.fallback["w"]
    _, gradients = oracle.loss_and_gradients(
        case(lambda _, p, *b: loss_fn(p, *b), PARAMS, ENTRIES, STARTS, terms=1)
    )
    close(updates(loss_fn, PARAMS, ENTRIES, STARTS)["w"], gradients["w"])


# --- a table that is the head, too -----------------------------------------------------------------


@pytest.mark.parametrize("rule", ["factor", "sqrt", "pi"])
def test_the_update_of_a_tied_head_is_a_dense_solve(rule):
    tied = models.tied_embedding()
    pair = oracle.factors(tied)["w"]
    gradient = oracle.loss_and_gradients(tied)[1]["w"]
    found = updates(tied.loss_fn, tied.params, *tied.batch, damping_rule=rule)["w"]
    close(found, solve(pair.A, pair.G, gradient, rule))


class Reader(nn.Module):
    """The mean of what the tokens say."""

    def __init__(self, **settings):
        super().__init__()
        self.table = nn.Embedding(V, WIDTH, **settings)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, tokens):
        return self.head(self.table(tokens).tanh().mean(1))


class Bags(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.EmbeddingBag(V, WIDTH, mode="mean", padding_idx=1), nn.Linear(WIDTH, 3)

    def forward(self, tokens):
        return self.head(self.table(tokens).tanh())


class TiedReader(nn.Module):
    """Its scores are over the vocabulary."""

    def __init__(self):
        super().__init__()
        self.table, self.middle = nn.Embedding(V, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, V, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        return self.head(self.middle(self.table(tokens).tanh().mean(1)))


SETTINGS = {"lr": 0.1, "damping": 0.1, "momentum": 0.9, "frequency": 2}
READERS = {
    "plain": Reader,
    "padded": lambda: Reader(padding_idx=PAD),
    "scaled": lambda: Reader(padding_idx=PAD, scale_grad_by_freq=True),
    "bags": Bags,
    "tied": TiedReader,
}


def tokens_and_labels(count):
    return [(TOKENS.roll(i, 0) * (i + 1) % V, torch.tensor([0, 2, 1, i % 3])) for i in range(count)]


@pytest.mark.parametrize("make", READERS.values(), ids=READERS)
def test_both_doors_take_the_same_steps(make):
    data = tokens_and_labels(4)
    trajectory = by_both_doors(lambda: build(make), data, 1e-10, **SETTINGS)
    assert_moved(trajectory, snapshot(dict(build(make).named_parameters())))


def test_a_decomposed_backward_pass_has_the_same_factors():
    """Inductor takes the backward pass of an embedding apart: padding and scaling are nodes of their own."""
    data = tokens_and_labels(3)
    functional = by_functional_door(build(READERS["scaled"]), data, **SETTINGS)
    for backend in ("inductor", "aot_eager"):
        model = build(READERS["scaled"])
        assert_same(by_drop_in_door(model, data, backend=backend, **SETTINGS), functional, rtol=1e-10)
