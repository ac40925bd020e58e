"""Options together: both doors take the same steps, and what cannot go together is refused."""

from typing import Any

import pytest

import thor_fx
from training import MODELS, assert_moved, batches, build, by_both_doors, snapshot

SETTINGS: dict[str, Any] = {"lr": 0.02, "damping": 0.1, "momentum": 0.9, "frequency": 2}

TOGETHER: dict[str, dict[str, Any]] = {
    "recommended": {"preset": "recommended", "frequency": 2},
    "recommended, exact": {
        "preset": "recommended",
        "frequency": 2,
        "fisher": "exact",
        "likelihood": "categorical",
    },
    "averages and eigenvectors": {
        "factor_decay": 0.9,
        "inverse": "eigen",
        "damping_rule": "pi",
        "bias": "joint",
    },
    "averages and ekfac": {"factor_decay": 0.5, "inverse": "ekfac", "kl_clip": 0.01},
    "averages of means": {"factor_decay": 0.9, "inverse": "eva", "momentum_on": "gradient"},
    "products, spectral": {"inverse": "newton_schulz", "step_norm": "spectral", "damping_rule": "relative"},
    "exact, without the head": {
        "fisher": "exact",
        "likelihood": "categorical",
        "layer_filter": lambda name: "head" not in name and not name.startswith("3"),
        "fallback": "adamw",
        "bias": "joint",
    },
    "averages, orthogonal": {
        "factor_decay": 0.9,
        "step_norm": "orthogonal",
        "momentum_on": "gradient",
        "use_nesterov": True,
        "bias": "joint",
    },
    "staggered, in blocks": {"factor_decay": 0.9, "refresh": thor_fx.Staggered(2), "block_size": 3},
    "every, ekfac": {
        "factor_decay": 0.9,
        "refresh": thor_fx.Every(4),
        "inverse": "ekfac",
        "fallback": "adamw",
    },
    "by trace, joint, grafted": {
        "refresh": thor_fx.ByTrace(0.01, 0.001),
        "bias": "joint",
        "step_norm": "adam",
        "kl_clip": 0.1,
    },
    "by trace, gradient momentum": {
        "refresh": thor_fx.ByTrace(0.01, 0.0),
        "momentum_on": "gradient",
        "step_norm": "sgd",
        "decoupled_weight_decay": True,
        "weight_decay": 0.01,
    },
    "beside the steps, ekfac": {
        "factor_decay": 0.9,
        "refresh_async": True,
        "inverse": "ekfac",
        "step_norm": "orthogonal",
        "momentum_on": "gradient",
        "fallback": "adamw",
    },
    "beside the steps, in blocks": {
        "refresh_async": True,
        "block_size": 3,
        "damping_rule": "relative",
        "bias": "joint",
        "kl_clip": 0.1,
    },
    "exact, eigenvectors, global clip": {
        "fisher": "exact",
        "likelihood": "categorical",
        "inverse": "eigen",
        "enable_clip_grad": True,
        "clip": "global",
        "loss_scale": 16.0,
    },
    "exact, staggered, long sides": {
        "fisher": "exact",
        "likelihood": "categorical",
        "refresh": thor_fx.Staggered(2),
        "max_dim": 5,
        "block_size": 4,
        "fallback": "adamw",
        "fallback_lr": 0.01,
    },
}


@pytest.mark.parametrize("name", TOGETHER)
@pytest.mark.parametrize("model", ["normalised", "tied"])
def test_both_doors_take_the_same_steps(model, name):
    settings = {**({} if "preset" in TOGETHER[name] else SETTINGS), "lr": 0.02, **TOGETHER[name]}
    trajectory = by_both_doors(lambda: build(MODELS[model]), batches(7), 1e-9, **settings)
    assert_moved(trajectory, snapshot(dict(build(MODELS[model]).named_parameters())))


REFUSED = [
    ({"inverse": "eva", "fisher": "sampled"}, "inverse='eva' takes the mean"),
    (
        {"inverse": "eva", "fisher": "exact", "likelihood": "gaussian"},
        "fisher='exact' needs another inverse=",
    ),
    ({"inverse": "ekfac", "damping": thor_fx.LevenbergMarquardt(0.1)}, "damping=LevenbergMarquardt"),
    ({"inverse": "eva", "damping": thor_fx.LevenbergMarquardt(0.1)}, "inverse= must be one of"),
    ({"refresh_async": True, "refresh": thor_fx.Every(4)}, "refresh_async=True says itself.*refresh=Every"),
    ({"refresh_async": True, "inverse": "eva"}, "inverse='eva' inverts nothing"),
    ({"refresh_async": True, "frequency": 1}, "frequency must be at least 2, got 1"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_what_cannot_go_together_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        thor_fx.thor(**{**SETTINGS, **settings})
