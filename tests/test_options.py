"""Every argument of ``thor`` is checked, and the error names it."""

import inspect

import pytest
import torch

import thor_fx
from thor_fx.options import Options

GOOD = {"lr": 0.1, "damping": 0.03, "momentum": 0.9}
NAN, INF = float("nan"), float("inf")

NUMBERS = ("lr", "damping", "momentum", "weight_decay", "loss_scale")
WRONG_TYPES = {
    **{name: ["0.1", None, [0.1], True, 1j] for name in NUMBERS},
    "batch_size": ["32", 32.0, True, [32]],
    "use_nesterov": [1, 0, "True", None],
    "decay_filter": ["weight", 1, True],
    "layer_filter": ["weight", 1, True, ["weight"]],
    "split_indices": [5, 1.0, "12", {1: 2}, [1.0], [0, "1"], (True,)],
    "enable_clip_grad": [1, "False", None],
    "frequency": ["100", 100.0, True, None],
    "damping_rule": [None, 1, ["factor"]],
    "block_size": ["128", "Auto", 128.0, True],
    "sharing": [1, None],
    "bias": [True, None],
    "max_dim": ["8192", 8192.0, True],
    "long_side": [None, 3],
    "inverse": [None, True, ["eigen"]],
    "factor_decay": ["0.9", True, [0.9], 1j],
    "refresh": [10, "every", thor_fx.Every, True],
    "refresh_async": [1, 0, "True", None],
    "kl_clip": ["0.1", True, [0.1]],
    "clip": [None, 1.0],
    "clip_norm": [None, "1", True],
    "step_norm": [True, 0.2],
    "momentum_on": [None, True],
    "decoupled_weight_decay": [1, None, "False"],
    "fallback": [None, torch.optim.AdamW],
    "fallback_lr": ["0.1", [0.1], True, 1j],
    "preset": [1, {"damping": 0.1}],
    "fisher": [None, 1, True],
    "likelihood": [1, ["categorical"]],
    "rows": ["0.5", None, True, [0.5]],
    "factor_dtype": ["bfloat16", 16, float],
    "update_dtype": ["bfloat16", 16, float],
    "reduce_dtype": ["bfloat16", 16, float],
    "process_group": ["gloo", 2, True],
    "work_sharing": [None, True, 2],
}
WRONG_VALUES = {
    **{name: [-0.1, NAN, INF, -INF] for name in NUMBERS},
    "batch_size": [0, -32],
    "split_indices": [[], [1, 1], [2, 1], [-1, 3]],
    "frequency": [0, -1],
    "damping_rule": ["none", "", "Factor"],
    "block_size": [0, -128],
    "sharing": ["both", ""],
    "bias": ["none"],
    "max_dim": [0, -1],
    "long_side": ["nothing"],
    "inverse": ["", "Cholesky", "newton-schulz"],
    "factor_decay": [-0.1, 1, 1.0, NAN, INF],
    "refresh": [thor_fx.Every(5), thor_fx.Staggered(200), thor_fx.ByTrace(longest=5)],
    "kl_clip": [0, -0.1, NAN, INF],
    "clip": ["layer", ""],
    "clip_norm": [0, -1.0, NAN, INF],
    "step_norm": ["muon", "none"],
    "momentum_on": ["weights"],
    "fallback": ["adam"],
    "fallback_lr": [-0.1, NAN, INF],
    "preset": ["fast", ""],
    "fisher": ["true", ""],
    "likelihood": ["poisson", ""],
    "rows": [0, -0.5, 2, 0.3, NAN, INF],
    "factor_dtype": [torch.float16, torch.float32, torch.int8],
    "update_dtype": [torch.float16, torch.float32, torch.int8],
    "reduce_dtype": [torch.float16, torch.float32, torch.int8],
    "work_sharing": ["all", ""],
}
RIGHT = {
    **{name: [0.5, 1] for name in NUMBERS},
    "lr": [0.5, 1, 0, torch.tensor(0.1), torch.tensor([0.1, 0.2]), lambda step: 0.1],
    "damping": [
        *[0.5, 1, 0, torch.tensor(0.1), torch.tensor([0.1, 0.2]), lambda step: 0.1],
        thor_fx.LevenbergMarquardt(0.5),
    ],
    "momentum": [0.0, 1, 0.9],
    "weight_decay": [0, 0.0, 1e-4],
    "batch_size": [None, 1, 32],
    "use_nesterov": [True, False],
    "decay_filter": [None, lambda name: True, str],
    "layer_filter": [None, lambda name: "head" not in name, str],
    "split_indices": [None, [0], [0, 3, 7], (1, 2)],
    "enable_clip_grad": [True, False],
    "frequency": [1, 2, 100],
    "damping_rule": ["factor", "sqrt", "pi", "relative"],
    "block_size": [None, 1, 128, "auto"],
    "sharing": ["expand", "reduce", lambda name: "reduce" if "conv" in name else "expand"],
    "bias": ["raw", "joint"],
    "max_dim": [None, 1, 8192],
    "long_side": ["blocks", "diagonal", "identity"],
    "inverse": ["cholesky", "eigen", "ekfac", "newton_schulz", "eva"],
    "factor_decay": [None, 0, 0.0, 0.95],
    "refresh": [None, thor_fx.Every(100), thor_fx.Staggered(4), thor_fx.ByTrace(0.01, 0.001, growth=2)],
    "refresh_async": [True, False],
    "kl_clip": [None, 1, 0.001],
    "clip": ["tensor", "global"],
    "clip_norm": [1, 0.5],
    "step_norm": [None, "adam", "sgd", "rms", "spectral", "orthogonal"],
    "momentum_on": ["update", "gradient"],
    "decoupled_weight_decay": [True, False],
    "fallback": ["sgd", "adamw"],
    "fallback_lr": [None, 0, 0.5, torch.tensor([0.1, 0.2]), lambda step: 0.1],
    "preset": [None, "thor", "recommended"],
    "fisher": ["empirical", "sampled", "exact"],
    "likelihood": [None, "categorical", "bernoulli", "gaussian", torch.zeros_like],
    "rows": [1, 1.0, 0.5, 1 / 3, 0.01],
    "factor_dtype": [None, torch.bfloat16],
    "update_dtype": [None, torch.bfloat16],
    "reduce_dtype": [None, torch.bfloat16],
    "process_group": [None],
    "work_sharing": ["none", "inverse", "gradient", "auto"],
}


