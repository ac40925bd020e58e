"""Both doors against plain loops, for every option of a step and for many together."""

from typing import Any

import pytest

from eager_steps import slowly
from training import (
    MODELS,
    assert_moved,
    assert_same,
    batches,
    build,
    by_drop_in_door,
    by_functional_door,
    snapshot,
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
