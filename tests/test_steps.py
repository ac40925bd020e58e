"""Both doors against plain loops, for every option of a step and for many together."""

import functools
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import thor_fx
from eager_steps import slowly
from training import (
    MODELS,
    Parameters,
    assert_moved,
    assert_same,
    batches,
    build,
    by_drop_in_door,
    by_functional_door,
    identical,
    snapshot,
    train,
)

PLAIN: dict[str, Any] = {"lr": 0.02, "damping": 0.1, "momentum": 0.9, "frequency": 3}
STEPS = 5
SETTINGS: dict[str, dict[str, Any]] = {
    "relative": {"damping_rule": "relative"},
    "kl_clip": {"kl_clip": 1e-5},
    "kl_clip_gradient": {"kl_clip": 1e-5, "momentum_on": "gradient", "loss_scale": 8.0, "bias": "joint"},
    "global": {"enable_clip_grad": True, "clip": "global", "clip_norm": 0.1},
    "tensor": {"enable_clip_grad": True, "clip_norm": 0.1},
    "adam": {"step_norm": "adam", "loss_scale": 8.0},
    "sgd": {"step_norm": "sgd", "loss_scale": 8.0},
    "sgd_gradient": {"step_norm": "sgd", "momentum_on": "gradient", "bias": "joint"},
    "rms": {"step_norm": "rms", "bias": "joint"},
    "spectral": {"step_norm": "spectral"},
    "orthogonal": {"step_norm": "orthogonal"},
    "gradient": {"momentum_on": "gradient", "weight_decay": 0.1, "loss_scale": 8.0},
    "gradient_nesterov": {"momentum_on": "gradient", "use_nesterov": True},
    "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "adamw": {"fallback": "adamw", "weight_decay": 0.1, "loss_scale": 8.0},
    "adamw_lr": {"fallback": "adamw", "fallback_lr": 0.003},
    "sgd_lr": {"fallback_lr": 0.003},
    "everything": {
        "damping_rule": "relative",
        "kl_clip": 1e-3,
        "step_norm": "adam",
        "momentum_on": "gradient",
        "use_nesterov": True,
        "weight_decay": 0.1,
        "decoupled_weight_decay": True,
        "enable_clip_grad": True,
        "clip": "global",
        "fallback": "adamw",
        "fallback_lr": 0.003,
        "loss_scale": 8.0,
        "bias": "joint",
    },
}


@pytest.mark.parametrize("name", SETTINGS)
def test_both_doors_are_plain_loops(name):
    make, data, settings = MODELS["normalised"], batches(STEPS), {**PLAIN, **SETTINGS[name]}
    expected = slowly(build(make), data, **settings)
    functional = by_functional_door(build(make), data, **settings)
    assert_moved(functional, snapshot(dict(build(make).named_parameters())))
    assert_same(functional, expected, rtol=1e-10)
    assert_same(by_drop_in_door(build(make), data, **settings), expected, rtol=1e-10)
    plain = slowly(build(make), data, **PLAIN)  # an option that everybody ignores would pass until here
    errors = [float((plain[-1][n] - p).norm() / p.norm()) for n, p in expected[-1].items()]
    assert max(errors) > 1e-5


EVERYTHING = {**PLAIN, **SETTINGS["everything"], "loss_scale": 1.0}


def compiled() -> nn.Module:
    return thor_fx.compile(build(MODELS["normalised"]), backend="aot_eager")


@functools.cache
def everything() -> list[Parameters]:
    return by_drop_in_door(build(MODELS["normalised"]), batches(STEPS), **EVERYTHING)


def test_groups_that_are_alike_are_one_group():
    """Clips look at all groups at once."""
    model = compiled()
    optimizer = thor_fx.Thor(model, params=[{"params": ["3.weight", "1.bias"]}], **EVERYTHING)
    assert_same(train(model, optimizer, batches(STEPS)), everything())


@pytest.mark.parametrize("saved_after", [1, 4])
def test_a_loaded_state_continues_bitwise(saved_after):
    data, model = batches(STEPS), compiled()
    optimizer = thor_fx.Thor(model, **EVERYTHING)
    train(model, optimizer, data[:saved_after])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    fresh = compiled()
    fresh.load_state_dict(saved["model"])
    resumed = thor_fx.Thor(fresh, **EVERYTHING)
    resumed.load_state_dict(saved["optimizer"])
    for found, expected in zip(
        train(fresh, resumed, data[saved_after:]), everything()[saved_after:], strict=True
    ):
        assert identical(found, expected)


def test_the_state_has_torchs_names():
    model = compiled()
    optimizer = thor_fx.Thor(model, **EVERYTHING)
    train(model, optimizer, batches(2))
    adam = {"exp_avg", "exp_avg_sq", "step"}
    by_name = {name: set(optimizer.state[p]) for name, p in model.named_parameters()}
    assert by_name["0.weight"] == {"momentum", "inverses", "failing", *adam}
    assert by_name["0.bias"] == {"momentum", *adam}  # a column of its weight
    assert by_name["1.weight"] == by_name["1.bias"] == adam
    assert optimizer.state[model[1].weight]["step"] == 2


def test_a_gradient_scaler_changes_nothing():
    model, trajectory = compiled(), []
    optimizer = thor_fx.Thor(model, **EVERYTHING)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
    for x, y in batches(STEPS):
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        trajectory.append(snapshot(dict(model.named_parameters())))
    assert_same(trajectory, everything(), rtol=1e-10)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_batch_changes_nothing(bad):
    (x, y), data = batches(1)[0], batches(STEPS)
    model = compiled()
    optimizer = thor_fx.Thor(model, **EVERYTHING)
    spoiled = [*data[:2], (bad * x, y), *data[3:]]
    found = train(model, optimizer, spoiled)
    assert identical(found[2], found[1])
    assert optimizer.metrics()["skipped_steps"] == 1
    assert all(p.isfinite().all() for p in found[-1].values())


@pytest.mark.inductor
def test_everything_compiles():
    data = batches(STEPS, dtype=torch.float32)
    model = build(MODELS["normalised"], torch.float32)
    compiled = by_functional_door(model, data, backend="inductor", **EVERYTHING)
    assert_same(compiled, by_functional_door(model, data, **EVERYTHING), rtol=1e-4)
