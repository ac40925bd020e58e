"""THOR's rule for the block size: its two curves on known factors, and what both doors make of it."""

import copy
import functools
import io
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import thor_fx
from thor_fx import block_size_rule
from thor_fx.block_size import report_of
from thor_fx.block_size_rule import BlockSizeReport, cross, performance_curve
from thor_fx.inverses.pair import InversePair
from thor_fx.inversion_time import inversion, milliseconds
from thor_fx.passes.outputs import Factor
from thor_fx.precondition import PreconditionState
from thor_fx.spectral_loss import spectral_losses
from thor_fx.transform import SkipState
from training import (
    CLASSES,
    IN,
    assert_moved,
    assert_same,
    batches,
    build,
    by_drop_in_door,
    by_functional_door,
    classifier_loss,
    identical,
    snapshot,
    train,
    unfreezes,
)

D = torch.float64
SETTINGS: dict[str, Any] = {"lr": 0.05, "damping": 0.1, "momentum": 0.9, "frequency": 3}
AUTO = {**SETTINGS, "block_size": "auto"}
WIDE = 20
CHEAP_BLOCKS = {1: 1.0, 16: 10.0, WIDE: 1000.0}  # performance 1, 0.1, 0.001: 16 is enough
CHEAP_WHOLE = {1: 1.0, 16: 1.1, WIDE: 1.2}  # nothing is saved by cutting


def wide() -> nn.Module:
    """Sides of 5, 20, 20 and 3: two of four are cut by blocks of 16."""
    return nn.Sequential(nn.Linear(IN, WIDE), nn.Tanh(), nn.Linear(WIDE, CLASSES))


@pytest.fixture
def clock(monkeypatch):
    """The milliseconds that inversions will take, and the block sizes that have been asked for."""
    times, asked = dict(CHEAP_BLOCKS), []

    def timer(work):
        asked.append(work.block_size)
        return times[work.block_size]

    monkeypatch.setattr(block_size_rule, "milliseconds", timer)
    return times, asked


def positive(seed: int, side: int) -> Tensor:
    rows = torch.randn(2 * side, side, dtype=D, generator=torch.Generator().manual_seed(seed))
    return rows.mT @ rows


# --- the spectral curve --------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 2, 3, 5, 7, 12, 20])
def test_the_loss_is_that_of_the_paper(block_size):
    """The formula as it is printed, with dense matrices."""
    matrices = torch.stack([positive(seed, 12) for seed in range(3)])
    of_index = torch.arange(12) // block_size
    kept = matrices * (of_index[:, None] == of_index[None, :])
    largest = [torch.linalg.eigvalsh(m @ m.mT).amax(-1) for m in (kept, matrices)]
    expected = 1 - (largest[0] / largest[1]).sqrt()
    torch.testing.assert_close(spectral_losses(matrices, [block_size])[:, 0], expected, rtol=0, atol=1e-12)
    assert (expected > 0.01).all() == (block_size < 12)


def test_losses_of_known_factors():
    four = torch.block_diag(*(positive(seed, 4) for seed in range(3)))
    ones, zeros, diagonal = torch.ones(12, 12, dtype=D), torch.zeros(12, 12, dtype=D), torch.eye(12, dtype=D)
    found = spectral_losses(torch.stack([four, ones, zeros, diagonal]), [1, 2, 4, 8, 12])
    assert found[0, :2].min() > 0.01
    assert found[0, 2:].abs().max() < 1e-12
    expected = 1 - torch.tensor([1, 2, 4, 8, 12], dtype=D) / 12
    torch.testing.assert_close(found[1], expected, rtol=0, atol=1e-12)
    assert not found[2].any()
    assert found[3].abs().max() < 1e-12


def test_losses_fall_as_nested_blocks_grow():
    losses = spectral_losses(positive(0, 100)[None], [1, 16, 32, 64, 100])[0]
    assert (losses.diff() < 0).all()
    assert losses[-1] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_in_low_precision(dtype):
    matrix = torch.ones(1, 8, 8, dtype=dtype)
    assert spectral_losses(matrix, [2])[0].item() == pytest.approx(0.75, abs=1e-6)


# --- the performance curve -----------------------------------------------------------------------------


