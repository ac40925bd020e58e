"""Saved states say what they are: earlier ones are migrated, later ones and those of others are refused."""

import copy
import functools
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.utils import _pytree as pytree

import thor_fx
from thor_fx import state_versions
from thor_fx.precondition import PreconditionState
from thor_fx.skipping import FACTORS, RECENT
from thor_fx.state_classes import STATE_CLASSES
from thor_fx.transform import SkipState
from training import (
    assert_moved,
    assert_same,
    batches,
    build,
    classifier_loss,
    compiled,
    identical,
    mlp,
    snapshot,
    train,
)

STATES = Path(__file__).parent / "golden" / "states"
SETTINGS: dict[str, Any] = {"lr": 0.05, "damping": 0.1, "momentum": 0.9, "frequency": 2}
OF_GOLDEN: dict[str, Any] = {**SETTINGS, "block_size": 4, "factor_decay": 0.5, "fallback": "adamw"}


def thor(**settings: Any) -> tuple[torch.nn.Module, thor_fx.Thor]:
    model = compiled()
    return model, thor_fx.Thor(model, **{**SETTINGS, **settings})


@functools.cache
def after_three_steps(**settings: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state dicts of model and optimizer."""
    model, optimizer = thor(**settings)
    train(model, optimizer, batches(3))
    return model.state_dict(), optimizer.state_dict()


def saved(**settings: Any) -> dict[str, Any]:
    return copy.deepcopy(after_three_steps(**settings)[1])


def overwrite(state: Any, other: Any) -> None:
    """Write the numbers of a state of version 0 into one of today.

    It did not count failures in a row, and remembered no steps.
    """
    mine, theirs = (
        {pytree.keystr(path): leaf for path, leaf in pytree.tree_flatten_with_path(tree)[0]}
        for tree in (state, other)
    )
    assert all("failing" in name for name in mine.keys() ^ theirs.keys())
    with torch.no_grad():
        for name in theirs:
            if isinstance(mine[name], Tensor) and not name.endswith(".recent"):
                mine[name].copy_(theirs[name])


# --- earlier versions ---------------------------------------------------------------------------------


def test_a_state_dict_of_version_0_continues_bitwise():
    """As an optimizer of today into whose tensors the saved numbers are written."""
    golden, data = torch.load(STATES / "drop_in_0.pt", weights_only=True), batches(6)
    model, optimizer = thor(**OF_GOLDEN)
    train(model, optimizer, data[:3])
    model.load_state_dict(golden["model"])
    overwrite([optimizer.state[p] for p in model.parameters()], list(golden["optimizer"]["state"].values()))
    expected = train(model, optimizer, data[3:])

    fresh, resumed = thor(**OF_GOLDEN)
    fresh.load_state_dict(golden["model"])
    resumed.load_state_dict(golden["optimizer"])
    found = train(fresh, resumed, data[3:])
    assert all(map(identical, found, expected))
    assert_same(found[-1:], [golden["after"]], rtol=1e-10)
    assert_moved(found, golden["model"])
    assert resumed.state_dict()["param_groups"][0]["format"]["version"] == state_versions.VERSION


def test_a_functional_state_of_version_0_continues_bitwise():
    with torch.serialization.safe_globals(STATE_CLASSES):
        golden = torch.load(STATES / "functional_0.pt", weights_only=True)
    data, model = batches(6), build(mlp)
    assert golden["state"].version == 0

    def continued(state: Any) -> dict[str, Tensor]:
        params = snapshot(golden["params"])
        for batch in data[3:]:
            params, state, _ = step(params, state, *batch)
        assert state.version == state_versions.VERSION
        return dict(params)

    tx = thor_fx.thor(**OF_GOLDEN)
    step = thor_fx.compile_step(classifier_loss(model), tx, backend="eager")
    found = continued(copy.deepcopy(golden["state"]))  # without init
    start = step.init(snapshot(golden["params"]), *data[0])
    overwrite(start.inner, golden["state"].inner)
    assert identical(found, continued(start._replace(step=3, ready=True)))
    assert_same([found], [golden["after"]], rtol=1e-10)


METHODS = ["cholesky", "ekfac", "eva"]


@pytest.mark.parametrize("inverse", METHODS)
def test_state_dicts_of_version_1_have_not_failed(inverse):
    """Up to then nobody counted how often a block fails in a row."""
    state = saved(inverse=inverse)
    before = {number: entry.pop("failing") for number, entry in state["state"].items() if "failing" in entry}
    state["param_groups"][0]["format"]["version"] = 1
    model, optimizer = thor(inverse=inverse)
    train(model, optimizer, batches(1))
    for counts in failing(optimizer):
        counts.fill_(3)
    optimizer.load_state_dict(state)
    train(model, optimizer, batches(1))
    assert len(before) == 2
    for number, counts in before.items():
        now = optimizer.state_dict()["state"][number]["failing"]
        assert {name: count.shape for name, count in now.items()} == {n: c.shape for n, c in counts.items()}
    assert not any(counts.any() for counts in failing(optimizer))


def failing(optimizer: thor_fx.Thor) -> list[Tensor]:
    return [t for entry in optimizer.state.values() for t in pytree.tree_leaves(entry.get("failing", {}))]


@pytest.mark.parametrize("inverse", METHODS)
def test_functional_states_of_version_1_have_not_failed(inverse):
    data, model = batches(2), build(mlp)
    tx = thor_fx.thor(**SETTINGS, inverse=inverse)
    step = thor_fx.compile_step(classifier_loss(model), tx, backend="eager", donate=False)
    params = dict(model.named_parameters())
    params, state, _ = step(params, step.init(params, *data[0]), *data[0])

    def uncounted(part: Any) -> Any:
        return part._replace(failing={}) if isinstance(part, PreconditionState) else part

    def is_leaf(part: Any) -> bool:
        return isinstance(part, PreconditionState)

    old = state._replace(inner=pytree.tree_map(uncounted, state.inner, is_leaf=is_leaf), version=1)
    assert len(pytree.tree_leaves(old)) < len(pytree.tree_leaves(state))
    found, expected = (step(params, before, *data[1])[0] for before in (old, state))
    assert identical(found, expected)


def test_functional_states_of_version_2_remember_no_steps():
    data, model = batches(2), build(mlp)
    tx = thor_fx.thor(**SETTINGS)
    step = thor_fx.compile_step(classifier_loss(model), tx, backend="eager", donate=False)
    params = dict(model.named_parameters())
    params, state, _ = step(params, step.init(params, *data[0]), *data[0])
    old = state._replace(inner=SkipState(*state.inner[:2]), version=2)
    assert old.inner.recent.numel() == 0
    (found, after, _), (expected, usual, _) = (step(params, before, *data[1]) for before in (old, state))
    assert identical(found, expected)
    assert after.inner.recent.tolist() == [0] * RECENT
    assert usual.inner.recent.tolist() == [0] * (RECENT - 2) + [FACTORS, 0]


def test_state_dicts_of_version_2_remember_no_steps():
    state = saved()
    (group,) = state["param_groups"]
    group["format"]["version"] = 2
    assert group.pop("recent_steps").numel() == RECENT
    model, resumed = thor()
    model.load_state_dict(after_three_steps()[0])
    resumed.load_state_dict(state)
    found = train(model, resumed, batches(1))
    again, whole = thor()
    again.load_state_dict(after_three_steps()[0])
    whole.load_state_dict(saved())
    assert identical(found[-1], train(again, whole, batches(1))[-1])
    assert resumed.param_groups[0]["recent_steps"].tolist() == [0] * RECENT


def test_migrations_run_one_after_the_other(monkeypatch):
    monkeypatch.setattr(state_versions, "VERSION", 4)
    migrations = {1: lambda saved: [*saved, "1 to 2"], 3: lambda saved: [*saved, "3 to 4"]}
    old = ["0"]
    assert state_versions.migrated(old, 0, migrations, "it") == ["0", "1 to 2", "3 to 4"]
    assert state_versions.migrated(old, 2, migrations, "it") == ["0", "3 to 4"]
    assert state_versions.migrated(old, 4, migrations, "it") is old
    assert old == ["0"]


def test_every_migration_starts_from_an_earlier_version():
    for migrations in (state_versions.OPTIMIZER, state_versions.STEP, state_versions.CHECKPOINT):
        assert set(migrations) <= set(range(state_versions.VERSION))


def test_a_later_version_is_refused():
    _, optimizer = thor()
    state = saved()
    state["param_groups"][0]["format"]["version"] = 7
    with pytest.raises(ValueError, match=r"is of version 7 .* reads versions up to 3: install"):
        optimizer.load_state_dict(state)
    model, data = build(mlp), batches(1)[0]
    step = thor_fx.compile_step(classifier_loss(model), thor_fx.thor(**SETTINGS), backend="eager")
    params = dict(model.named_parameters())
    with pytest.raises(ValueError, match=r"state is of version 7 .* reads versions up to 3: install"):
        step(params, thor_fx.StepState(3, (), version=7), *data)


# --- other optimizers and options -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "error", "text"),
    [
        ({}, ValueError, r"with 'state' and 'param_groups': it has \[\]"),
        ({"0.weight": 1}, ValueError, r"it has \['0.weight'\]"),
        ([], TypeError, r"state_dict must be what Thor.state_dict\(\) returned"),
    ],
)
def test_what_is_no_state_dict_is_refused(state, error, text):
    with pytest.raises(error, match=text):
        thor()[1].load_state_dict(state)


@pytest.mark.parametrize("other", [torch.optim.AdamW, torch.optim.SGD])
def test_the_state_dict_of_another_optimizer_is_refused(other):
    model, optimizer = thor()
    state = other(model.parameters(), lr=0.1).state_dict()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"another optimizer: its groups have \['lr', .* no \['damping', "):
        optimizer.load_state_dict(state)
    assert optimizer.state_dict() == before


CURVATURE = ["inverses", "failing"]
OTHERS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "inverse": (CURVATURE, {"inverse": "ekfac"}),
    "bias": (CURVATURE, {"bias": "joint"}),
    "sharing": (CURVATURE, {"sharing": "reduce"}),
    "fisher": (CURVATURE, {"fisher": "sampled", "likelihood": "categorical"}),
    "momentum_on": (["momentum"], {"momentum_on": "gradient"}),
    "fallback": (["momentum"], {"fallback": "adamw"}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_options_are_refused_by_name(name):
    """What has another meaning; without it the rest is loaded."""
    entries, settings = OTHERS[name]
    state, optimizer = saved(), thor(**settings)[1]
    text = rf"saved with {name}=.* and this Thor has {name}=.*take {re.escape(str(entries))}"
    with pytest.raises(ValueError, match=text):
        optimizer.load_state_dict(state)
    for own in state["state"].values():
        for entry in entries:
            own.pop(entry, None)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["format"][name] == settings[name]


@pytest.mark.parametrize("settings", [{"block_size": 2}, {"max_dim": 4, "long_side": "identity"}])
def test_other_shapes_are_refused_by_the_option(settings):
    model, optimizer = thor(**settings)
    optimizer.load_state_dict(saved())
    (name, value) = next(iter(settings.items()))
    for _ in range(2):  # a second try does not go on without it
        with pytest.raises(ValueError, match=rf"\({name}=\d+ then, {value} now"):
            train(model, optimizer, batches(1))


def test_other_shapes_are_refused_amid_a_training_and_ever_after():
    model, optimizer = thor(block_size=2)
    train(model, optimizer, batches(1))
    before = snapshot(dict(model.named_parameters()))
    with pytest.raises(ValueError, match=r"\(block_size=\d+ then, 2 now"):
        optimizer.load_state_dict(saved())
    with pytest.raises(ValueError, match=r"\(block_size=\d+ then, 2 now"):
        train(model, optimizer, batches(1))
    assert identical(dict(model.named_parameters()), before)


def test_a_sharing_that_is_a_function_can_be_saved():
    _, optimizer = thor(sharing=lambda _: "expand")
    assert optimizer.state_dict()["param_groups"][0]["format"]["sharing"] == "a function"


def test_what_a_refresh_rule_wanted_is_not_wanted_without_one():
    """Else every step from the rule's next one on would be a factor step."""
    state, settings = saved(), {"factor_decay": 0.5}
    state["param_groups"][0]["due"] = 4
    model, optimizer = thor(**settings)
    optimizer.load_state_dict(state)
    train(model, optimizer, batches(3))  # 3, 4, 5
    assert optimizer.param_groups[0]["due"] is None
    assert optimizer.metrics()["refreshes"] == 2 + 1  # 0, 2, 4


STEPS: dict[str, tuple[str, dict[str, Any]]] = {
    "inverse": ("moments", {"inverse": "ekfac"}),
    "block size": ("6 in 2x5 in 2", {"block_size": 2}),
    "averages": ("memory.averages", {"factor_decay": 0.5}),
    "damping": ("its damping is None", {"damping": thor_fx.LevenbergMarquardt(0.1)}),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_functional_state_of_other_options_is_refused(name):
    """Also where there was no ``init``; the first difference is named."""
    part, settings = STEPS[name]
    params, state = copy.deepcopy(functional_state())
    tx = thor_fx.thor(**{**SETTINGS, **settings})
    step = thor_fx.compile_step(classifier_loss(build(mlp)), tx, backend="eager")
    with pytest.raises(ValueError, match=f"state does not belong to this step.*{part}"):
        step(params, state, *batches(1)[0])


@functools.cache
def functional_state() -> tuple[dict[str, Tensor], thor_fx.StepState]:
    model = build(mlp)
    step = thor_fx.compile_step(classifier_loss(model), thor_fx.thor(**SETTINGS), backend="eager")
    params: Any = snapshot(dict(model.named_parameters()))
    state = step.init(params, *batches(1)[0])
    return step(params, state, *batches(1)[0])[:2]  # type: ignore[return-value]


# --- ways to save ---------------------------------------------------------------------------------------


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    with torch.serialization.safe_globals(STATE_CLASSES):
        return torch.load(file, weights_only=True)


def test_the_format_survives_torchs_functions_for_checkpoints():
    """They name parameters, and sort groups anew."""
    model, optimizer = thor()
    data = batches(5)
    train(model, optimizer, data[:3])
    weights = copy.deepcopy(model.state_dict())
    state = through_a_file(get_optimizer_state_dict(model, optimizer))
    assert state["param_groups"][0]["format"]["version"] == state_versions.VERSION
    expected = train(model, optimizer, data[3:])
    model.load_state_dict(weights)
    set_optimizer_state_dict(model, optimizer, state)
    assert all(map(identical, train(model, optimizer, data[3:]), expected))
    state["param_groups"][0]["format"]["version"] = 7
    with pytest.raises(ValueError, match="is of version 7"):
        set_optimizer_state_dict(model, optimizer, state)


def test_hooks_see_the_state_first_and_last():
    """A hook may make a state of ours of what somebody has wrapped."""
    _, optimizer = thor()
    seen = []
    optimizer.register_load_state_dict_pre_hook(lambda _, wrapped: wrapped["of thor"])
    optimizer.register_load_state_dict_post_hook(lambda own: seen.append(len(own.state)))
    optimizer.load_state_dict({"of thor": saved()})
    assert seen == [4]
    assert optimizer.param_groups[0]["step"] == 3


def test_numbers_are_loaded_in_the_dtype_that_they_are_kept_in():
    """torch's own rule is that of the parameter: inverses in float32 would be rounded to bfloat16."""
    dtype = torch.bfloat16
    data = batches(5, dtype=dtype)
    model = thor_fx.compile(build(mlp, dtype), backend="aot_eager")
    optimizer = thor_fx.Thor(model, **SETTINGS)
    train(model, optimizer, data[:3])
    weights, state = through_a_file((model.state_dict(), optimizer.state_dict()))
    expected = train(model, optimizer, data[3:])
    fresh = thor_fx.compile(build(mlp, dtype), backend="aot_eager")
    fresh.load_state_dict(weights)
    resumed = thor_fx.Thor(fresh, **SETTINGS)
    resumed.load_state_dict(state)
    kept = [t for t in pytree.tree_leaves(resumed.state_dict()["state"]) if isinstance(t, Tensor)]
    assert torch.float32 in {t.dtype for t in kept}
    assert all(map(identical, train(fresh, resumed, data[3:]), expected))


@pytest.mark.parametrize(
    "settings",
    [
        {"inverse": "ekfac", "kl_clip": 0.1},
        {"inverse": "eva", "step_norm": "adam"},
        {"factor_decay": 0.5, "refresh": thor_fx.ByTrace(), "fallback": "adamw"},
        {"damping": thor_fx.LevenbergMarquardt(0.1)},
        {"factor_decay": 0.5, "refresh_async": True},
    ],
    ids=str,
)
def test_every_functional_state_is_loaded_with_weights_only(settings):
    tx, params = thor_fx.thor(**{**SETTINGS, **settings}), functional_state()[0]
    state = thor_fx.StepState(0, tx.init(params, coverage()))
    assert pytree.tree_structure(through_a_file(state)) == pytree.tree_structure(state)


@functools.cache
def coverage() -> thor_fx.Coverage:
    model = build(mlp)
    step = thor_fx.compile_step(classifier_loss(model), thor_fx.thor(**SETTINGS), backend="eager")
    step.init(dict(model.named_parameters()), *batches(1)[0])
    assert step.coverage is not None
    return step.coverage
