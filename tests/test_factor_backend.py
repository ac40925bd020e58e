"""``factor_backend``: factor steps are interpreted, plain steps compiled, and the training is the same."""

import sys
from typing import Any

import pytest

import thor_fx
from thor_fx import compiled_update, inductor
from training import MODELS, assert_moved, assert_same, batches, build, by_functional_door, snapshot, train

SETTINGS: dict[str, Any] = {"lr": 0.02, "damping": 0.1, "momentum": 0.9, "frequency": 2}
STEPS = 4


class Asked:
    """The backends of all graphs that are compiled without being differentiated further, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
        self.backends: list[str] = []

        def recorded(gm: Any, fakes: Any, *, backend: str, **settings: Any) -> Any:
            self.backends.append(backend)
            return inductor.compile_graph(gm, fakes, backend="eager", **settings)

        monkeypatch.setattr(module, "compile_graph", recorded)


def test_the_drop_in_door_interprets_factor_steps_alone(monkeypatch):
    asked = Asked(monkeypatch, compiled_update)
    model = thor_fx.compile(build(MODELS["mlp"]), backend="aot_eager", factor_backend="eager")
    train(model, thor_fx.Thor(model, **SETTINGS), batches(STEPS))
    assert asked.backends == ["eager", "aot_eager"]


def test_the_backend_of_the_optimizer_goes_for_all_updates(monkeypatch):
    asked = Asked(monkeypatch, compiled_update)
    model = thor_fx.compile(build(MODELS["mlp"]), backend="aot_eager", factor_backend="eager")
    train(model, thor_fx.Thor(model, **SETTINGS, backend="aot_eager"), batches(STEPS))
    assert asked.backends == ["aot_eager", "aot_eager"]


def test_the_functional_door_interprets_factor_steps_alone(monkeypatch):
    asked = Asked(monkeypatch, sys.modules["thor_fx.step"])
    mixed = {"backend": "aot_eager", "factor_backend": "eager"}
    by_functional_door(build(MODELS["mlp"]), batches(STEPS), **mixed, **SETTINGS)
    assert sorted(asked.backends) == ["aot_eager", "eager"]


@pytest.mark.inductor
def test_compiled_plain_steps_and_interpreted_factor_steps_train_the_same():
    make = MODELS["normalised"]
    expected = by_functional_door(build(make), batches(STEPS), **SETTINGS)
    assert_moved(expected, snapshot(dict(build(make).named_parameters())))
    mixed = {"backend": "inductor", "factor_backend": "aot_eager"}
    functional = by_functional_door(build(make), batches(STEPS), **mixed, **SETTINGS)
    assert_same(functional, expected, rtol=1e-10)
    model = thor_fx.compile(build(make), **mixed)
    assert_same(train(model, thor_fx.Thor(model, **SETTINGS), batches(STEPS)), expected, rtol=1e-10)