def test_an_inversion_is_of_all_blocks():
    first, second = torch.stack([positive(0, 5), positive(1, 5)]), positive(2, 7)[None]
    work = inversion([first, second], 3)
    assert work.block_size == 3
    assert {tuple(stack.shape) for stack in work.stacks} == {(4, 3, 3), (2, 2, 2), (1, 1, 1)}
    rest = next(stack for stack in work.stacks if len(stack) == 1)
    assert torch.equal(rest[0], second[0, 6:, 6:])
    whole = inversion([first, second], 7)
    assert {tuple(stack.shape) for stack in whole.stacks} == {(2, 5, 5), (1, 7, 7)}


def test_a_dead_factor_is_timed_too():
    assert milliseconds(inversion([torch.zeros(1, 5, 5)], 2)) > 0


def test_larger_inversions_take_longer():
    small, large = (milliseconds(inversion([positive(0, side)[None]], side)) for side in (8, 256))
    assert 0 < small < large


def test_the_performance_curve_falls_from_one():
    assert performance_curve([2.0, 4.0, 8.0]) == (1.0, 0.5, 0.25)  # p_1 / p_b as published
    assert performance_curve([9.0, 3.0, 2.0, 4.0]) == (1.0, 1.0, 1.0, 0.5)  # tiny blocks are slower: no use


# --- the rule ------------------------------------------------------------------------------------------


def test_the_published_crossing():
    """MindSpore reports that the curves of ResNet-50 cross at 106, and takes 128."""
    candidates = block_size_rule.CANDIDATES
    performance = (1.0, 0.98, 0.95, 0.9, 0.5, 0.2, 0.1, 0.03, 0.01)
    spectral = (0.0, 0.05, 0.1, 0.172, 0.772, 0.9, 0.97, 1.0, 1.0)  # 0.728 below at 64, 0.272 above at 128
    crossing, place = cross(candidates, performance, spectral)
    assert crossing == pytest.approx(106, abs=0.05)
    assert candidates[place] == 128


def test_crossings_by_hand():
    assert cross([1, 16], [1.0, 0.25], [0.0, 0.25]) == (16.0, 1)  # at a candidate: that one
    assert cross([1, 16, 256], [1.0, 0.5, 0.2], [0.0, 0.25, 0.45])[0] == pytest.approx(64)  # half way: 2^6
    assert cross([1, 16], [1.0, 0.5], [1.0, 1.0]) == (1.0, 0)  # nothing is lost at all


def pair(a: Tensor, g: Tensor, groups: int = 1) -> thor_fx.Kronecker:
    return thor_fx.Kronecker(a, g, rows=1, n=1, groups=groups)


