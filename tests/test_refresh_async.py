"""``refresh_async=True``: inversions beside the steps that follow, and no number depends on the clock."""

import contextlib
import copy
import itertools
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import thor_fx
from averaged_thor import slow_trajectory
from test_refresh_rules import through_a_file
from thor_fx.background import THREAD, Worker
from thor_fx.overlap import Overlap
from thor_fx.precondition import precondition
from thor_fx.schedule import Schedule
from thor_fx.transform import Signals, Taken
from training import (
    Batch,
    Parameters,
    assert_moved,
    assert_same,
    batches,
    build,
    by_both_doors,
    by_drop_in_door,
    by_functional_door,
    classifier_loss,
    identical,
    mlp,
    snapshot,
    train,
    unfreezes,
)

DECAY, FREQUENCY = 0.8, 6
INSTALLS = FREQUENCY + FREQUENCY // 2  # the first step after which there are new inverses
LAYERS = ["0.weight", "2.weight"]
SETTINGS: dict[str, Any] = {
    "lr": 0.05,
    "damping": 0.1,
    "momentum": 0.9,
    "frequency": FREQUENCY,
    "refresh_async": True,
}


# --- when -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frequency", "lag", "installed"), [(2, 1, [3, 5, 7, 9]), (3, 1, [4, 7]), (4, 2, [6]), (5, 2, [7])]
)
def test_the_calendar(frequency, lag, installed):
    rule = Overlap(frequency)
    assert rule.lag == lag
    assert [step for step in range(10) if rule.phase(step) == "install"] == installed


@pytest.mark.parametrize("frequency", range(2, 12))
def test_every_inversion_has_a_step_beside_it_and_is_over_before_the_next_factors(frequency):
    rule = Overlap(frequency)
    for measured in (frequency, 7 * frequency):
        phases = [rule.phase(step) for step in range(measured, measured + frequency)]
        assert phases[0] == "invert"
        assert phases.count("install") == 1
        assert set(phases[: phases.index("install")]) == {"invert"}
        assert set(phases[phases.index("install") + 1 :]) <= {"rest"}


def by_hand(step: int) -> list[str]:
    return LAYERS if step >= FREQUENCY and step % FREQUENCY == FREQUENCY // 2 else []


@pytest.mark.parametrize("decay", [DECAY, 0.0])
def test_both_doors_by_hand(decay):
    data = batches(2 * INSTALLS)
    own = {name: value for name, value in SETTINGS.items() if name != "refresh_async"}
    expected = slow_trajectory(build(mlp), data, decay=decay, after=by_hand, **own)
    found = by_both_doors(lambda: build(mlp), data, **SETTINGS, factor_decay=decay or None)
    assert_same(found, expected, rtol=1e-10)
    assert_moved(found, snapshot(dict(build(mlp).named_parameters())))


def test_the_damping_is_that_of_the_step_that_measured():
    data, steps = batches(INSTALLS + 4), torch.arange(INSTALLS + 4)
    settings = {**SETTINGS, "bias": "joint"}
    same = torch.full((len(data),), 0.1, dtype=torch.float64)
    elsewhere = torch.where(steps % FREQUENCY == 0, same, 7.0)
    expected = by_functional_door(build(mlp), data, **{**settings, "damping": same})
    found = by_functional_door(build(mlp), data, **{**settings, "damping": elsewhere})
    assert all(map(identical, found, expected))
    there = torch.where(steps == FREQUENCY, 7.0, same)
    other = by_both_doors(lambda: build(mlp), data, **{**settings, "damping": there})
    assert all(map(identical, other[: INSTALLS + 1], expected))
    assert not identical(other[INSTALLS + 1], expected[INSTALLS + 1])


