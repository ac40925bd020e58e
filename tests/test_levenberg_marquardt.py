"""Damping that adapts itself to how well the quadratic model predicts the loss."""

import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import thor_fx
from eager_steps import Slow
from models import random
from thor_fx.levenberg_marquardt import LevenbergMarquardt
from thor_fx.predicted import PredictedState, solve
from thor_fx.schedule import Schedule
from thor_fx.transform import chain, partition, scale_by_learning_rate
from training import MODELS, batches, build, classifier_loss, identical, snapshot, train

D = torch.float64
SETTINGS = {"lr": 0.05, "momentum": 0.9, "frequency": 3, "bias": "joint"}


class Recording(LevenbergMarquardt):
    """Remembers what it was told."""

    def after(self, damping, state, before, later, world=None):
        found = state
        while not isinstance(found, PredictedState):
            found = found.inner
        told = (float(found.change), float(before), float(later))
        new = super().after(damping, state, before, later, world)
        seen.append((*told, new))
        return new


seen: list[tuple[float, float, float, float]] = []


@pytest.fixture(autouse=True)
def nothing_seen():
    seen.clear()


# --- the rule --------------------------------------------------------------------------------------------


def test_the_paper_changes_the_damping_by_19_20ths_to_the_power_of_the_interval():
    rule = LevenbergMarquardt(1.0)
    omega = (19 / 20) ** 5
    ratios = {
        1.0: omega,
        0.76: omega,
        0.75: 1.0,
        0.25: 1.0,
        0.24: 1 / omega,
        -3.0: 1 / omega,
        math.nan: 1 / omega,
    }
    for ratio, expected in ratios.items():
        assert rule.adjusted(1.0, ratio) == pytest.approx(expected, rel=1e-12)


def test_it_stays_between_its_bounds():
    rule = LevenbergMarquardt(1.0, minimum=0.9, maximum=1.1)
    assert (rule.adjusted(1.0, 1.0), rule.adjusted(1.0, -1.0)) == (0.9, 1.1)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"initial": 0}, ValueError, "initial must be finite and > 0"),
        ({"initial": "1"}, TypeError, "initial must be a number"),
        ({"initial": 1, "interval": 0}, ValueError, "interval must be an integer >= 1"),
        ({"initial": 1, "decay": 1.0}, ValueError, "decay must be below 1"),
        ({"initial": 1, "low": 0.8}, ValueError, "low must be below high"),
        ({"initial": 1, "minimum": 2.0}, ValueError, "initial must be between minimum and maximum"),
        ({"initial": 1, "maximum": 0.0}, ValueError, "maximum must be finite and > 0"),
    ],
)
def test_wrong_settings(settings, error, message):
    with pytest.raises(error, match=message):
        LevenbergMarquardt(**settings)


# --- known ratios ----------------------------------------------------------------------------------------


def one_weight(w: float, x: float, initial: float, **settings):
    """One step on ``(w x)^2 / 2``: ``A = x^2``, ``G = (w x)^2``, and the second derivative is ``x^2``."""
    step = thor_fx.compile_step(
        lambda p, x: (x @ p["w"].T).square().mean() / 2,
        thor_fx.thor(momentum=0.0, damping=Recording(initial, interval=1, minimum=1e-12), **settings),
        backend="eager",
    )
    params, batch = {"w": torch.tensor([[w]], dtype=D)}, torch.tensor([[x]], dtype=D)
    state = step.init(params, batch)
    assert state.damping == initial
    _, state, _ = step(params, state, batch)
    return state


@pytest.mark.parametrize("lr", [0.1, 1.0])
def test_where_the_model_is_exact_the_ratio_is_one_and_the_damping_falls(lr):
    """``w x = 1`` makes ``G = 1`` and the model the loss itself."""
    state = one_weight(0.5, 2.0, 1e-10, lr=lr)
    ((predicted, before, later, _),) = seen
    assert later - before == pytest.approx(predicted, rel=1e-8)
    assert predicted == pytest.approx((lr**2 / 2 - lr) * 1.0, rel=1e-8)  # <U, g> = 1
    assert state.damping == pytest.approx(0.95e-10)


def test_where_the_loss_rises_instead_the_damping_rises():
    """``G`` too small by 4: a step of twice the minimum's distance and more."""
    state = one_weight(0.5, 1.0, 1e-10, lr=1.0)
    ((predicted, before, later, _),) = seen
    assert predicted < 0 < later - before
    assert (later - before) / predicted == pytest.approx(-2.0, rel=1e-8)
    assert state.damping == pytest.approx(1e-10 / 0.95)


def test_where_the_model_predicts_a_rise_the_damping_stays():
    state = one_weight(0.5, 2.0, 1e-10, lr=3.0)
    assert seen[0][0] > 0
    assert state.damping == 1e-10


