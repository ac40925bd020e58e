"""Steps that a GPU skips, of which the host hears late: the CPU is made to say nothing earlier."""

import copy
import io
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import thor_fx
from late_words import late_words
from test_numerics import DOORS, Run
from thor_fx.alarm import NumericsWarning
from thor_fx.averages import Averages
from thor_fx.skipping import LATE
from thor_fx.state_classes import STATE_CLASSES

LR = [0.1, 0.09, 0.08, 0.07, 0.06, 0.05, 0.04, 0.03, 0.02, 0.01, 0.005, 0.004, 0.003, 0.002, 0.001, 0.0005]
RARELY = {"frequency": 100, "factor_decay": 0.5}


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    late_words(monkeypatch)


def number(run: Run) -> int:
    """Of the step that comes next."""
    step: int = run.state_.step if run.optimizer is None else run.optimizer.param_groups[0]["step"]
    return step


def overdue(run: Run) -> bool:
    found: bool = run.state_.overdue if run.optimizer is None else run.optimizer._demand._overdue
    return found


def refreshes(run: Run) -> float:
    if run.optimizer is None:
        return run.metrics["refreshes"]
    return float(run.optimizer.param_groups[0].get("refreshes", 0))  # also of a state that was only loaded


def weight(run: Run) -> float:
    """Of the averages of all factors: another one after each factor step."""
    leaves = pytree.tree_leaves(run.state, is_leaf=lambda part: isinstance(part, Averages))
    (averages,) = [leaf for leaf in leaves if isinstance(leaf, Averages)]
    return float(averages.weights.sum())


def take(run: Run, steps: range, spoilt: set[int]) -> tuple[list[int], list[int]]:
    """Take these steps, some of them spoilt; return their numbers, and which have inverted factors."""
    numbers, inverted = [], []
    for step in steps:
        before, seed = refreshes(run), step
        numbers.append(number(run))
        run.step(*run.batch(seed=seed, x=math.nan if step in spoilt else 1.0))
        if refreshes(run) > before:
            inverted.append(step)
    return numbers, inverted


@DOORS
@pytest.mark.filterwarnings("ignore::thor_fx.alarm.NumericsWarning")
def test_schedules_are_held_back_as_soon_as_it_is_heard(late, door, monkeypatch):
    run = Run(door, lr=torch.tensor(LR), **RARELY)
    numbers, inverted = take(run, range(11), spoilt={3, 5})
    assert numbers == [0, 1, 2, 3, 4, 5, 6, 7, 7, 8, 8]
    assert inverted == [0]
    assert run.metrics["skipped_steps"] == 2
    monkeypatch.undo()
    used = [LR[place] for step, place in enumerate(numbers) if step not in {3, 5}]
    same = Run(door, lr=torch.tensor(used), **RARELY)
    take(same, range(11), spoilt={3, 5})
    assert all(torch.equal(same.params[name], p) for name, p in run.params.items())


@DOORS
@pytest.mark.filterwarnings("ignore::thor_fx.alarm.NumericsWarning")
def test_a_factor_step_that_was_skipped_is_made_up_for(late, door):
    numbers, inverted = take(Run(door, frequency=6), range(15), spoilt={6})
    assert numbers == [*range(11), *range(10, 14)]
    assert inverted == [0, 11, 13]  # step 6 is heard of behind step 10; number 12 is step 13


@DOORS
@pytest.mark.filterwarnings("ignore::thor_fx.alarm.NumericsWarning")
def test_averages_get_the_factors_of_a_skipped_step_later(late, door):
    run = Run(door, frequency=6, factor_decay=0.5, refresh=thor_fx.Every(6))
    measured, before = [], 0.0
    for step in range(15):
        take(run, range(step, step + 1), spoilt={6})
        if weight(run) != before:
            measured.append(step)
        before = weight(run)
    assert measured == [0, 11, 13]


@DOORS
@pytest.mark.filterwarnings("ignore::thor_fx.alarm.NumericsWarning")
def test_where_factors_have_been_measured_since_nothing_is_made_up_for(late, door):
    run = Run(door, frequency=2)
    _, inverted = take(run, range(10), spoilt={4})
    assert inverted == [0, 2, 6, 8, 9]  # number 8 comes twice: the schedule is held back
    assert not overdue(run)