# --- whatever the clock says ----------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "factor": {},
    "sqrt": {"damping_rule": "sqrt"},
    "pi": {"damping_rule": "pi", "factor_decay": DECAY},
    "relative": {"damping_rule": "relative", "bias": "joint"},
    "eigen": {"inverse": "eigen"},
    "ekfac": {"inverse": "ekfac", "factor_decay": DECAY},
    "newton_schulz": {"inverse": "newton_schulz"},
    "blocks": {"block_size": 3, "factor_decay": DECAY},
    "chosen blocks": {"block_size": "auto"},
    "one side": {"max_dim": 5, "long_side": "identity"},
    "diagonal": {"max_dim": 5, "long_side": "diagonal"},
    "loss scale": {"loss_scale": 64.0},
    "damping in tables": {"damping": torch.linspace(0.3, 0.1, 2 * INSTALLS)},
    "groups": {"weight_decay": 0.01, "fallback": "adamw"},
}


@pytest.mark.parametrize("name", KINDS)
def test_the_background_changes_no_number(name, monkeypatch):
    data, settings = batches(2 * INSTALLS), {**SETTINGS, **KINDS[name]}
    if name == "chosen blocks":
        monkeypatch.setattr("thor_fx.block_size_rule.milliseconds", lambda work: work.block_size / 2)
    beside = by_both_doors(lambda: build(mlp), data, 1e-9, **settings)
    monkeypatch.setattr("thor_fx.ahead.can_work", lambda device: False)
    assert all(map(identical, beside, by_functional_door(build(mlp), data, **settings)))
    late = by_functional_door(build(mlp), data, **{**settings, "refresh_async": False})
    assert all(map(identical, beside[:FREQUENCY], late))
    assert not identical(beside[FREQUENCY], late[FREQUENCY]), "without the option, factors act at once"


def make_step(donate: bool = True, **settings: Any) -> tuple[Any, Any, Any]:
    model = build(mlp)
    tx = thor_fx.thor(**{**SETTINGS, "factor_decay": DECAY, **settings})
    step = thor_fx.compile_step(classifier_loss(model), tx, backend="eager", donate=donate)
    params = snapshot(dict(model.named_parameters()))
    return step, params, step.init(params, *batches(1)[0])


def drop_in(**settings: Any) -> tuple[nn.Module, thor_fx.Thor]:
    model = thor_fx.compile(build(mlp), backend="aot_eager")
    return model, thor_fx.Thor(model, **{**SETTINGS, "factor_decay": DECAY, **settings})


def run(step: Any, params: Any, state: Any, data: list[Batch]) -> tuple[Any, Any]:
    for batch in data:
        params, state, _ = step(params, state, *batch)
    return params, state


class Gate:
    """Holds inversions in the background until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.opened = threading.Event(), threading.Event()
        real = thor_fx.precondition.refresh

        def held(*args: Any) -> Any:
            if threading.current_thread().name.startswith(THREAD):
                self.begun.set()
                assert self.opened.wait(60), "nobody has opened the gate"
            return real(*args)

        monkeypatch.setattr("thor_fx.precondition.refresh", held)


def test_steps_are_taken_while_the_inversion_runs(monkeypatch):
    """The drop-in door. Were they not, the gate would never open."""
    data = batches(INSTALLS + 2)
    expected = by_drop_in_door(build(mlp), data, **SETTINGS, factor_decay=DECAY)
    gate, (model, optimizer) = Gate(monkeypatch), drop_in()
    found = train(model, optimizer, data[: FREQUENCY + 1])
    assert gate.begun.wait(60)
    found += train(model, optimizer, data[FREQUENCY + 1 : INSTALLS])
    assert not gate.opened.is_set()
    gate.opened.set()
    found += train(model, optimizer, data[INSTALLS:])
    assert all(map(identical, found, expected))


@pytest.mark.parametrize("donate", [True, False])
def test_steps_of_the_functional_door_too(donate, monkeypatch):
    data = batches(INSTALLS + 2)
    expected, _ = run(*make_step(), data)
    gate, (step, params, state) = Gate(monkeypatch), make_step(donate)
    params, state = run(step, params, state, data[: FREQUENCY + 1])
    assert gate.begun.wait(60)
    params, state = run(step, params, state, data[FREQUENCY + 1 : INSTALLS])
    gate.opened.set()
    found, _ = run(step, params, state, data[INSTALLS:])
    assert identical(found, expected)


def test_inverses_change_after_one_step_only():
    step, params, state = make_step()
    seen = []
    for batch in batches(2 * FREQUENCY):
        params, state, _ = step(params, state, *batch)
        seen.append([leaf.clone() for leaf in inverses_of(state)])
    changed = [not all(map(torch.equal, a, b)) for a, b in itertools.pairwise(seen)]
    assert [i + 1 for i, new in enumerate(changed) if new] == [INSTALLS]


def inverses_of(state: Any) -> list[Tensor]:
    (found,) = thor_fx.optimizer_state.preconditioners({"": state.inner.inner[0]}).values()
    return pytree.tree_leaves(found.inverses)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every inversion that begins in the background."""
    begun: list[int] = []
    start = Worker.start
    monkeypatch.setattr(Worker, "start", lambda *args: begun.append(len(begun)) or start(*args))
    return begun