def cases(table):
    return [pytest.param(name, value, id=f"{name}={value!r:.20}") for name in table for value in table[name]]


def test_every_argument_is_in_the_tables():
    arguments = set(inspect.signature(thor_fx.thor).parameters)
    assert arguments == set(RIGHT) == set(WRONG_TYPES)
    flags = {"use_nesterov", "enable_clip_grad", "decoupled_weight_decay", "refresh_async"}
    assert arguments - set(WRONG_VALUES) == {*flags, "decay_filter", "layer_filter", "process_group"}


@pytest.mark.parametrize(("name", "value"), cases(RIGHT))
def test_right_arguments_are_taken(name, value):
    assert isinstance(thor_fx.thor(**{**GOOD, name: value}), thor_fx.Transform)


@pytest.mark.parametrize(("name", "value"), cases(WRONG_TYPES))
def test_a_wrong_type_is_a_type_error(name, value):
    with pytest.raises(TypeError, match=f"^{name} must"):
        thor_fx.thor(**{**GOOD, name: value})


@pytest.mark.parametrize(("name", "value"), cases(WRONG_VALUES))
def test_a_wrong_value_is_a_value_error(name, value):
    with pytest.raises(ValueError, match=f"^{name} must"):
        thor_fx.thor(**{**GOOD, name: value})


def test_a_loss_scale_of_zero_is_refused():
    with pytest.raises(ValueError, match=r"^loss_scale must be finite and > 0, got 0"):
        thor_fx.thor(**GOOD, loss_scale=0)


def test_the_error_shows_the_value_and_what_is_allowed():
    with pytest.raises(
        ValueError, match=r"damping_rule must be one of .*'factor', 'sqrt', 'pi', .*got 'none'"
    ):
        thor_fx.thor(**GOOD, damping_rule="none")
    with pytest.raises(TypeError, match=r"frequency must be an integer >= 1, got float: 2.5"):
        thor_fx.thor(**GOOD, frequency=2.5)


@pytest.mark.parametrize("name", ["lr", "damping", "momentum"])
def test_lr_damping_and_momentum_have_no_default(name):
    given = {key: value for key, value in GOOD.items() if key != name}
    with pytest.raises(TypeError, match=f"'{name}'|^{name} must"):
        thor_fx.thor(**given)


def test_defaults_are_the_documented_ones():
    options = Options()
    assert (options.loss_scale, options.batch_size, options.use_nesterov) == (1.0, None, False)
    assert (options.enable_clip_grad, options.frequency, options.block_size) == (False, 100, 128)
    assert options.inverse == "cholesky"
    assert (options.damping_rule, options.split_indices, options.decay_filter) == ("factor", None, None)
    assert (options.kl_clip, options.clip, options.clip_norm) == (None, "tensor", 1.0)
    assert (options.step_norm, options.momentum_on, options.fallback) == (None, "update", "sgd")
    assert (options.decoupled_weight_decay, options.adaptive) == (False, None)


def test_decay_filter_says_which_names_decay():
    assert Options().decays("anything")
    assert Options(decay_filter=lambda name: name == "w").decays("w")
    assert not Options(decay_filter=lambda name: name == "w").decays("b")
    assert Options(decay_filter=lambda name: 1).decays("w") is True


def test_no_decay_for_beta_and_gamma():
    names = ["fc.weight", "norm.gamma", "norm.beta", "norm.weight"]
    assert [name for name in names if thor_fx.decay_all_but_beta_gamma(name)] == ["fc.weight", "norm.weight"]