def test_a_step_that_was_skipped_says_nothing():
    state = one_weight(0.5, torch.inf, 0.1, lr=1.0)
    assert seen[0][0] == 0
    assert state.damping == 0.1


# --- the doors -------------------------------------------------------------------------------------------


def closure_of(model, optimizer, x, y, scale=1.0):
    def closure():
        optimizer.zero_grad()
        loss = scale * F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


def slow_dampings(rule: LevenbergMarquardt, data, make, **settings):
    """(predicted, before, later, new damping) of every step that compares, by dense curvature."""
    model = build(make)
    slow = Slow(model, damping=rule.initial, **settings)
    found = []
    for step, (x, y) in enumerate(data):
        gradients, _ = slow.measure(x, y)
        change = {name: d.detach() for name, d in slow.step(x, y).items()}
        predicted = sum((gradients[n] * d).sum().item() for n, d in change.items())
        for layer, (A, G) in slow.inverses.items():
            d = slow.matrix(layer, change)
            predicted += (d * (torch.linalg.inv(G) @ d @ torch.linalg.inv(A))).sum().item() / 2
        before = F.cross_entropy(model(x), y).item()
        slow.add(change)
        if (step + 1) % rule.interval == 0:
            later = F.cross_entropy(model(x), y).item()
            ratio = (later - before) / predicted
            if predicted < 0:
                slow.o["damping"] = rule.adjusted(slow.o["damping"], ratio)
            found.append((predicted, before, later, slow.o["damping"]))
    return found, snapshot(slow.params)


EXTRA = {
    "plain": {},
    "step_norm": {"step_norm": "spectral", "momentum_on": "gradient", "fallback": "adamw", "lr": 0.01},
    "clips": {"kl_clip": 1e-3, "enable_clip_grad": True, "weight_decay": 0.1, "bias": "raw"},
}


@pytest.mark.parametrize("name", EXTRA)
def test_both_doors_predict_what_the_dense_curvature_says(name):
    """Whatever momentum, clips and step length have made of the step."""
    rule, data = Recording(0.1, interval=2), batches(6)
    settings = {**SETTINGS, **EXTRA[name]}
    expected, end = slow_dampings(rule, data, MODELS["normalised"], **settings)
    assert len({damping for *_, damping in expected}) > 1

    model = build(MODELS["normalised"])
    step = thor_fx.compile_step(
        classifier_loss(model), thor_fx.thor(damping=rule, **settings), backend="eager"
    )
    params = snapshot(dict(model.named_parameters()))
    state = step.init(params, *data[0])
    for batch in data:
        params, state, _ = step(params, state, *batch)
    functional = list(seen)
    seen.clear()
    assert state.damping == functional[-1][-1]

    model = thor_fx.compile(build(MODELS["normalised"]), backend="aot_eager")
    optimizer = thor_fx.Thor(model, damping=rule, **settings)
    for batch in data:
        optimizer.step(closure_of(model, optimizer, *batch))
    assert optimizer.param_groups[0]["damping"] == seen[-1][-1]
    for found in (functional, seen):
        for one, other in zip(found, expected, strict=True):
            assert one == pytest.approx(other, rel=1e-9)
    for found in (params, dict(model.named_parameters())):
        for key, p in end.items():
            torch.testing.assert_close(found[key].detach(), p, rtol=1e-9, atol=1e-12)


def test_the_loss_scale_cancels():
    settings, data = {**SETTINGS, "damping": Recording(0.1, interval=1)}, batches(3)
    model = thor_fx.compile(build(MODELS["mlp"]), backend="aot_eager")
    optimizer = thor_fx.Thor(model, **settings, loss_scale=8.0)
    for batch in data:
        optimizer.step(closure_of(model, optimizer, *batch, scale=8.0))
    scaled = list(seen)
    seen.clear()
    model = thor_fx.compile(build(MODELS["mlp"]), backend="aot_eager")
    optimizer = thor_fx.Thor(model, **settings)
    for batch in data:
        optimizer.step(closure_of(model, optimizer, *batch))
    for one, other in zip(scaled, seen, strict=True):
        assert [value / 8 for value in one[:3]] == pytest.approx(list(other[:3]), rel=1e-9)
        assert one[3] == other[3]


def adaptive(interval: int = 2, **settings):
    model = thor_fx.compile(build(MODELS["mlp"]), backend="aot_eager")
    return model, thor_fx.Thor(model, **SETTINGS, damping=LevenbergMarquardt(0.1, interval), **settings)


def test_without_a_closure_there_is_no_second_loss():
    model, optimizer = adaptive()
    with pytest.raises(
        RuntimeError, match=r"LevenbergMarquardt.* call step\(closure\), where closure computes"
    ):
        train(model, optimizer, batches(1))
    with pytest.raises(RuntimeError, match="returns the loss"):
        optimizer.step(lambda: None)


