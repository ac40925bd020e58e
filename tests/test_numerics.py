"""Numbers that go wrong: what is spoilt, in every way, through both doors, with every method.

No parameter and no state is ever NaN or infinite; what was caught is counted; training goes on.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import thor_fx
from thor_fx.alarm import NumericsWarning

SETTINGS: dict[str, Any] = {"lr": 0.01, "damping": 0.1, "momentum": 0.9, "frequency": 2}
METHODS = ["cholesky", "eigen", "ekfac", "newton_schulz", "eva"]
Loss = Callable[[dict[str, Tensor], Tensor, Tensor, Tensor], Tensor]


class Net(nn.Module):
    """Returns its loss, times a scale; ``poison`` reaches the gradient of the head alone."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(4, 5, generator=draws).to(dtype) / 2)
        self.head = nn.Parameter(torch.randn(3, 4, generator=draws).to(dtype) / 2)
        self.shift = nn.Parameter(torch.zeros(3, dtype=dtype))

    def forward(self, x: Tensor, scale: Tensor, poison: Tensor) -> Tensor:
        hidden = torch.relu(x @ self.first.T)
        return ((hidden @ self.head.T + self.shift).square().mean() + (self.head * poison).sum()) * scale


class Run:
    """One training by either door."""

    def __init__(self, door: str, dtype: torch.dtype = torch.float32, **settings: Any) -> None:
        self.dtype, model = dtype, Net(dtype)
        self.good = self.batch()
        settings = {**SETTINGS, **settings}
        if door == "drop-in":
            self.model = thor_fx.compile(model, backend="aot_eager")
            self.optimizer: Any = thor_fx.Thor(self.model, **settings)
            self.params: Any = dict(model.named_parameters())
        else:
            self.optimizer = None
            self.params = {name: p.detach().clone() for name, p in model.named_parameters()}
            self.compiled = thor_fx.compile_step(
                lambda params, *batch: torch.func.functional_call(model, params, batch),
                thor_fx.thor(**settings),
                backend="eager",
            )
            self.state_ = self.compiled.init(self.params, *self.good)

    def batch(self, x: float = 1.0, scale: float = 1.0, poison: float = 0.0, seed: int = 1) -> Any:
        draws = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed))
        return (draws * x).to(self.dtype), torch.tensor(scale, dtype=self.dtype), torch.tensor(poison, dtype=self.dtype)

    def step(self, *batch: Tensor) -> float:
        batch = batch or self.good
        if self.optimizer is None:
            self.params, self.state_, out = self.compiled(self.params, self.state_, *batch)
            return float(out.loss)
        loss = self.model(*batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    @property
    def state(self) -> Any:
        return self.state_.inner if self.optimizer is None else self.optimizer._inner

    @property
    def metrics(self) -> dict[str, float]:
        return self.compiled.metrics(self.state_) if self.optimizer is None else self.optimizer.metrics()

    def snapshot(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.params.items()}

    def tensors(self) -> Iterator[Tensor]:
        yield from (p.detach() for p in self.params.values())
        yield from (leaf for leaf in pytree.tree_leaves(self.state) if torch.is_tensor(leaf))

    def check_finite(self) -> None:
        for tensor in self.tensors():
            assert tensor.isfinite().all()


DOORS = pytest.mark.parametrize("door", ["drop-in", "functional"])

SPOILT: dict[str, dict[str, float]] = {
    "inputs 1e-30": {"x": 1e-30},
    "inputs 1e-15": {"x": 1e-15},
    "inputs 1e15": {"x": 1e15},
    "inputs 1e30": {"x": 1e30},
    "squares of inputs overflow": {"x": 1e25, "scale": 1e-38},
    "loss 1e-30": {"scale": 1e-30},
    "loss 1e15": {"scale": 1e15},
    "loss 1e30": {"scale": 1e30},
    "dead inputs": {"x": 0.0},
    "dead cotangents": {"scale": 0.0},
    "a NaN input": {"x": math.nan},
    "an infinite loss": {"scale": math.inf},
    "one gradient NaN": {"poison": math.nan},
    "one gradient infinite": {"poison": math.inf},
    "one gradient huge": {"poison": 1e30},
}
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"inverse": name} for name in METHODS},
    "no damping": {"damping": 0.0},
    "clips": {"enable_clip_grad": True, "clip": "global", "kl_clip": 1e-3, "fallback": "adamw"},
    "averages": {"factor_decay": 0.9, "refresh": thor_fx.Staggered(2, 2), "damping_rule": "relative"},
    "async": {"factor_decay": 0.9, "refresh_async": True, "step_norm": "adam"},
    "by trace": {"refresh": thor_fx.ByTrace(), "damping_rule": "pi", "enable_clip_grad": True},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
}


@DOORS
@pytest.mark.parametrize("variant", VARIANTS)
def test_whatever_a_batch_is_numbers_stay_finite_and_training_goes_on(door, variant):
    """Every kind of bad batch, in a factor step and in a plain one, amid good ones."""
    run = Run(door, **VARIANTS[variant])
    for _ in range(3):
        run.step()
    for name, how in SPOILT.items():
        before = run.snapshot()
        for _ in range(2):
            run.step(*run.batch(**how))
            run.check_finite()
        if not math.isfinite(sum(how.values())):
            assert all(torch.equal(p, before[n]) for n, p in run.params.items()), name
        with torch.no_grad():  # the next case begins where this one did: with the same weights
            for n, p in run.params.items():
                p.copy_(before[n])
    before = run.snapshot()
    run.step()
    run.step()
    assert all(p.isfinite().all() for p in run.params.values())
    counted = run.metrics
    assert counted["skipped_steps"] >= 8, "four that are NaN or infinite, twice each"
    if variant not in {"no damping"}:
        assert any(not torch.equal(p, before[n]) for n, p in run.params.items())


@DOORS
@pytest.mark.parametrize("inverse", METHODS)
@pytest.mark.parametrize("how", ["a NaN input", "squares of inputs overflow", "dead inputs"])
def test_a_bad_first_batch_stops_no_layer(door, inverse, how):
    run = Run(door, inverse=inverse)
    run.step(*run.batch(**SPOILT[how]))
    before = run.snapshot()
    for _ in range(4):
        run.step()
    run.check_finite()
    for name, p in run.params.items():
        assert not torch.equal(p, before[name]), name
