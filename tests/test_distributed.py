"""Training on several ranks is training in one process on the whole batch; all ranks stay equal, bit by bit.

One launch for each number of ranks; :mod:`rank_runs` has the code that the ranks run.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import rank_runs
import thor_fx
from rank_runs import EXACT, MODELS, OPTIONS, ROWS, RUNS, SETTINGS, STEPS
from ranks import Results, all_equal, run_on_ranks, shared
from training import (
    Parameters,
    assert_moved,
    assert_same,
    batches,
    build,
    by_functional_door,
    compiled,
    identical,
    snapshot,
    train,
    train_by_closures,
)

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed here"),
    # Dynamo's, of what a graph break hands on
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]

ALSO_FOUR = {"unweighted", "accumulated", "factors of all", "factors of owners"}
FOUR = [name for name in RUNS if name in ALSO_FOUR or name.split()[-1] in MODELS]


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_on_ranks(list(RUNS), 2, shared(tmp_path_factory) / "two ranks")


@pytest.fixture(scope="session")
def four(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_on_ranks(FOUR, 4, shared(tmp_path_factory) / "four ranks")


@pytest.fixture(params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> Results:
    return request.getfixturevalue("two" if request.param == 2 else "four")


@functools.cache
def in_one_process(make: str, options: str = "defaults") -> list[Parameters]:
    model = compiled(MODELS[make])
    optimizer = thor_fx.Thor(model, **{**SETTINGS, **OPTIONS[options]})
    return train_by_closures(model, optimizer, batches(rank_runs.steps(options), ROWS))


@pytest.mark.parametrize("make", ["mlp", "cnn", "encoder", "tied"])
def test_ranks_in_a_wrapper_are_one_process(ranks, make):
    expected = in_one_process(make)
    assert_moved(expected, snapshot(dict(build(MODELS[make]).named_parameters())))
    assert_same(all_equal(ranks[f"ddp {make}"]), expected, rtol=1e-10)


@pytest.mark.parametrize("make", ["mlp", "cnn", "encoder"])
def test_ranks_of_the_functional_door_are_one_process(ranks, make):
    assert_same(all_equal(ranks[f"functional {make}"]), in_one_process(make), rtol=1e-10)


@pytest.mark.parametrize(
    ("door", "options"), [(door, name) for door, names in EXACT.items() for name in names]
)
def test_every_option_is_that_of_one_process(two, door, options):
    expected = in_one_process("normalised", options)
    assert_same(all_equal(two[f"{door} with {options}"]), expected, rtol=1e-9)


def test_rounded_factors_are_nearly_those_of_one_process(two):
    rounded, exact = all_equal(two["rounded"]), in_one_process("mlp")
    assert_same(rounded, exact, rtol=1e-2)
    assert not identical(rounded[-1], all_equal(two["functional mlp"])[-1]), "nothing was rounded"


def test_a_compiled_wrapper_is_a_wrapped_compiled_model(two):
    assert all(map(identical, all_equal(two["around"]), all_equal(two["ddp mlp"])))


@pytest.mark.inductor
@pytest.mark.parametrize("door", ["ddp", "functional"])
def test_compiled_ranks_are_one_process(two, door):
    assert_same(all_equal(two[f"inductor {door}"]), in_one_process("mlp"), rtol=1e-10)


def test_unequal_shares_with_a_weighted_loss_are_one_process(two):
    model = compiled(MODELS["mlp"])
    expected = train(model, thor_fx.Thor(model, **SETTINGS), batches(STEPS, 7))
    assert_same(all_equal(two["weighted"]), expected, rtol=1e-10)


def mean_of_means(sizes: list[int]) -> Callable[..., Tensor]:
    """The loss that ranks minimise whose losses are means over their own rows."""

    model = build(MODELS["mlp"])

    def loss_fn(params: Parameters, x: Tensor, y: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, params, (x,))
        parts = zip(logits.split(sizes), y.split(sizes), strict=True)
        return torch.stack([F.cross_entropy(*part) for part in parts]).mean()

    return loss_fn


@pytest.mark.parametrize("size", [2, 4])
def test_unequal_shares_minimise_the_mean_of_their_losses(request, size):
    results = request.getfixturevalue("two" if size == 2 else "four")["unweighted"]
    sizes = [7 - (size - 1) * (6 // size), *[6 // size] * (size - 1)]
    params: Any = snapshot(dict(build(MODELS["mlp"]).named_parameters()))
    step = thor_fx.compile_step(mean_of_means(sizes), thor_fx.thor(**SETTINGS, batch_size=7), backend="eager")
    data, expected = batches(STEPS, 7), []
    state = step.init(params, *data[0])
    for batch in data:
        params, state, _ = step(params, state, *batch)
        expected.append(snapshot(params))
    assert_same(all_equal(results), expected, rtol=1e-10)


def test_micro_batches_without_sync_are_one_process(ranks):
    model = compiled(MODELS["mlp"])
    optimizer, expected = thor_fx.Thor(model, **SETTINGS), []
    data = batches(2 * STEPS, ROWS)
    for pair in zip(data[::2], data[1::2], strict=True):
        for x, y in pair:
            (F.cross_entropy(model(x), y) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(snapshot(dict(model.named_parameters())))
    assert_same(all_equal(ranks["accumulated"]), expected, rtol=1e-10)


def test_factors_travel_beside_the_rest_of_backward(two):
    """Those of a graph start when it has made them, and no rank waits for the step."""
    trajectories, events = zip(*two["beside"], strict=True)
    model = compiled(MODELS["broken"])
    optimizer = thor_fx.Thor(model, **rank_runs.EVERY_STEP)
    expected = train_by_closures(model, optimizer, batches(STEPS, ROWS))
    assert_same(all_equal(list(trajectories)), expected, rtol=1e-9)
    graphs = ["sum head.weight", "sum mid.weight", "sum inp.weight"]
    for first, *others in events:
        assert first.index("over") < min(map(first.index, set(first) - set(gradients(first)) - {"over"}))
        for step in others:
            assert [event for event in step if event.startswith("sum")] == graphs, "one order"
            assert step.index("sum head.weight") < step.index("made mid.weight"), step
            assert step.index("sum mid.weight") < step.index("made inp.weight"), step
            assert step.index("sum inp.weight") < step.index("over"), step


def gradients(events: list[str]) -> list[str]:
    return [event for event in events if event.startswith("made")]


def test_a_model_that_is_cut_at_the_buckets_of_ddp_is_one_process(two):
    trajectories, graphs = zip(*two["cut"], strict=True)
    assert min(graphs) > 1
    assert_same(all_equal(list(trajectories)), in_one_process("wide"), rtol=1e-9)


def test_ranks_may_run_other_graphs(two):
    """In one process: two runs of one loss, which has the terms of both."""
    model = compiled(MODELS["broken"])
    optimizer, expected = thor_fx.Thor(model, **rank_runs.EVERY_STEP, batch_size=ROWS), []
    for step, (x, y) in enumerate(batches(STEPS, ROWS)):
        ways = (False, step in rank_runs.OTHER_WAY)
        logits = [model(part, other_way=way) for part, way in zip(x.chunk(2), ways, strict=True)]
        F.cross_entropy(torch.cat(logits), y).backward()
        rank_runs.take_step(model, optimizer, expected)
    assert_same(all_equal(two["branches"]), expected, rtol=1e-9)


def test_ranks_may_run_other_passes(two):
    model = compiled(MODELS["mlp"])
    optimizer, expected = thor_fx.Thor(model, **rank_runs.EVERY_STEP), []
    half = ROWS // 2
    for names in (
        ["first"],
        ["second", "third of one rank", "fourth"],
        ["first", "second"],
        ["third", "fourth"],
    ):
        for name in names:
            x, y = rank_runs.PASSES[name.split()[0]]
            for part in range(1 if "one rank" in name else 2):
                rows = slice(part * half, (part + 1) * half)
                (F.cross_entropy(model(x[rows]), y[rows]) / 4).backward()
        rank_runs.take_step(model, optimizer, expected)
    assert_same(all_equal(two["passes"]), expected, rtol=1e-9)


def test_a_layer_that_is_found_late_has_an_owner_and_all_ranks_stay_equal(two):
    """Its factors were on their way to nobody, and those of the others to their owners before."""
    trajectories, owned = zip(*two["late layer"], strict=True)
    found = all_equal(list(trajectories))
    assert_moved(found, snapshot(dict(build(MODELS["broken"]).named_parameters())))
    assert not torch.equal(found[-1]["mid.weight"], found[-2]["mid.weight"]), "it has inverses"
    assert sorted(owned[0] + owned[1]) == ["head.weight", "inp.weight", "mid.weight"]


def test_factors_are_summed_behind_backward_where_a_rank_may_leave_out_parameters(two):
    assert all(map(identical, all_equal(two["unused"]), all_equal(two["ddp mlp"])))


def test_when_collectives_start_changes_nothing(two):
    assert all(map(identical, all_equal(two["early"]), all_equal(two["late"])))


def test_buckets_and_doors_change_nothing(two):
    whole = all_equal(two["ddp with defaults"])
    assert all(map(identical, all_equal(two["ddp with split"]), whole)), "sums of two ranks have one order"
    assert_same(
        by_functional_door(build(MODELS["normalised"]), batches(STEPS, ROWS), **SETTINGS), whole, 1e-10
    )


def test_ranks_that_draw_other_labels_stay_equal(two):
    sampled = all_equal(two["sampled"])
    assert_moved(sampled, snapshot(dict(build(MODELS["normalised"]).named_parameters())))
    assert not identical(sampled[-1], in_one_process("normalised")[-1])


def test_a_block_size_that_is_chosen_is_that_of_all_ranks(two):
    *found, chosen = all_equal(two["auto blocks"])
    model = compiled(MODELS["normalised"])
    optimizer = thor_fx.Thor(model, **SETTINGS, block_size=int(chosen["block size"]))
    assert_same(found, train_by_closures(model, optimizer, batches(STEPS, ROWS)), rtol=1e-9)


def test_a_rank_that_cannot_choose_a_block_size_stops_all(two):
    first, last = two["not finite"]
    assert last.startswith("ValueError: the factor A of '0.weight' is not finite"), last
    assert first.startswith("AnotherRankFailed: rank 1 has stopped, so all ranks do: ValueError: the f"), (
        first
    )


@pytest.mark.parametrize("how", ["wrapped", "group"])
def test_an_overflow_on_one_rank_skips_the_step_on_all(two, how):
    found = all_equal(two[f"overflow {how}"])
    assert [int(step.pop("skipped")) for step in map(dict.copy, found)] == [0, 1, 1, 1]
    params = [{name: value for name, value in step.items() if name != "skipped"} for step in found]
    assert identical(params[0], params[1])
    data = batches(STEPS, ROWS)
    model = compiled(MODELS["normalised"])
    optimizer, expected = thor_fx.Thor(model, **SETTINGS), []
    for step, (x, y) in enumerate(data):
        (F.cross_entropy(model(x), y) * (torch.inf if step == 1 else 1.0)).backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(snapshot(dict(model.named_parameters())))
    assert_same(params, expected, rtol=1e-9)


def test_factors_go_to_their_owners_only(ranks):
    owned, everybodys = ranks["factors of owners"], all_equal([[sums] for sums in ranks["factors of all"]])[0]
    assert sorted(what for own in owned for what in own) == sorted(everybodys), "each is read by one rank"
    assert all(own for own in owned)
    for own in owned:
        assert_same([own], [{what: everybodys[what] for what in own}], rtol=1e-14)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("different settings", "frequency= is 2 on rank 0 and 3 on rank 1"),
        ("different values", r"parameter '0.weight' is \(6, 5\) torch.float64"),
        ("different models", "layer_filter= is None on rank 0 and .*lambda"),
        ("index out of range", r"indices of layers, 0 to 1 for this model's 2 layers .*got \[0, 2\]"),
    ],
)
def test_ranks_that_differ_are_refused_on_all_of_them(two, name, text):
    for message in two[name]:
        assert isinstance(message, str), "nothing was raised"
        with pytest.raises((RuntimeError, ValueError), match=text):
            raise (ValueError if message.startswith("ValueError") else RuntimeError)(message)


def test_every_run_is_looked_at():
    assert set(FOUR) < set(RUNS)
    assert rank_runs.TIMEOUT.total_seconds() <= 60