@pytest.mark.parametrize("donate", [True, False])
def test_one_inversion_in_an_interval(donate, started):
    run(*make_step(donate), batches(3 * FREQUENCY + 1))
    assert len(started) == 3


def test_one_inversion_in_an_interval_of_the_drop_in_door(started):
    model, optimizer = drop_in()
    train(model, optimizer, batches(3 * FREQUENCY + 1))
    assert len(started) == 3


def test_without_donation_a_step_is_pure():
    data, (step, params, state) = batches(2 * INSTALLS), make_step(donate=False)
    expected, _ = run(*make_step(), data)
    for batch in data:
        before = pytree.tree_map(torch.clone, state.inner)
        new_params, new_state, _ = step(params, state, *batch)
        again, new_state, _ = step(params, state, *batch)
        assert all(map(torch.equal, pytree.tree_leaves(before), pytree.tree_leaves(state.inner)))
        assert identical(new_params, again)
        params, state = new_params, new_state
    assert identical(params, expected)


def test_two_trainings_by_one_step():
    """Taken in turns, with states of their own."""
    data, (step, params, state) = batches(2 * INSTALLS), make_step()
    other = snapshot(params), copy.deepcopy(state)
    expected, _ = run(*make_step(), data)
    for batch in data:
        params, state = run(step, params, state, [batch])
        other = run(step, *other, [batch])
    assert identical(params, expected)
    assert identical(other[0], expected)


# --- saving and loading ---------------------------------------------------------------------------

AMID = range(FREQUENCY, 2 * FREQUENCY + 1)
VARIED: dict[str, Any] = {"damping": lambda step: 0.1 + 0.01 * (step % 7), "damping_rule": "pi"}


@pytest.mark.parametrize("saved_after", AMID)
def test_the_drop_in_door_continues_bitwise(saved_after):
    data = batches(3 * FREQUENCY)
    model, optimizer = drop_in(**VARIED)
    train(model, optimizer, data[:saved_after])
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    expected = train(model, optimizer, data[saved_after:])
    fresh, resumed = drop_in(**VARIED)
    fresh.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert all(map(identical, train(fresh, resumed, data[saved_after:]), expected))
    assert resumed.metrics() == optimizer.metrics()


@pytest.mark.parametrize("saved_after", AMID)
def test_the_functional_door_continues_bitwise(saved_after):
    data = batches(3 * FREQUENCY)
    step, params, state = make_step(**VARIED)
    params, state = run(step, params, state, data[:saved_after])
    saved = through_a_file((params, state), weights_only=False)
    expected, _ = run(step, params, state, data[saved_after:])
    fresh, _, _ = make_step(**VARIED)
    found, _ = run(fresh, *saved, data[saved_after:])
    assert identical(found, expected)


