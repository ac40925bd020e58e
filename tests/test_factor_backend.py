"""``factor_backend``: factor steps are interpreted, plain steps compiled, and the training is the same."""

import sys
from typing import Any

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F

import thor_fx
from thor_fx import compiled_update, inductor
from training import MODELS, assert_moved, assert_same, batches, build, snapshot, train

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


def functional(make: Any, **settings: Any) -> list[dict[str, torch.Tensor]]:
    model = build(make)
    params: Any = dict(model.named_parameters())

    def loss_fn(params: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(functional_call(model, params, (x,)), y)

    step = thor_fx.compile_step(loss_fn, thor_fx.thor(**SETTINGS), **settings)
    data, found = batches(STEPS), []
    state = step.init(params, *data[0])
    for batch in data:
        params, state, _ = step(params, state, *batch)
        found.append(snapshot(params))
    return found


def test_the_functional_door_interprets_factor_steps_alone(monkeypatch):
    asked = Asked(monkeypatch, sys.modules["thor_fx.step"])
    functional(MODELS["mlp"], backend="aot_eager", factor_backend="eager")
    assert sorted(asked.backends) == ["aot_eager", "eager"]


@pytest.mark.inductor
def test_compiled_plain_steps_and_interpreted_factor_steps_train_the_same():
    make = MODELS["normalised"]
    expected = functional(make, backend="eager")
    assert_moved(expected, snapshot(dict(build(make).named_parameters())))
    mixed = {"backend": "inductor", "factor_backend": "aot_eager"}
    assert_same(functional(make, **mixed), expected, rtol=1e-10)
    model = thor_fx.compile(build(make), **mixed)
    assert_same(train(model, thor_fx.Thor(model, **SETTINGS), batches(STEPS)), expected, rtol=1e-10)
