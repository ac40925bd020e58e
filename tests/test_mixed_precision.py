"""Autocast and gradient scalers: the scale is nowhere in the result."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import thor_fx
from eager_thor import SETTINGS, EagerThor, Optimizer, assert_equal_to_hooks, both, errors, take_step
from thor_fx.compile import collector_of
from training import MODELS, Parameters, assert_same, batches, build, identical, mlp, snapshot, train

GradScaler = torch.amp.GradScaler

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
ONE_HALF_STEP = {torch.bfloat16: 2e-2, torch.float16: 3e-3}
STEPS = 9


# --- autocast ----------------------------------------------------------------------------------------------


def test_the_rows_under_autocast_are_in_half_precision():
    """The oracle's rows are cast as autocast casts them: without that the two differ by 1e-3."""

    def program(model: nn.Module, optimizer: Optimizer) -> None:
        for x, y in batches(5, dtype=torch.float32):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                scores = model(x)
                assert scores.dtype == torch.bfloat16
                loss = F.cross_entropy(scores, y)
            loss.backward()
            take_step(optimizer, len(x))

    assert_equal_to_hooks(mlp, program, rtol=2e-6, dtype=torch.float32)


@HALVES
@pytest.mark.parametrize("name", ["mlp", "attention", "checkpointed"])
def test_autocast_is_close_to_full_precision(dtype, name):
    full = train_under(MODELS[name], torch.float32, enabled=False)
    half = train_under(MODELS[name], dtype, enabled=True)
    found = errors(half, full)
    assert 0 < max(found.values()) < STEPS * ONE_HALF_STEP[dtype], found


def test_a_step_inside_of_autocast_is_computed_as_outside():
    """Trainers call ``step`` inside of theirs; what is preconditioned is not rounded for it."""
    trajectories = []
    for inside in (True, False):
        model = thor_fx.compile(build(mlp, torch.float32), backend="aot_eager")
        optimizer = thor_fx.Thor(model, **{**SETTINGS, "damping": 0.1})
        for x, y in batches(4, dtype=torch.float32):
            F.cross_entropy(model(x), y).backward()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
                optimizer.step()
            optimizer.zero_grad()
        trajectories.append(snapshot(dict(model.named_parameters())))
    assert identical(*trajectories)


@pytest.mark.parametrize("settings", [{}, {"refresh": thor_fx.Every(2), "factor_decay": 0.5}])
def test_a_functional_step_inside_of_autocast_casts_the_model_alone(settings):
    """As with autocast in the loss function; and another step outside of it is one without autocast."""
    model, data = build(mlp, torch.float32), batches(5, dtype=torch.float32)

    def loss_fn(params: Parameters, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, params, (x,)), y)

    def own_autocast(params: Parameters, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss_fn(params, x, y)

    def trained(loss: Any, inside: bool) -> tuple[Parameters, float]:
        tx = thor_fx.thor(**{**SETTINGS, **settings})
        step = thor_fx.compile_step(loss, tx, backend="eager", donate=False)
        params: Any = dict(model.named_parameters())
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            state = step.init(params, *data[0])
            for batch in data:
                params, state, _ = step(params, state, *batch)
        return params, float(step(params, state, *data[0])[2].loss)

    expected, expected_loss = trained(own_autocast, inside=False)
    found, loss = trained(loss_fn, inside=True)
    assert identical(found, expected)
    assert loss != expected_loss
    plain = F.cross_entropy(functional_call(model, found, (data[0][0],)), data[0][1])
    assert loss == pytest.approx(float(plain), rel=1e-6)


def test_factors_inside_of_autocast_are_summed_in_full_precision():
    model, (x, y) = build(mlp, torch.float32), batches(1, dtype=torch.float32)[0]

    def loss_fn(params: Parameters, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, params, (x,)), y)

    def own_autocast(params: Parameters, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss_fn(params, x, y)

    params = dict(model.named_parameters())
    expected = thor_fx.factors(own_autocast, params, x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = thor_fx.factors(loss_fn, params, x, y)
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name].A, expected[name].A)
        assert torch.equal(found[name].G, expected[name].G)