def test_the_rule_on_known_factors():
    """Seven: one in blocks of 16, one of 32, one of ones, two diagonal ones, and two of a single number."""
    blocks_of = {b: torch.block_diag(*[torch.ones(b, b, dtype=D)] * (64 // b)) for b in (16, 32)}
    factors = {
        "fc": pair(blocks_of[16], torch.ones(64, 64, dtype=D)),
        "embedding": pair(torch.ones(500, dtype=D), blocks_of[32]),  # its A is a diagonal and has no say
        "experts": pair(torch.eye(64, dtype=D).expand(2, 64, 64), torch.ones(2, 1, 1, dtype=D), groups=2),
    }
    times = {1: 1.0, 16: 1.25, 32: 2.0, 64: 8.0}
    report = report_of(factors, timer=lambda work: times[work.block_size])
    assert report.candidates == (1, 16, 32, 64)
    assert report.milliseconds == (1.0, 1.25, 2.0, 8.0)
    assert report.performance == (1.0, 0.8, 0.5, 0.125)
    assert report.spectral == (4 / 7, 5 / 7, 6 / 7, 1.0)
    assert report.losses.keys() == {
        *(Factor("fc", side) for side in "AG"),
        Factor("embedding", "G"),
        *(Factor("experts", side) for side in "AG"),
    }
    torch.testing.assert_close(report.losses[Factor("fc", "G")], ((63 / 64, 0.75, 0.5, 0.0),))
    torch.testing.assert_close(report.losses[Factor("embedding", "G")], ((31 / 32, 0.5, 0.0, 0.0),))
    assert len(report.losses[Factor("experts", "A")]) == 2
    assert report.chosen == 32
    lead = 0.8 - 5 / 7, 6 / 7 - 0.5
    assert report.crossing == pytest.approx(16 * 2 ** (lead[0] / sum(lead)))
    assert "cross at 18.3 on cpu: block_size=32" in str(report)
    assert "G of fc 50.0%" in str(report)
    assert "embedding" not in report.summary


def test_a_larger_block_that_is_faster_is_taken():
    times = {1: 9.0, 16: 3.0, 32: 2.0, 64: 2.0}
    report = report_of({"fc": pair(torch.eye(64), torch.eye(64))}, timer=lambda work: times[work.block_size])
    assert (report.crossing, report.chosen) == (1.0, 32)


def test_a_threshold_of_ones_own():
    factors = {"fc": pair(torch.ones(64, 64), torch.ones(64, 64))}  # loses 3/4 at 16, 1/2 at 32
    clock = {1: 1.0, 16: 2.0, 32: 4.0, 64: 8.0}
    chosen = [
        report_of(factors, threshold=t, timer=lambda w: clock[w.block_size]).chosen for t in (0.01, 0.6, 0.8)
    ]
    assert chosen == [64, 32, 16]


def test_whole_factors_have_the_last_word():
    report = report_of({"fc": pair(positive(0, 48), positive(1, 40))}, timer=lambda work: 1.0)
    assert (report.candidates, report.chosen) == ((1, 16, 32, 48), 48)
    assert "block_size=48, all factors whole" in report.summary


def test_what_is_measured_of_a_model(clock):
    model = build(wide)
    params, batch = dict(model.named_parameters()), batches(1)[0]
    report = thor_fx.block_size_report(classifier_loss(model), params, *batch)
    from_factors = report_of(thor_fx.factors(classifier_loss(model), params, *batch))
    assert isinstance(report, BlockSizeReport)
    assert report == from_factors
    assert clock[1] == [1, 16, WIDE] * 2
    assert report.spectral == (0.0, 0.5, 1.0)
    assert report.chosen == 16


def test_a_real_clock():
    model = build(wide)
    report = thor_fx.block_size_report(classifier_loss(model), dict(model.named_parameters()), *batches(1)[0])
    assert min(report.milliseconds) > 0
    assert report.chosen in report.candidates


def test_options_that_change_factors(clock):
    model, batch = build(wide), batches(1)[0]
    params = dict(model.named_parameters())
    clock[0][WIDE + 1] = 1000.0
    joint = thor_fx.block_size_report(classifier_loss(model), params, *batch, bias="joint")
    assert joint.candidates == (1, 16, WIDE + 1)
    short = thor_fx.block_size_report(
        classifier_loss(model), params, *batch, max_dim=16, timer=lambda work: 1.0
    )
    assert short.candidates == (1, IN)
    assert short.losses.keys() == {Factor("0.weight", "A"), Factor("2.weight", "G")}


# --- both doors ----------------------------------------------------------------------------------------


def functional(make=wide, **settings) -> thor_fx.CompiledStep:
    tx = thor_fx.thor(**{**AUTO, **settings})
    return thor_fx.compile_step(classifier_loss(build(make)), tx, backend="eager")


def optimizer_of(make=wide, **settings) -> tuple[nn.Module, thor_fx.Thor]:
    model = thor_fx.compile(build(make), backend="aot_eager")
    return model, thor_fx.Thor(model, **{**AUTO, **settings})


def run(step, params, state, data):
    trajectory = []
    for batch in data:
        params, state, _ = step(params, state, *batch)
        trajectory.append(snapshot(params))
    return trajectory, state


@functools.cache
def given(door, steps: int, block_size: int):
    """What training with a number gives."""
    return door(build(wide), batches(steps), **SETTINGS, block_size=block_size)


@pytest.mark.parametrize("times", [CHEAP_BLOCKS, CHEAP_WHOLE], ids=["blocks", "whole"])
def test_both_doors_choose_and_train_as_if_the_number_had_been_given(clock, times):
    clock[0].update(times)
    expected = 16 if times is CHEAP_BLOCKS else WIDE
    data, start = batches(5), snapshot(dict(build(wide).named_parameters()))
    numbered = given(by_functional_door, 5, expected)
    assert_moved(numbered, start)

    step = functional()
    assert (step.block_size, step.block_size_report) == ("auto", None)
    state = step.init(start, *data[0])
    assert step.block_size == state.block_size == step.block_size_report.chosen == expected
    assert identical(run(step, snapshot(start), state, data)[0][-1], numbered[-1])

    model, optimizer = optimizer_of()
    assert (optimizer.block_size, optimizer.block_size_report) == ("auto", None)
    found = train(model, optimizer, data)
    assert optimizer.block_size == optimizer.block_size_report.chosen == expected
    assert_same(found, numbered)
    assert optimizer.block_size_report.losses.keys() == step.block_size_report.losses.keys()
    assert identical(found[-1], given(by_drop_in_door, 5, expected)[-1])
    assert clock[1] == [1, 16, WIDE] * 2  # measured once by each
    other = given(by_functional_door, 5, WIDE + 16 - expected)
    assert not torch.allclose(other[-1]["0.weight"], numbered[-1]["0.weight"])


@pytest.mark.inductor
@pytest.mark.usefixtures("clock")
def test_both_doors_with_inductor():
    data, expected = batches(5), given(by_functional_door, 5, 16)
    assert_same(by_functional_door(build(wide), data, backend="inductor", **AUTO), expected)
    assert_same(by_drop_in_door(build(wide), data, backend="inductor", **AUTO), expected)


def test_a_number_that_was_given_can_be_read():
    assert (
        thor_fx.compile_step(lambda p: p["w"].sum(), thor_fx.thor(**SETTINGS, block_size=7)).block_size == 7
    )
    model = thor_fx.compile(build(wide), backend="aot_eager")
    assert thor_fx.Thor(model, **SETTINGS, block_size=None).block_size is None
    first_order = thor_fx.chain(thor_fx.centralize_gradients())
    assert thor_fx.compile_step(lambda p: p["w"].sum(), first_order).block_size is None


class Noisy(nn.Module):
    """Dropout, and a buffer that every forward pass changes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = wide(), nn.BatchNorm1d(IN)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(F.dropout(self.norm(x), 0.3))


@pytest.mark.usefixtures("clock")
def test_measuring_changes_neither_buffers_nor_random_numbers():
    model, data = build(Noisy), batches(4)

    def loss_fn(params, buffers, x, y):
        new = dict(buffers)
        return F.cross_entropy(functional_call(model, {**params, **new}, (x,)), y), (new, None)

    found = []
    for block_size in ("auto", 16):
        tx = thor_fx.thor(**SETTINGS, block_size=block_size)
        step = thor_fx.compile_step(loss_fn, tx, backend="eager")
        params, buffers = snapshot(dict(model.named_parameters())), snapshot(dict(model.named_buffers()))
        torch.manual_seed(1)
        state = step.init(params, *data[0], buffers=buffers)
        assert int(state.buffers["norm.num_batches_tracked"]) == 0
        trajectory, state = run(step, params, state, data)
        found.append({**trajectory[-1], **state.buffers})
        assert step.block_size == 16
    assert identical(*found)


@pytest.mark.usefixtures("clock")
def test_groups_of_parameters_share_one_block_size():
    data = batches(6)
    groups = {"params": [{"params": ["2.weight", "2.bias"], "lr": 0.01}]}
    model, optimizer = optimizer_of(**groups)
    found = train(model, optimizer, data)
    assert [group["block_size"] for group in optimizer.param_groups] == [16, 16]
    model, optimizer = optimizer_of(**groups, block_size=16)
    assert identical(found[-1], train(model, optimizer, data)[-1])


@unfreezes
def test_a_group_that_is_added_later_takes_the_block_size_there_is(clock):
    model, optimizer = thor_fx.compile(build(wide), backend="aot_eager"), None
    model[0].requires_grad_(False)
    optimizer = thor_fx.Thor(model, **AUTO)
    train(model, optimizer, batches(3))
    assert optimizer.block_size == 16
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": model[0].parameters()})
    train(model, optimizer, batches(3))
    assert [group["block_size"] for group in optimizer.param_groups] == [16, 16]
    assert clock[1] == [1, 16, WIDE]
    inverses = optimizer.state[model[0].weight]["inverses"]["0.weight"]["output"]
    assert [part.shape[-1] for part in inverses] == [16, 4]


# --- when there is nothing to measure yet ----------------------------------------------------------------


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("averaged", [{}, {"factor_decay": 0.9}])
def test_a_first_step_that_overflows_decides_nothing(averaged):
    data = batches(5)
    data[0][0][0, 0] = torch.nan
    model, optimizer = optimizer_of(**averaged)
    first = train(model, optimizer, data[:1])
    assert (optimizer.block_size, optimizer.block_size_report) == ("auto", None)
    assert optimizer.metrics()["skipped_steps"] == 1
    found = first + train(model, optimizer, data[1:])
    assert optimizer.block_size == 16
    assert_same(found, by_drop_in_door(build(wide), data, **SETTINGS, **averaged, block_size=16))


@pytest.mark.usefixtures("clock")
def test_first_steps_without_factors_keep_the_momentum():
    """In evaluation mode no factors are collected; biases move all the same."""
    data, found = batches(5), []
    for block_size in ("auto", 16):
        model, optimizer = optimizer_of(block_size=block_size)
        model(data[0][0])  # the layers are known, but not their factors
        model.eval()
        with pytest.warns(UserWarning, match="a factor step found no factors"):
            train(model, optimizer, data[:2])
        assert optimizer.block_size == block_size
        model.train()
        train(model, optimizer, data[2:])
        assert optimizer.block_size == 16
        found.append(snapshot(dict(model.named_parameters())))
    assert identical(*found)


def test_a_model_without_whole_factors_has_nothing_to_choose(clock):
    def loss_fn(params, x):
        return (x * params["w"]).square().mean()

    params, x = {"w": torch.ones(3, dtype=D)}, torch.ones(2, 3, dtype=D)
    step = thor_fx.compile_step(loss_fn, thor_fx.thor(**AUTO), backend="eager")
    state = step.init(params, x)
    params, state, _ = step(params, state, x)
    assert (step.block_size, step.block_size_report, state.block_size) == (None, None, None)
    assert params["w"].max() < 1
    assert clock[1] == []
    with pytest.raises(ValueError, match="no layer has a whole factor"):
        thor_fx.block_size_report(loss_fn, params, x)


def test_sides_that_are_too_long_are_in_blocks_of_max_dim_in_both_doors(clock):
    """They are cut before a block size is known, and stay as they are."""
    settings, data = {**AUTO, "max_dim": 8}, batches(4)
    clock[0][IN] = 1000.0
    step = functional(**settings)
    params = snapshot(dict(build(wide).named_parameters()))
    found, _ = run(step, params, step.init(params, *data[0]), data)
    assert step.block_size == IN  # of the sides 5 and 3
    assert step.coverage.layers["0.weight"].output.block == 8
    assert_same(by_drop_in_door(build(wide), data, **settings), found)
    assert_same(found, by_functional_door(build(wide), data, **{**settings, "block_size": 8}))


# --- saved states ----------------------------------------------------------------------------------------


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    with torch.serialization.safe_globals([thor_fx.StepState, SkipState, PreconditionState, InversePair]):
        return torch.load(file, weights_only=True)


@pytest.mark.parametrize("saved_after", [1, 4])
def test_a_loaded_optimizer_does_not_measure_again(clock, saved_after):
    data, expected = batches(7), given(by_drop_in_door, 7, 16)
    model, optimizer = optimizer_of()
    train(model, optimizer, data[:saved_after])
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    assert saved["optimizer"]["param_groups"][0]["block_size"] == 16
    clock[0].clear()  # no time is known any more
    model, optimizer = optimizer_of()
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert (optimizer.block_size, optimizer.block_size_report) == (16, None)
    assert identical(train(model, optimizer, data[saved_after:])[-1], expected[-1])


def test_a_running_optimizer_takes_the_block_size_of_the_state(clock):
    data, expected = batches(7), given(by_drop_in_door, 7, 16)
    model, optimizer = optimizer_of()
    train(model, optimizer, data[:4])
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    clock[0].update(CHEAP_WHOLE)
    model, optimizer = optimizer_of()
    train(model, optimizer, data[:2])
    assert optimizer.block_size == WIDE
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert (optimizer.block_size, optimizer.block_size_report) == (16, None)
    assert identical(train(model, optimizer, data[4:])[-1], expected[-1])


@pytest.mark.usefixtures("clock")
def test_states_of_optimizers_whose_block_size_was_given():
    data = batches(4)
    model, optimizer = optimizer_of()
    train(model, optimizer, data)
    chosen = copy.deepcopy(optimizer.state_dict())
    numbered_model, numbered = optimizer_of(block_size=16)
    numbered_model.load_state_dict(model.state_dict())
    numbered.load_state_dict(chosen)
    assert identical(train(numbered_model, numbered, data)[-1], train(model, optimizer, data)[-1])
    assert "block_size" not in numbered.state_dict()["param_groups"][0]

    other_model, other = optimizer_of(block_size=4)
    train(other_model, other, data)
    state = copy.deepcopy(other.state_dict())
    model, optimizer = optimizer_of()
    optimizer.load_state_dict(state)
    with pytest.raises(ValueError, match="use the block_size and the model that it was saved with"):
        train(model, optimizer, data)


@pytest.mark.parametrize("init_first", [False, True])
def test_a_saved_step_state_keeps_its_block_size(clock, init_first):
    data, start = batches(7), dict(build(wide).named_parameters())
    expected = given(by_functional_door, 7, 16)
    step, params = functional(), snapshot(start)
    half, state = run(step, params, step.init(params, *data[0]), data[:4])
    saved = through_a_file({"params": half[-1], "state": state})
    assert saved["state"].block_size == 16
    fresh = functional()
    clock[0].update(CHEAP_WHOLE)
    if init_first:
        fresh.init(snapshot(start), *data[0])
        assert fresh.block_size == WIDE
    else:
        clock[0].clear()
    trajectory, state = run(fresh, saved["params"], saved["state"], data[4:])
    assert identical(trajectory[-1], expected[-1])
    assert fresh.block_size == state.block_size == 16


@pytest.mark.usefixtures("clock")
def test_a_state_of_another_step_is_refused():
    step, batch, start = functional(), batches(1)[0], snapshot(dict(build(wide).named_parameters()))
    step.init(start, *batch)
    other = functional(block_size=16).init(start, *batch)
    with pytest.raises(ValueError, match="state does not belong to this step"):
        step(start, other, *batch)


# --- errors and pictures -----------------------------------------------------------------------------------


def test_a_transform_that_is_not_resolved_says_so():
    tx = thor_fx.chain(thor_fx.thor(**AUTO))
    assert tx.hyper(0)["damping"] == 0.1
    assert (tx.frequency, tx.rules.block_size) == (3, None)
    with pytest.raises(
        RuntimeError, match=r'block_size="auto" has not been chosen yet: .*tx\.resolve\(128\)'
    ):
        tx.init({"w": torch.ones(2)}, thor_fx.Coverage({}, (), {"w": "a vector"}))
    assert tx.resolve(4).resolve is None
    tx.resolve(4).init({"w": torch.ones(2)}, thor_fx.Coverage({}, (), {"w": "a vector"}))


@pytest.mark.usefixtures("clock")
def test_factors_that_are_not_finite():
    x, y = batches(1)[0]
    x[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"the factor A of '0\.weight' is not finite .* block_size=128"):
        functional().init(dict(build(wide).named_parameters()), x, y)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"threshold": 0}, ValueError, "^threshold must"),
        ({"threshold": "1%"}, TypeError, "^threshold must"),
        ({"timer": lambda work: 0.0}, ValueError, "^timer must return milliseconds > 0"),
        ({"max_dim": 0}, ValueError, "^max_dim must"),
        ({"sharing": "both"}, ValueError, "^sharing must"),
        ({"bias": None}, TypeError, "^bias must"),
    ],
)
def test_wrong_arguments(settings, error, message):
    model = build(wide)
    with pytest.raises(error, match=message):
        thor_fx.block_size_report(
            classifier_loss(model), dict(model.named_parameters()), *batches(1)[0], **settings
        )


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_a_picture_is_drawn(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    times = {1: 1.0, 16: 1.25, 32: 2.0, 64: 8.0}
    factors = {"fc": pair(positive(0, 64), torch.ones(64, 64, dtype=D))}
    report = report_of(factors, timer=lambda work: times[work.block_size])
    report.draw(tmp_path / f"curves.{suffix}")
    drawn = (tmp_path / f"curves.{suffix}").read_bytes()
    assert drawn.startswith(b"\x89PNG" if suffix == "png" else b"<?xml")
    assert len(drawn) > 5000


def test_no_picture_without_matplotlib(monkeypatch, tmp_path):
    report = report_of({"fc": pair(torch.eye(4), torch.eye(4))}, timer=lambda work: 1.0)
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="draw needs matplotlib"):
        report.draw(tmp_path / "curves.svg")
