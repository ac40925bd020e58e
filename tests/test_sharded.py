"""Parameters of which every rank has a part (FSDP2, tensor parallel) train as in one process.

One launch for each number of ranks; :mod:`sharded_runs` has the code that the ranks run.
"""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

import thor_fx
from ranks import Results, all_equal, run_on_ranks, shared
from training import Parameters, assert_moved, assert_same, batches, build, compiled, snapshot, train

if not torch.distributed.is_available():
    pytest.skip("no torch.distributed here", allow_module_level=True)

import sharded_runs
from sharded_runs import GROUPS, MODELS, OPTIONS, ROWS, RUNS, SETTINGS, STEPS
from thor_fx.distributed import checkpoint

SCRIPT = Path(__file__).with_name("sharded_runs.py")
FOUR_ONLY = ["transformer fsdp and tp", "perceptron fsdp and tp", "perceptron hsdp"]
TWO = [name for name in RUNS if name not in FOUR_ONLY]
FOUR = [*FOUR_ONLY, "mlp fsdp at once", "cnn fsdp at once", "transformer fsdp"]
TRAINED = [(2, run) for run in TWO if run.split()[0] in MODELS]
TRAINED += [(4, run) for run in FOUR]


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_on_ranks(TWO, 2, shared(tmp_path_factory) / "two sharded ranks", SCRIPT)


@pytest.fixture(scope="session")
def four(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_on_ranks(FOUR, 4, shared(tmp_path_factory) / "four sharded ranks", SCRIPT)


@functools.cache
def in_one_process(make: str, options: str = "") -> list[Parameters]:
    return by_hand(make, **OPTIONS.get(options, {}))


def by_hand(make: str, **settings: Any) -> list[Parameters]:
    model = compiled(MODELS[make])
    return train(model, thor_fx.Thor(model, **{**SETTINGS, **settings}), batches(STEPS, ROWS))


@pytest.mark.parametrize(("size", "run"), TRAINED)
def test_parts_are_trained_as_one_process_trains(request, size, run):
    expected = in_one_process(run.split()[0])
    assert_moved(expected, snapshot(dict(build(MODELS[run.split()[0]]).named_parameters())))
    results = request.getfixturevalue("two" if size == 2 else "four")
    assert_same(all_equal(results[run]), expected, rtol=1e-9)


@pytest.mark.parametrize("run", [name for name in RUNS if " with " in name])
def test_every_option_is_that_of_one_process(two, run):
    assert_same(all_equal(two[run]), in_one_process("perceptron", run.split()[-1]), rtol=1e-9)


def test_under_inductor(two):
    assert_same(all_equal(two["inductor"]), in_one_process("perceptron"), rtol=1e-9)


def test_groups(two):
    assert_same(all_equal(two["grouped"]), by_hand("perceptron", params=GROUPS), rtol=1e-9)


def test_layers_that_come_later(two):
    model = compiled(MODELS["two heads"])
    optimizer = thor_fx.Thor(model, **SETTINGS)
    expected = sharded_runs.by_heads(model, optimizer, batches(STEPS, ROWS))
    assert_same(all_equal(two["late"]), expected, rtol=1e-9)


def test_ranks_with_more_rows(two):
    model = compiled(MODELS["perceptron"])
    expected = train(model, thor_fx.Thor(model, **SETTINGS), batches(STEPS, 7))
    assert_same(all_equal(two["unequal"]), expected, rtol=1e-9)


def test_gradient_accumulation(two):
    model = compiled(MODELS["perceptron"])
    optimizer, trajectory = thor_fx.Thor(model, **SETTINGS), []
    data = batches(2 * STEPS, ROWS)
    for first, second in zip(data[::2], data[1::2], strict=True):
        for x, y in (first, second):
            (torch.nn.functional.cross_entropy(model(x), y) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        trajectory.append(snapshot(dict(model.named_parameters())))
    assert_same(all_equal(two["accumulated"]), trajectory, rtol=1e-9)


def test_all_ranks_skip_what_one_cannot_take(two):
    trajectories, metrics = zip(*two["skipped"], strict=True)
    first = all_equal(list(trajectories))
    assert all(torch.equal(first[1][name], first[0][name]) for name in first[0])
    assert all(value.isfinite().all() for value in first[-1].values())
    assert [own["skipped_steps"] for own in metrics] == [1, 1]


def test_no_rank_keeps_anything_of_what_another_owns(two):
    states, shapes, factors = zip(*two["kept"], strict=True)
    for name in states[0]:
        having = [rank for rank, state in enumerate(states) if state[name]]
        assert len(having) == 1, name
    for rank, state in enumerate(states):
        assert {"momentum", "inverses", "factors"} <= set().union(*state.values()), rank
    layers = {name for own in states for name, state in own.items() if "inverses" in state}
    assert sorted(name for own in factors for name in own) == sorted(layers)
    assert all(factors)
    whole = {name: p.numel() for name, p in MODELS["perceptron"]().named_parameters()}
    parts = [sum(torch.Size(shape).numel() for shape in own.values()) for own in shapes]
    assert sum(parts) == sum(whole.values())


def test_a_saved_state_continues_bitwise(two):
    model = compiled(MODELS["perceptron"])
    whole = train(model, thor_fx.Thor(model, **SETTINGS, factor_decay=0.5), batches(STEPS, ROWS))
    assert_same(all_equal(two["continued"]), whole, rtol=1e-9)


def test_a_checkpoint_of_parts_can_be_loaded_by_any_number_of_ranks(two, tmp_path_factory):
    settings = {**SETTINGS, "factor_decay": 0.5}
    expected = by_hand("perceptron", factor_decay=0.5)
    assert_same(all_equal(two["saved"]), expected, rtol=1e-9)
    known = checkpoint.load(shared(tmp_path_factory) / "two sharded ranks" / "checkpoint")
    model = compiled(MODELS["perceptron"])
    optimizer = thor_fx.Thor(model, **settings)
    model.load_state_dict(known["model"])
    optimizer.load_state_dict(known["optimizer"])
    assert_same(train(model, optimizer, batches(STEPS, ROWS)[2:]), expected[2:], rtol=1e-9)


def test_a_weight_whose_rows_are_dealt_out_takes_the_first_order_rule(two):
    """Its gradient is a sum over ranks that nobody has taken before."""
    expected = in_one_process_with_shared_weight()
    (trained,) = all_equal([[result] for result in two["other rows left out"]])
    assert_same([trained], [expected], rtol=1e-9)


def in_one_process_with_shared_weight() -> Parameters:
    model = build(sharded_runs.SharedWeight)
    x, y = batches(1, ROWS)[0]
    plain = torch.nn.Sequential(*model.children())
    compiled_model = thor_fx.compile(plain, backend="aot_eager")
    optimizer = thor_fx.Thor(compiled_model, **SETTINGS, layer_filter=lambda name: name == "1.weight")
    torch.nn.functional.cross_entropy(compiled_model(x), y).backward()
    optimizer.step()
    return snapshot(dict(model.named_parameters()))


@pytest.mark.parametrize(
    ("run", "text"),
    [
        ("inverse", "work_sharing='inverse' keeps"),
        ("adaptive", "LevenbergMarquardt"),
        ("alone", "process_group must contain all ranks that have a part of 'inp.weight'"),
        ("functional", "is dealt out over ranks, and a functional step takes plain tensors"),
        ("other rows", "the rows of 'up.weight' are dealt out"),
    ],
)
def test_what_cannot_be_owned_is_refused(two, run, text):
    for result in two[run]:
        assert result.startswith("TypeError" if run == "functional" else "ValueError")
        assert text in result