def test_loading_into_the_running_optimizer():
    """What is under way belongs to the state before."""
    data, (model, optimizer) = batches(4 * FREQUENCY), drop_in()
    train(model, optimizer, data[: FREQUENCY + 1])
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    expected = train(model, optimizer, data[FREQUENCY + 1 : 2 * FREQUENCY])
    train(model, optimizer, data[3 * FREQUENCY :][::-1][:1])  # other factors, in step 2 FREQUENCY
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    found = train(model, optimizer, data[FREQUENCY + 1 : 2 * FREQUENCY])
    assert all(map(identical, found, expected))


def test_a_state_that_is_written_over():
    """In place, by the user: what is under way is void."""
    data = batches(2 * INSTALLS)
    step, params, state = make_step()
    run(step, params, state, data[: FREQUENCY + 2])
    other, others, theirs = make_step()
    others, theirs = run(other, others, theirs, data[::-1][: FREQUENCY + 2])
    pairs = map(pytree.tree_leaves, ((params, state.inner), (others, theirs.inner)))
    for mine, new in zip(*pairs, strict=True):
        mine.copy_(new)
    found, _ = run(step, params, theirs._replace(inner=state.inner), data[FREQUENCY + 2 :])
    expected, _ = run(other, others, theirs, data[FREQUENCY + 2 :])
    assert identical(found, expected)


def test_a_state_from_a_run_without_the_option_is_taken():
    """It says no damping: until the next factors, the inverses are those that were saved."""
    data = batches(3 * FREQUENCY)
    model, optimizer = drop_in(refresh_async=False)
    train(model, optimizer, data[: FREQUENCY + 1])
    fresh, resumed = drop_in()
    fresh.load_state_dict(model.state_dict())
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_moved(train(fresh, resumed, data[FREQUENCY + 1 :]), snapshot(dict(model.named_parameters())))


def test_copies_of_an_optimizer_with_an_inversion_under_way(monkeypatch):
    gate, (model, optimizer) = Gate(monkeypatch), drop_in()
    train(model, optimizer, batches(FREQUENCY + 2))
    assert gate.begun.wait(60)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        states = other.state_dict(), optimizer.state_dict()
        del states[1]["param_groups"][0][
            "readiness"
        ]  # of the layers of the model, which a copy does not have
        found, expected = map(pytree.tree_leaves, states)
        for one, same in zip(found, expected, strict=True):
            assert torch.equal(one, same) if isinstance(one, Tensor) else one == same
    gate.opened.set()


# --- what goes wrong ------------------------------------------------------------------------------


@contextlib.contextmanager
def failing() -> Iterator[None]:
    def fail(*_: Any) -> Any:
        raise torch.linalg.LinAlgError("a test")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("thor_fx.precondition.refresh", fail)
        yield


def test_an_error_reaches_the_step_that_installs():
    data, (model, optimizer) = batches(3 * FREQUENCY), drop_in()
    train(model, optimizer, data[:FREQUENCY])
    with failing():
        train(model, optimizer, data[FREQUENCY:INSTALLS])
        with pytest.raises(torch.linalg.LinAlgError, match="a test") as caught:
            train(model, optimizer, data[INSTALLS : INSTALLS + 1])
    assert "in the background" in caught.value.__notes__[0]
    optimizer.zero_grad()
    train(model, optimizer, data[INSTALLS:])


def test_an_error_reaches_the_functional_door():
    data, (step, params, state) = batches(INSTALLS + 1), make_step()
    params, state = run(step, params, state, data[:FREQUENCY])
    with failing():
        params, state = run(step, params, state, data[FREQUENCY:INSTALLS])
        with pytest.raises(torch.linalg.LinAlgError, match="a test"):
            run(step, params, state, data[INSTALLS:])


@pytest.mark.parametrize("make", [drop_in, make_step])
def test_no_thread_is_left(make: Callable[..., Any], monkeypatch):
    def threads() -> set[threading.Thread]:
        return {t for t in threading.enumerate() if t.name.startswith(THREAD)}

    before = threads()
    gate, made = Gate(monkeypatch), make()
    train(*made, batches(FREQUENCY + 1)) if make is drop_in else run(*made, batches(FREQUENCY + 1))
    (mine,) = threads() - before
    assert gate.begun.wait(60)
    gate.opened.set()
    mine.join(60)
    assert not mine.is_alive(), "what nobody fetches is computed, and that is all"


