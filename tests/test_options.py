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
    "split_indices": [5, 1.0, "12", {1: 2}, [1.0], [0, "1"], (True,)],
    "enable_clip_grad": [1, "False", None],
    "frequency": ["100", 100.0, True, None],
    "damping_rule": [None, 1, ["factor"]],
    "block_size": ["128", 128.0, True],
    "sharing": [1, None],
    "bias": [True, None],
    "max_dim": ["8192", 8192.0, True],
    "long_side": [None, 3],
    "fisher": [None, 1, True],
    "likelihood": [1, ["categorical"]],
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
    "fisher": ["true", ""],
    "likelihood": ["poisson", ""],
}
RIGHT = {
    **{name: [0.5, 1] for name in NUMBERS},
    "lr": [0.5, 1, 0, torch.tensor(0.1), torch.tensor([0.1, 0.2]), lambda step: 0.1],
    "damping": [0.5, 1, 0, torch.tensor(0.1), torch.tensor([0.1, 0.2]), lambda step: 0.1],
    "momentum": [0.0, 1, 0.9],
    "weight_decay": [0, 0.0, 1e-4],
    "batch_size": [None, 1, 32],
    "use_nesterov": [True, False],
    "decay_filter": [None, lambda name: True, str],
    "split_indices": [None, [0], [0, 3, 7], (1, 2)],
    "enable_clip_grad": [True, False],
    "frequency": [1, 2, 100],
    "damping_rule": ["factor", "sqrt", "pi"],
    "block_size": [None, 1, 128],
    "sharing": ["expand", "reduce", lambda name: "reduce" if "conv" in name else "expand"],
    "bias": ["raw", "joint"],
    "max_dim": [None, 1, 8192],
    "long_side": ["blocks", "diagonal", "identity"],
    "fisher": ["empirical", "sampled", "exact"],
    "likelihood": [None, "categorical", "bernoulli", "gaussian", torch.zeros_like],
}


def cases(table):
    return [pytest.param(name, value, id=f"{name}={value!r:.20}") for name in table for value in table[name]]


def test_every_argument_is_in_the_tables():
    arguments = set(inspect.signature(thor_fx.thor).parameters)
    assert arguments == set(RIGHT) == set(WRONG_TYPES)
    assert arguments - set(WRONG_VALUES) == {"use_nesterov", "enable_clip_grad", "decay_filter"}


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
    with pytest.raises(ValueError, match=r"damping_rule must be one of .*'factor', 'sqrt', 'pi'.*got 'none'"):
        thor_fx.thor(**GOOD, damping_rule="none")
    with pytest.raises(TypeError, match=r"frequency must be an integer >= 1, got float: 2.5"):
        thor_fx.thor(**GOOD, frequency=2.5)


def test_lr_damping_and_momentum_have_no_default():
    parameters = inspect.signature(thor_fx.thor).parameters
    required = [name for name, p in parameters.items() if p.default is inspect.Parameter.empty]
    assert required == ["lr", "damping", "momentum"]


def test_defaults_are_the_documented_ones():
    options = Options()
    assert (options.loss_scale, options.batch_size, options.use_nesterov) == (1.0, None, False)
    assert (options.enable_clip_grad, options.frequency, options.block_size) == (False, 100, 128)
    assert (options.damping_rule, options.split_indices, options.decay_filter) == ("factor", None, None)


def test_decay_filter_says_which_names_decay():
    assert Options().decays("anything")
    assert Options(decay_filter=lambda name: name == "w").decays("w")
    assert not Options(decay_filter=lambda name: name == "w").decays("b")
    assert Options(decay_filter=lambda name: 1).decays("w") is True


def test_no_decay_for_beta_and_gamma():
    names = ["fc.weight", "norm.gamma", "norm.beta", "norm.weight"]
    assert [name for name in names if thor_fx.decay_all_but_beta_gamma(name)] == ["fc.weight", "norm.weight"]
