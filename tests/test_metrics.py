"""Numbers for loggers: both doors say the same, and what they say is right."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

import thor_fx
from eager_thor import SETTINGS
from thor_fx import Every
from thor_fx.metrics import COUNTERS
from training import batches, build, mlp

RATES = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5], dtype=torch.float64)


def of_both_doors(steps: int, **options: Any) -> tuple[dict[str, float], dict[str, float], Any]:
    """What both doors say after some steps, and the optimizer of the drop-in door."""
    data, settings = batches(steps), {**SETTINGS, **options}
    model = thor_fx.compile(build(mlp), backend="aot_eager")
    optimizer = thor_fx.Thor(model, **settings)
    for x, y in data:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    functional = build(mlp)

    def loss_fn(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(functional, params, (x,)), y)

    step = thor_fx.compile_step(loss_fn, thor_fx.thor(**settings), backend="eager")
    params: Any = {name: p.detach() for name, p in functional.named_parameters()}
    state = step.init(params, *data[0])
    for batch in data:
        params, state, _ = step(params, state, *batch)
    return optimizer.metrics(), step.metrics(state), optimizer


def test_both_doors_say_the_same():
    options = {"lr": RATES, "frequency": 2, "factor_decay": 0.5, "kl_clip": 1e-6, "refresh": Every(2)}
    dropped_in, functional, optimizer = of_both_doors(5, **options)
    assert dropped_in.keys() == functional.keys()
    assert dropped_in == pytest.approx(functional, rel=1e-9)
    assert dropped_in["step"] == 5
    assert dropped_in["lr"] == RATES[4]
    assert dropped_in["damping"] == SETTINGS["damping"]
    assert dropped_in["refreshes"] == 3, "of steps 0, 2 and 4"
    assert dropped_in["kl"] > 1e-6, "it was clipped"
    traces = [_trace(entry) for entry in optimizer.state.values() if "factors" in entry]
    assert dropped_in["trace"] == pytest.approx(sum(traces), rel=1e-9)


def _trace(entry: Any) -> float:
    (kept,) = entry["factors"].values()
    (a,), (g,) = kept["input"], kept["output"]
    return float(
        a.diagonal(dim1=-2, dim2=-1).sum() * g.diagonal(dim1=-2, dim2=-1).sum() / kept["weight"] ** 2
    )


def test_what_is_not_kept_is_not_said():
    dropped_in, functional, _ = of_both_doors(2)
    expected = {"step", "lr", "damping", *COUNTERS}
    assert dropped_in.keys() == functional.keys() == expected


def test_a_skipped_step_refreshes_nothing():
    model = thor_fx.compile(build(mlp), backend="aot_eager")
    optimizer = thor_fx.Thor(model, **{**SETTINGS, "frequency": 1})
    (x, y), *_ = batches(1)
    for scale in (1.0, torch.inf, 1.0):
        (F.cross_entropy(model(x), y) * scale).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = optimizer.metrics()
    assert found["skipped_steps"] == 1
    assert found["refreshes"] == 2
    saved = optimizer.state_dict()
    again = thor_fx.Thor(model, **{**SETTINGS, "frequency": 1})
    again.load_state_dict(saved)
    F.cross_entropy(model(x), y).backward()
    again.step()
    assert again.metrics()["refreshes"] == 3


def test_before_the_first_step_and_by_group():
    model = thor_fx.compile(build(mlp), backend="aot_eager")
    groups = [{"params": ["0.weight"], "lr": 0.25}]
    found = thor_fx.Thor(model, **SETTINGS, params=groups).metrics()
    assert found["step"] == found["refreshes"] == 0
    assert found["lr"] == 0.25
    assert found["lr/1"] == SETTINGS["lr"]
