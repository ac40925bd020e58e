"""Who inverts what, and what ``work_sharing="auto"`` chooses; :mod:`test_distributed` has what it changes."""

import sys
from collections import Counter
from typing import Any

import pytest
import torch

import thor_fx
from thor_fx.between import run_between
from thor_fx.distributed.collectives import World
from thor_fx.distributed.distribute import shared_work
from thor_fx.distributed.work import RATES, Rates, SharedWork
from thor_fx.factors import measure
from thor_fx.layers import Coverage, Layer
from thor_fx.links import thor_chain
from thor_fx.options import Options
from thor_fx.parameter_groups import ParameterGroups
from thor_fx.passes.layout import Rules
from thor_fx.passes.sides import Side
from thor_fx.schedule import Schedule
from thor_fx.transform import Taken
from training import batches, build, classifier_loss, mlp


def world(rank: int = 0, size: int = 2) -> World:
    return World("any", size, rank, None)


def work(sharing: str = "auto", rank: int = 0, size: int = 2, **options: Any) -> SharedWork:
    found = shared_work(Options(work_sharing=sharing, **options), world(rank, size))  # type: ignore[arg-type]
    assert found is not None
    return found


@pytest.fixture(scope="module")
def found() -> Coverage:
    model = build(mlp)
    params = dict(model.named_parameters())
    layers, _, _ = measure(classifier_loss(model), params, *batches(1)[0], rules=Rules())
    return Coverage(layers, (), {})


@pytest.mark.parametrize("size", [2, 3, 5])
def test_every_layer_has_one_owner(found, size):
    hands = [work(rank=rank, size=size).exchange.mine(found.layers) for rank in range(size)]
    assert sorted(name for hand in hands for name in hand) == sorted(found.layers)
    assert all(len(hand) <= 1 for hand in hands), "two layers of two ranks"


def test_the_dearest_layer_is_dealt_out_first(found):
    costs = {name: work.refresh_flops for name, work in work().exchange.operations(found.layers).items()}
    assert work().exchange.owners(found.layers)[max(costs, key=lambda name: costs[name])] == 0


def test_a_rank_holds_its_own_layers_where_gradients_are_sent(found):
    params = dict(build(mlp).named_parameters())
    assert work("inverse").held(found, params) == found
    parts = [work("gradient", rank).held(found, params).layers for rank in (0, 1)]
    assert parts[0].keys() | parts[1].keys() == found.layers.keys()
    assert not parts[0].keys() & parts[1].keys()


def test_the_model_by_hand(found):
    shared = work("auto", frequency=10, block_size=None)
    rates = Rates(flops=2.0, bandwidth=4.0, latency=8.0)
    operations = [*shared.exchange.operations(found.layers).values()]
    refresh, apply = [w.refresh_flops for w in operations], [w.step_flops for w in operations]
    numbers = 15 + 21 + 21 + 6  # triangles of inverses
    factors = 16 + 4 * ((15 + 21) + (21 + 6)) / 4  # triangles of 5 and 6, and of 6 and 3
    seconds = shared.seconds(found.layers, rates, itemsize=4)
    assert seconds["none"] == sum(refresh) / 2 + factors + 10 * sum(apply) / 2
    assert seconds["inverse"] == max(refresh) / 2 + factors + (16 + 4 * numbers / 4) + 10 * sum(apply) / 2
    weights = 5 * 6 + 6 * 3
    assert seconds["gradient"] == max(refresh) / 2 + 10 * (max(apply) / 2 + 16 + 4 * weights / 4)


@pytest.mark.parametrize(
    ("inverse", "rates", "mode"),
    [
        ("cholesky", Rates(flops=1e9, bandwidth=1e3, latency=1.0), "none"),  # sending is dear
        ("cholesky", Rates(flops=1.0, bandwidth=1e12, latency=1e-9), "gradient"),  # computing is dear
        ("eigen", Rates(flops=1.0, bandwidth=1e12, latency=400.0), "inverse"),  # sending in every step is
    ],
)
def test_auto_takes_what_takes_least_time(found, monkeypatch, inverse, rates, mode):
    monkeypatch.setitem(RATES, "cpu", rates)
    params = dict(build(mlp).named_parameters())
    assert work(frequency=100, inverse=inverse).mode(found, params) == mode
    assert work(frequency=100).mode(Coverage({}, (), {}), params) == "none"


@pytest.mark.parametrize(
    ("sharing", "other", "text"),
    [
        ("inverse", {"refresh_async": True}, r"refresh_async=True.*\['auto', 'none', 'gradient'\]"),
        ("gradient", {"refresh": thor_fx.ByTrace()}, r"ByTrace.*\['auto', 'none', 'inverse'\]"),
        ("gradient", {"damping": thor_fx.LevenbergMarquardt(0.1)}, "LevenbergMarquardt"),
    ],
)
def test_what_needs_all_inverses_is_refused(sharing, other, text):
    with pytest.raises(ValueError, match=text):
        thor_fx.thor(**{"lr": 0.1, "damping": 0.1, "momentum": 0.9, "work_sharing": sharing, **other})


def test_nothing_is_shared_where_there_is_nothing_to_share():
    assert shared_work(Options(work_sharing="gradient"), None) is None
    assert shared_work(Options(work_sharing="gradient", inverse="eva"), world()) is None
    assert shared_work(Options(), world()) is None


def calls_between(count: int, **options: Any) -> list[int]:
    """How many functions run between steps, in two steps behind one another."""
    own = {"work_sharing": "gradient", "refresh": thor_fx.Every(100), "frequency": 100, **options}
    names = [f"w{i}" for i in range(count)]
    layers = {name: Layer(name, name, Side(3), Side(2), (), (), 1, "1") for name in names}
    params, found = {name: torch.zeros(2, 3) for name in names}, Coverage(layers, (), {})
    rates = {"lr": 0.1, "damping": 0.1, "momentum": 0.9, "weight_decay": 0.0}
    schedules = {name: Schedule(name, value) for name, value in rates.items()}
    groups = ParameterGroups(
        {"0": schedules, "1": schedules}, {name: str(i % 2) for i, name in enumerate(names)}
    )
    tx = thor_chain(Options(**own), groups, world())
    state = tx.init(params, found)
    hyper = {name: torch.tensor(0.1) for name in tx.schedules}
    counts = []
    for step in (1, 2):
        calls: Counter[str] = Counter()
        sys.setprofile(lambda _frame, event, _argument, calls=calls: calls.update([event]))
        try:
            run_between(
                tx, state, params, found, list(hyper.values()), Taken(step, frozenset(), frozenset(names))
            )
        finally:
            sys.setprofile(None)
        counts.append(calls["call"] + calls["c_call"])
    return counts


@pytest.mark.parametrize("sharing", ["gradient", "inverse", "auto"])
@pytest.mark.parametrize("fallback", ["sgd", "adamw"])
def test_who_owns_what_is_found_out_once(sharing, fallback):
    few, many = (calls_between(n, work_sharing=sharing, fallback=fallback) for n in (4, 40))
    assert few[0] < many[0], "the first step looks at every layer"
    assert few[1] == many[1], "the second one does not"
