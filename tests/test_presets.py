"""A preset fills in what is left out, and nothing else."""

import inspect

import pytest
import torch

import thor_fx
from thor_fx.presets import PRESETS, RECOMMENDED, THOR
from training import (
    assert_moved,
    assert_same,
    batches,
    build,
    by_drop_in_door,
    by_functional_door,
    identical,
    mlp,
    snapshot,
)

DOORS = [by_functional_door, by_drop_in_door]
PRESET = pytest.mark.parametrize("name", PRESETS)


@PRESET
def test_every_option_of_a_preset_is_an_argument(name):
    for door in (thor_fx.thor, thor_fx.Thor):
        assert PRESETS[name].keys() <= inspect.signature(door).parameters.keys()
    assert "lr" not in PRESETS[name]


def test_the_reference_is_the_defaults():
    parameters = inspect.signature(thor_fx.thor).parameters
    defaults = {name: parameters[name].default for name in THOR if name not in {"damping", "momentum"}}
    assert defaults == {name: THOR[name] for name in defaults}


def test_presets_cannot_be_changed():
    with pytest.raises(TypeError):
        RECOMMENDED["damping"] = 1.0
    with pytest.raises(TypeError):
        PRESETS["mine"] = {}


@PRESET
@pytest.mark.parametrize("door", DOORS)
def test_a_preset_is_its_options_written_out(door, name):
    data = batches(3)
    found = door(build(mlp), data, lr=0.02, preset=name)
    written = door(build(mlp), data, lr=0.02, **PRESETS[name])
    assert all(identical(one, other) for one, other in zip(found, written, strict=True))
    assert_moved(found, snapshot(dict(build(mlp).named_parameters())))


def test_both_doors_agree_on_the_recommended_one():
    one, other = (door(build(mlp), batches(4), lr=0.02, preset="recommended") for door in DOORS)
    assert_same(one, other)


def test_what_is_given_counts():
    default = thor_fx.thor(0.1, preset="recommended")
    assert default.hyper(0)["damping"] == RECOMMENDED["damping"]
    assert default.frequency == RECOMMENDED["frequency"]
    given = thor_fx.thor(0.1, 0.5, preset="recommended", frequency=100, bias="raw", fallback="sgd")
    assert (given.hyper(0)["damping"], given.frequency, given.rules.bias) == (0.5, 100, "raw")
    assert given.hyper(0)["momentum"] == RECOMMENDED["momentum"]


def test_without_a_preset_damping_and_momentum_are_needed():
    with pytest.raises(TypeError, match=r"^damping must"):
        thor_fx.thor(0.1, momentum=0.9)
    with pytest.raises(TypeError, match=r"^momentum must"):
        thor_fx.thor(0.1, 0.1, preset=None)


def test_unknown_presets_are_refused():
    with pytest.raises(ValueError, match=r"preset must be one of \['thor', 'recommended'\], got 'fast'"):
        thor_fx.thor(0.1, preset="fast")
    with pytest.raises(TypeError, match="preset must be one of"):
        thor_fx.thor(0.1, preset=RECOMMENDED)


def test_the_optimizer_shows_what_is_not_the_default():
    model = thor_fx.compile(build(mlp), backend="aot_eager")
    text = repr(thor_fx.Thor(model, lr=0.1, preset="recommended"))
    for name in RECOMMENDED.keys() - {"momentum", "damping"}:
        assert f"{name}={RECOMMENDED[name]!r}" in text
    plain = repr(thor_fx.Thor(model, lr=0.1, damping=torch.tensor(0.03), momentum=0.9))
    assert "Options: the defaults" in plain