def test_gradients_and_factors_are_those_of_the_first_run():
    model, optimizer = adaptive(interval=1)
    (x, y), calls = batches(1)[0], []

    def closure():
        calls.append(snapshot({n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert calls == [{}, {}]
    twin = build(MODELS["mlp"])
    F.cross_entropy(twin(x), y).backward()
    for name, p in twin.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, p.grad, rtol=1e-12, atol=1e-15)
    optimizer.zero_grad()
    before = optimizer.param_groups[0]["damping"]
    optimizer.step(closure)
    assert optimizer.metrics().items() >= {"skipped_steps": 0, "failed_inverses": 0}.items()
    assert optimizer.param_groups[0]["damping"] != before


def test_it_is_saved_and_continues_bitwise():
    data, results = batches(6), []
    for saved_after in (6, 3):
        model, optimizer = adaptive()
        for batch in data[:saved_after]:
            optimizer.step(closure_of(model, optimizer, *batch))
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        model, optimizer = adaptive()
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        for batch in data[saved_after:]:
            optimizer.step(closure_of(model, optimizer, *batch))
        results.append((snapshot(dict(model.named_parameters())), optimizer.param_groups[0]["damping"]))
    assert identical(results[0][0], results[1][0])
    assert results[0][1] == results[1][1] != 0.1


def test_a_group_may_keep_a_damping_of_its_own():
    model, optimizer = adaptive(interval=1, params=[{"params": ["2.weight", "2.bias"], "damping": 0.7}])
    for batch in batches(2):
        optimizer.step(closure_of(model, optimizer, *batch))
    assert optimizer.param_groups[0]["damping"] == 0.7
    assert optimizer.param_groups[1]["damping"] not in {0.1, 0.7}
    with pytest.raises(ValueError, match="pass it to Thor, not to a group"):
        thor_fx.Thor(
            model, **SETTINGS, damping=0.1, params=[{"params": "2.weight", "damping": LevenbergMarquardt(1)}]
        )


def test_running_statistics_are_those_of_one_run():
    """The functional door evaluates the loss again and writes nothing else."""
    model = build(lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)))
    buffers = snapshot(dict(model.named_buffers()))

    def loss_fn(params, buffers, x, y):
        buffers = {name: b.clone() for name, b in buffers.items()}
        out = torch.func.functional_call(model, {**params, **buffers}, (x,))
        return F.cross_entropy(out, y), (buffers, None)

    tx = thor_fx.thor(**SETTINGS, damping=LevenbergMarquardt(0.1, interval=1))
    step = thor_fx.compile_step(loss_fn, tx, backend="eager")
    params, batch = snapshot(dict(model.named_parameters())), batches(1)[0]
    state = step.init(params, *batch, buffers=buffers)
    _, state, _ = step(params, state, *batch)
    assert state.buffers["1.num_batches_tracked"] == 1
    assert state.damping != 0.1


def test_one_damping_in_a_chain_and_none_in_a_partition():
    tx = thor_fx.thor(**SETTINGS, damping=LevenbergMarquardt(0.1))
    assert chain(tx, scale_by_learning_rate(Schedule("rate", 1.0))).adaptive == LevenbergMarquardt(0.1)
    with pytest.raises(ValueError, match="adapts one damping for all parameters"):
        partition({"x": tx}, {"w": "x"})
    with pytest.raises(ValueError, match=r"two transforms in this chain"):
        chain(tx, thor_fx.thor(**SETTINGS, damping=LevenbergMarquardt(0.1)))


# --- the curvature ---------------------------------------------------------------------------------------


def test_solving_with_stored_inverses():
    x, parts = random(1, D, 2, 5, 3), [random(2, D, 2, 2, 2, 2), random(3, D, 2, 1, 1, 1)]
    blocks = tuple(p @ p.mT + torch.eye(p.shape[-1], dtype=D) for p in parts)
    dense = torch.stack([torch.block_diag(*blocks[0][i], *blocks[1][i]) for i in range(2)])
    torch.testing.assert_close(solve(blocks, x), torch.linalg.solve(dense, x), rtol=1e-10, atol=1e-12)
    diagonal = (random(4, D, 2, 5).abs() + 1,)
    torch.testing.assert_close(solve(diagonal, x), x / diagonal[0][..., None], rtol=1e-12, atol=0)
    assert solve((), x) is x


def test_an_inverse_of_zeros_bends_nothing():
    assert not solve((torch.zeros(1, 1, 4, 4, dtype=D),), random(1, D, 1, 4, 2)).any()
    assert not solve((torch.zeros(1, 4, dtype=D),), random(1, D, 1, 4, 2)).any()