def test_what_cannot_be_inverted_keeps_its_inverses():
    """Without damping the factors of few rows are singular."""
    data = batches(2 * FREQUENCY, rows=2)
    table = torch.full((len(data),), 0.1, dtype=torch.float64)
    table[FREQUENCY] = 0.0
    step, params, state = make_step(damping=table)
    params, state = run(step, params, state, data[:FREQUENCY])
    before = [leaf.clone() for leaf in inverses_of(state)]
    params, state = run(step, params, state, data[FREQUENCY:])
    assert thor_fx.metrics(state)["failed_inverses"] > 0
    assert any(map(torch.equal, before, inverses_of(state)))
    assert all(leaf.isfinite().all() for leaf in inverses_of(state))


@pytest.mark.parametrize("inverse", ["cholesky", "eigen", "newton_schulz", "ekfac"])
def test_what_fails_is_as_it_is_when_installed(inverse):
    """And not as it was when the inversion began."""
    step, params, state = make_step(inverse=inverse)
    params, state = run(step, params, state, batches(INSTALLS))
    (own,) = thor_fx.optimizer_state.preconditioners({"": state.inner.inner[0]}).values()
    for leaf in pytree.tree_leaves(own.memory.averages.factors["0.weight"]):
        leaf.fill_(torch.inf)
    tx = precondition(
        Schedule("damping", 0.1), inverse=inverse, frequency=FREQUENCY, refresh_rule=Overlap(FREQUENCY)
    )
    taken = Taken(INSTALLS, frozenset(), frozenset(LAYERS))
    new, due = tx.between(own, params, Signals(step.coverage, {"damping": torch.tensor(0.1)}), taken)
    assert due is None
    same = {
        layer.name: all(map(torch.equal, *map(pytree.tree_leaves, (own.inverses[key], new.inverses[key]))))
        for key, (layer,) in thor_fx.refresh.by_shape(step.coverage, params).items()
    }
    assert same == {"0.weight": True, "2.weight": False}
    assert new.failures > own.failures


@pytest.mark.parametrize("skipped", [0, FREQUENCY, FREQUENCY + 1])
def test_skipped_steps(skipped):
    data = batches(2 * INSTALLS)
    data[skipped] = data[skipped][0] * torch.nan, data[skipped][1]
    found = by_both_doors(lambda: build(mlp), data, **SETTINGS, factor_decay=DECAY)
    assert all(p.isfinite().all() for p in found[-1].values())


def test_factors_that_come_late(started):
    """The inversion begins anew, and is over when it has to be."""
    data, (model, optimizer) = batches(2 * FREQUENCY), drop_in()
    train(model, optimizer, data[:FREQUENCY])
    x, y = data[FREQUENCY]
    model.eval()
    F.cross_entropy(model(x), y).backward()
    with pytest.warns(UserWarning, match="found no factors"):
        optimizer.step()
    optimizer.zero_grad()
    model.train()
    train(model, optimizer, data[FREQUENCY + 1 : INSTALLS])
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    assert len(started) == 2
    before = inverse_of(model, optimizer)
    expected = train(model, optimizer, data[INSTALLS:])
    assert len(started) == 2
    assert not torch.equal(inverse_of(model, optimizer), before)
    fresh, resumed = drop_in()
    fresh.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert all(map(identical, train(fresh, resumed, data[INSTALLS:]), expected))


def inverse_of(model: nn.Module, optimizer: thor_fx.Thor, index: int = 0) -> Tensor:
    weight = model[index].weight
    return optimizer.state[weight]["inverses"][f"{index}.weight"]["input"][0].clone()


# --- programs -------------------------------------------------------------------------------------