def train_under(make: Callable[[], nn.Module], dtype: torch.dtype, enabled: bool) -> Parameters:
    model, optimizer = next(both(make, torch.float32))
    for x, y in batches(5, dtype=torch.float32):
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        take_step(optimizer, len(x))
    assert optimizer.metrics().items() >= {"skipped_steps": 0, "failed_inverses": 0}.items()
    assert optimizer.coverage.layers
    return snapshot(dict(model.named_parameters()))


@HALVES
def test_autocast_through_both_doors(dtype):
    model, data = build(mlp, torch.float32), batches(5, dtype=torch.float32)

    def loss_fn(params: Parameters, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return F.cross_entropy(functional_call(model, params, (x,)), y)

    step = thor_fx.compile_step(loss_fn, thor_fx.thor(**SETTINGS), backend="eager")
    params: Any = snapshot(dict(model.named_parameters()))
    state = step.init(params, *data[0])
    for batch in data:
        params, state, _ = step(params, state, *batch)
    found = errors(train_under(mlp, dtype, enabled=True), params)
    assert max(found.values()) < 2e-6, found


# --- gradient scalers --------------------------------------------------------------------------------------


def scaled(
    scaler: GradScaler,
    data: list[tuple[Tensor, Tensor]] | None = None,
    before_step: Callable[[nn.Module, GradScaler, thor_fx.Thor], None] = lambda *_: None,
    model: nn.Module | None = None,
    **settings: Any,
) -> tuple[list[Parameters], thor_fx.Thor]:
    """The loop of the documentation of ``torch.amp``; the parameters after every step."""
    model = thor_fx.compile(build(mlp) if model is None else model, backend="aot_eager")
    optimizer = thor_fx.Thor(model, **{**SETTINGS, **settings})
    trajectory = []
    for x, y in batches(STEPS) if data is None else data:
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        before_step(model, scaler, optimizer)
        scaler.step(optimizer)
        scaler.update()
        trajectory.append(snapshot(dict(model.named_parameters())))
    return trajectory, optimizer


def unscaled(**settings: Any) -> list[Parameters]:
    model, optimizer = next(both(mlp, **settings))
    return train(model, optimizer, batches(STEPS))


def changing(scale: float = 256.0) -> GradScaler:
    """Doubles its scale in every third step, from step 2 on."""
    return GradScaler("cpu", init_scale=scale, growth_interval=3)


def test_a_changing_scale_changes_nothing():
    """Powers of two are exact: bit by bit."""
    scaler = changing()
    trajectory, optimizer = scaled(scaler)
    assert scaler.get_scale() == 256 * 8
    assert all(identical(one, other) for one, other in zip(trajectory, unscaled(), strict=True))
    assert not hasattr(optimizer, "grad_scale")


def test_an_odd_scale():
    assert_same(scaled(changing(1234.5))[0], unscaled(), rtol=1e-12)


def test_a_new_scale_compiles_nothing(monkeypatch):
    """One update with factors and one without."""
    made = []
    compile_graph = thor_fx.compiled_update.compile_graph

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(1)
        return compile_graph(*args, **kwargs)

    monkeypatch.setattr(thor_fx.compiled_update, "compile_graph", counted)
    scaled(GradScaler("cpu", init_scale=2.0, growth_interval=1))
    assert len(made) == 2


def test_a_scale_and_a_loss_scale_by_hand():
    """The caller multiplies by both."""
    model = thor_fx.compile(build(mlp), backend="aot_eager")
    optimizer, scaler = thor_fx.Thor(model, **SETTINGS, loss_scale=8.0), changing()
    for x, y in batches(STEPS):
        scaler.scale(8.0 * F.cross_entropy(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert identical(snapshot(dict(model.named_parameters())), unscaled()[-1])


def clip(model: nn.Module, scaler: GradScaler, optimizer: thor_fx.Thor) -> None:
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)


def clipped() -> list[Parameters]:
    model, optimizer = next(both(mlp))
    trajectory = []
    for x, y in batches(STEPS):
        F.cross_entropy(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        trajectory.append(snapshot(dict(model.named_parameters())))
    return trajectory


def test_gradients_that_were_unscaled_to_be_clipped():
    scaler = changing()
    trajectory, _ = scaled(scaler, before_step=clip, loss_scale=scaler)
    assert all(identical(one, other) for one, other in zip(trajectory, clipped(), strict=True))
    assert not identical(trajectory[-1], unscaled()[-1])


def test_naming_the_scaler_without_need():
    """It is named, and ``unscale_`` is called in some steps only."""
    scaler = changing()
    trajectory, _ = scaled(scaler, loss_scale=scaler)
    assert all(identical(one, other) for one, other in zip(trajectory, unscaled(), strict=True))
    scaler, calls = changing(), []

    def sometimes(model: nn.Module, scaler: GradScaler, optimizer: thor_fx.Thor) -> None:
        calls.append(1)
        if len(calls) % 2:
            scaler.unscale_(optimizer)

    trajectory, _ = scaled(scaler, before_step=sometimes, loss_scale=scaler)
    assert all(identical(one, other) for one, other in zip(trajectory, unscaled(), strict=True))


def test_unscaled_gradients_need_the_scaler():
    with pytest.raises(RuntimeError, match=r"unscale_ was called .* Thor\(\.\.\., loss_scale=scaler\)"):
        scaled(changing(), before_step=clip)


def test_a_scaler_that_is_switched_off():
    scaler = GradScaler("cpu", enabled=False)
    for settings in ({}, {"loss_scale": scaler}):
        trajectory, _ = scaled(scaler, **settings)
        assert all(identical(one, other) for one, other in zip(trajectory, unscaled(), strict=True))


def test_gradient_accumulation_with_a_scaler():
    model, scaler = thor_fx.compile(build(mlp), backend="aot_eager"), changing()
    optimizer = thor_fx.Thor(model, **SETTINGS)
    for x, y in batches(STEPS):
        for part_x, part_y in zip(x.split([4, 3]), y.split([4, 3]), strict=True):
            scaler.scale(F.cross_entropy(model(part_x), part_y) * (len(part_x) / len(x))).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert_same([snapshot(dict(model.named_parameters()))], unscaled()[-1:])


@pytest.mark.parametrize("wrong", ["fast", None, [2.0], torch.nn.Linear(1, 1)], ids=str)
def test_what_a_loss_scale_can_be(wrong):
    with pytest.raises(TypeError, match="loss_scale"):
        thor_fx.Thor(thor_fx.compile(build(mlp), backend="eager"), **SETTINGS, loss_scale=wrong)


# --- overflow ----------------------------------------------------------------------------------------------


def clamp(model: nn.Module, scaler: GradScaler, optimizer: thor_fx.Thor) -> None:
    """Turns infinities into numbers, so that only the scaler knows."""
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_value_(model.parameters(), 1.0)
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("before_step", [lambda *_: None, clamp], ids=["plain", "clamped"])
@pytest.mark.parametrize("at", [4, 3], ids=["factor step", "plain step"])
def test_an_overflow_moves_nothing(before_step, at):
    data = [x for x, _ in batches(STEPS)]
    scaler = GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    model = thor_fx.compile(build(mlp), backend="aot_eager")
    optimizer = thor_fx.Thor(model, **SETTINGS, loss_scale=scaler)
    before: Any = None
    for step, x in enumerate(data):
        overflow = torch.zeros(model(x).shape, dtype=x.dtype)
        overflow[0, 0] = 1e308 * (step == at)
        scaler.scale((model(x).square().sum(-1).mean()) + (model(x) * overflow).sum()).backward()
        before_step(model, scaler, optimizer)
        before = state_of(model, optimizer) if step == at else before
        scaler.step(optimizer)
        if step == at:
            assert identical(state_of(model, optimizer), before)
            assert optimizer.metrics()["skipped_steps"] == 1
        scaler.update()
        optimizer.zero_grad()
    assert scaler.get_scale() == 2.0
    assert not identical(state_of(model, optimizer), before)
    assert optimizer.metrics().items() >= {"skipped_steps": 1, "failed_inverses": 0}.items()


def state_of(model: nn.Module, optimizer: thor_fx.Thor) -> Parameters:
    found = snapshot(dict(model.named_parameters()))
    for name, p in list(model.named_parameters()):
        state = optimizer.state[p]
        found |= {f"{name} momentum": state.get("momentum", torch.zeros(())).clone()}
        for layer, sides in state.get("inverses", {}).items():
            found |= {
                f"{layer} {side} {i}": part.clone() for side in sides for i, part in enumerate(sides[side])
            }
    return found


def test_half_precision_training_begins_with_overflows():
    """The first scales are too large; every layer moves in the first step that is not skipped."""
    data = [(100 * x, y) for x, y in batches(20, dtype=torch.float32)]
    scaler = GradScaler("cpu", init_scale=2.0**20)
    model = thor_fx.compile(build(mlp, torch.float32), backend="aot_eager")
    optimizer = thor_fx.Thor(model, **{**SETTINGS, "frequency": 1000})
    start = snapshot(dict(model.named_parameters()))
    skipped = []
    for x, y in data:
        with torch.autocast("cpu", dtype=torch.float16):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        skipped.append(optimizer.metrics()["skipped_steps"])
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
        assert moved == (set() if skipped[-1] == len(skipped) else set(start))
    assert 2 <= skipped[-1] < 15
    assert not collector_of(model).wanted


def test_no_batch_of_the_first_was_good():
    """NaN after NaN, in either door: the step after them is the first."""
    nan = [(x * torch.nan, y) for x, y in batches(3)]
    model, optimizer = next(both(mlp, frequency=50))
    train(model, optimizer, nan)
    found = train(model, optimizer, batches(3))
    eager = build(mlp)
    slow = EagerThor(eager, **{**SETTINGS, "frequency": 50})
    step = thor_fx.compile_step(classifier(), thor_fx.thor(**{**SETTINGS, "frequency": 50}), backend="eager")
    params: Any = snapshot(dict(eager.named_parameters()))
    state = step.init(params, *nan[0])
    for batch in nan:
        params, state, _ = step(params, state, *batch)
    assert not state.ready
    for (x, y), ours in zip(batches(3), found, strict=True):
        F.cross_entropy(eager(x), y).backward()
        slow.step(len(x))
        slow.zero_grad()
        params, state, _ = step(params, state, x, y)
        expected = dict(eager.named_parameters())
        assert max(errors(ours, expected).values()) < 1e-10
        assert max(errors(params, expected).values()) < 1e-10
    assert state.ready
    assert thor_fx.metrics(state).items() >= {"skipped_steps": 3, "failed_inverses": 0}.items()
    assert optimizer.metrics().items() >= {"skipped_steps": 3, "failed_inverses": 0}.items()


def classifier() -> Callable[..., Tensor]:
    model = build(mlp)
    return lambda params, x, y: F.cross_entropy(functional_call(model, dict(params), (x,)), y)


def test_a_resumed_optimizer_does_not_take_factors_out_of_turn():
    """What has been loaded counts as served."""
    model, optimizer = next(both(mlp, frequency=100))
    train(model, optimizer, batches(3))
    twin, resumed = next(both(mlp, frequency=100))
    twin.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    expected = train(model, optimizer, batches(4))
    assert_same(train(twin, resumed, batches(4)), expected)