@DOORS
@pytest.mark.filterwarnings("ignore::thor_fx.alarm.NumericsWarning")
def test_a_bad_beginning_is_made_up_for_at_once(late, door):
    run = Run(door, **RARELY)
    numbers, inverted = take(run, range(9), spoilt={0, 1})
    assert inverted == [2]
    assert numbers == [0, 1, 2, 3, 4, 4, 4, 5, 6]
    assert run.params["first"].isfinite().all()


def resumed(run: Run, door: str, **settings: Any) -> Run:
    """Another training, which goes on with what this one saves."""
    other, file = Run(door, **settings), io.BytesIO()
    if door == "functional":
        torch.save((run.params, run.state_), file)
        file.seek(0)
        with torch.serialization.safe_globals(STATE_CLASSES):
            other.params, other.state_ = torch.load(file)
    else:
        torch.save((run.model.state_dict(), run.optimizer.state_dict()), file)
        file.seek(0)
        of_model, of_optimizer = torch.load(file)
        other.model.load_state_dict(of_model)
        other.optimizer.load_state_dict(of_optimizer)
    return other


@DOORS
@pytest.mark.filterwarnings("ignore::thor_fx.alarm.NumericsWarning")
def test_what_has_not_been_heard_yet_is_in_a_saved_state(late, door):
    settings: dict[str, Any] = {"lr": torch.tensor(LR), "frequency": 6, "factor_decay": 0.5}
    whole, spoilt = Run(door, **settings), {6, 8}
    expected = take(whole, range(15), spoilt)
    for cut in range(6, 14):
        first = Run(door, **settings)
        take(first, range(cut), spoilt)
        second = resumed(first, door, **settings)
        numbers, inverted = take(second, range(cut, 15), spoilt)
        assert numbers == expected[0][cut:], cut
        assert inverted == [step for step in expected[1] if step >= cut], cut
        for name, p in whole.params.items():
            assert torch.equal(second.params[name], p), (cut, name)


@DOORS
def test_it_is_told_when_it_is_heard(late, door):
    run = Run(door, **RARELY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(2 + LATE):
            run.step(*run.batch(x=math.nan if step == 2 else 1.0))
    with pytest.warns(NumericsWarning, match=r"1 step\(s\) so far changed nothing"):
        run.step()


@pytest.mark.filterwarnings("ignore::thor_fx.alarm.NumericsWarning")
def test_a_step_without_donation_is_followed_too(late):
    """Its state is another object after every step."""
    tx = thor_fx.thor(lr=torch.tensor(LR), damping=0.1, momentum=0.9, frequency=100)

    def loss_fn(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return (x @ params["w"] - 1).square().mean()

    params: Any = {"w": torch.zeros(3, 2)}
    step = thor_fx.compile_step(loss_fn, tx, donate=False, backend="eager")
    state, numbers = step.init(params, torch.eye(3)), []
    for ordinal in range(9):
        numbers.append(state.step)
        params, state, _ = step(params, state, torch.eye(3) * (math.nan if ordinal == 1 else 1.0))
    assert numbers == [0, 1, 2, 3, 4, 5, 5, 6, 7]


def test_a_copied_step_listens_anew(late):
    hearing = thor_fx.hearing.Hearing()
    hearing.skipped = 3
    assert copy.deepcopy(hearing).skipped == 0


@DOORS
def test_where_nothing_can_be_heard_schedules_go_on(monkeypatch, door):
    """As on devices whose steps the host cannot follow."""
    late_words(monkeypatch)
    monkeypatch.setattr("thor_fx.hearing.can_hear", lambda _: False)
    numbers, _ = take(Run(door, **RARELY), range(9), spoilt={2})
    assert numbers == [*range(9)]


@pytest.mark.gpu
@DOORS
@pytest.mark.filterwarnings("ignore::thor_fx.alarm.NumericsWarning")
def test_a_gpu_is_heard_in_the_same_places(door):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    run = Run(door, device="cuda", lr=torch.tensor(LR), **RARELY)
    numbers, inverted = take(run, range(11), spoilt={3, 5})
    assert numbers == [0, 1, 2, 3, 4, 5, 6, 7, 7, 8, 8]
    assert inverted == [0]