def test_groups_of_parameters():
    data = batches(2 * INSTALLS)
    expected = by_functional_door(build(mlp), data, **SETTINGS, factor_decay=DECAY)
    model, optimizer = drop_in(params=[{"params": ["2.weight", "2.bias"]}])
    assert_same(train(model, optimizer, data), expected)


@unfreezes
def test_a_layer_that_is_unfrozen_while_an_inversion_runs():
    data = batches(4 * FREQUENCY)
    model = thor_fx.compile(build(mlp), backend="aot_eager")
    model[0].requires_grad_(False)
    optimizer = thor_fx.Thor(model, **SETTINGS, factor_decay=DECAY)
    train(model, optimizer, data[: FREQUENCY + 1])
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": model[0].parameters()})
    before = inverse_of(model, optimizer, 2)
    train(model, optimizer, data[FREQUENCY + 1 : INSTALLS])
    assert torch.equal(inverse_of(model, optimizer, 2), before)
    first = inverse_of(model, optimizer)
    assert first.any(), "it was inverted in its first step"
    train(model, optimizer, data[INSTALLS : INSTALLS + 1])
    assert not torch.equal(inverse_of(model, optimizer, 2), before)


def test_a_gradient_scaler():
    data = batches(2 * INSTALLS)
    expected = by_drop_in_door(build(mlp), data, **SETTINGS, factor_decay=DECAY)
    model, optimizer = drop_in()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
    found: list[Parameters] = []
    for x, y in data:
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        found.append(snapshot(dict(model.named_parameters())))
    assert_same(found, expected, rtol=1e-10)


def test_adaptive_damping():
    """It changes after the factors are measured, and does not change what is inverted."""
    data, ends = batches(INSTALLS + 3), []
    for gated in (True, False):
        rule = thor_fx.LevenbergMarquardt(0.1, interval=2)
        with pytest.MonkeyPatch.context() as patch:
            if not gated:
                patch.setattr("thor_fx.ahead.can_work", lambda device: False)
            params, state = run(*make_step(damping=rule), data)
        ends.append(params)
    assert state.damping != 0.1
    assert identical(*ends)


@pytest.mark.inductor
def test_compiled_by_inductor():
    data = batches(2 * INSTALLS, dtype=torch.float32)
    found = by_functional_door(build(mlp, torch.float32), data, backend="inductor", **SETTINGS)
    assert_same(found, by_functional_door(build(mlp, torch.float32), data, **SETTINGS), rtol=1e-4)


# --- on a GPU -------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_gpu(**settings: Any) -> tuple[Any, Any, Any, list[Batch]]:
    model = nn.Sequential(nn.Linear(700, 600), nn.Tanh(), nn.Linear(600, 3)).cuda()
    data = [(torch.randn(64, 700, device="cuda"), torch.randint(3, (64,), device="cuda")) for _ in range(20)]
    tx = thor_fx.thor(**{**SETTINGS, "block_size": None, **settings})
    step = thor_fx.compile_step(classifier_loss(model), tx, backend="eager")
    params = snapshot(dict(model.named_parameters()))
    return step, params, step.init(params, *data[0]), data


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("inverse", ["cholesky", "eigen", "newton_schulz", "ekfac"])
def test_the_side_stream_changes_no_number(inverse, monkeypatch):
    step, params, state, data = on_gpu(inverse=inverse, factor_decay=DECAY)
    start = snapshot(params), copy.deepcopy(state)
    beside, _ = run(step, params, state, data)
    monkeypatch.setattr("thor_fx.ahead.can_work", lambda device: False)
    on_the_spot, _ = run(step, *start, data)
    assert identical(beside, on_the_spot)


@pytest.mark.gpu
@needs_gpu
def test_no_step_waits_for_the_gpu():
    """After the first one; the thread in the background may."""
    step, params, state, data = on_gpu()
    params, state = run(step, params, state, data[:1])
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    before = torch.cuda.Event()
    before.record()
    run(step, params, state, data[1:])
    assert not before.query(), "all steps were queued behind what the GPU is still doing"
