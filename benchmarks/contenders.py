"""Ways to train one model, each with the same loop around it."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from eager_hooks import EagerKfac
from torch import Tensor, nn
from workloads import Workload

import thor_fx

Mark = Callable[[], None]

FREQUENCY = 10  # one factor step in a round of ten
# NOTE: small enough that the loss hardly moves: every timed step computes with ordinary numbers
LR, DAMPING, MOMENTUM = 1e-6, 0.03, 0.9


class Contender(Protocol):
    """Something that trains.

    Attributes:
        label: its row in the tables.
        second_order: whether every ``FREQUENCY``-th step is a factor step, the first one included.
    """

    label: str
    second_order: bool

    def step(self, x: Tensor, y: Tensor, mark: Mark) -> None:
        """Take one step; mark the end of each phase that can be told apart."""


@dataclass
class Loop:
    """The usual loop; marks the end of forward and backward, and of the update."""

    label: str
    model: nn.Module
    optimizer: Any
    second_order: bool

    def step(self, x: Tensor, y: Tensor, mark: Mark) -> None:
        F.cross_entropy(self.model(x), y).backward()
        mark()
        self.optimizer.step()
        self.optimizer.zero_grad()
        mark()


class Functional:
    """The functional door: one graph, so one mark."""

    second_order = True

    def __init__(
        self,
        label: str,
        model: nn.Module,
        batch: tuple[Tensor, Tensor],
        backend: str,
        settings: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        def loss_fn(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(torch.func.functional_call(model, params, (x,)), y)

        self.label = label
        tx = thor_fx.thor(
            LR, **{"damping": DAMPING, "momentum": MOMENTUM, "frequency": FREQUENCY, **settings}
        )
        self._step = thor_fx.compile_step(loss_fn, tx, backend=backend)
        self._params: Any = dict(model.named_parameters())
        self._state = self._step.init(self._params, *batch)

    def step(self, x: Tensor, y: Tensor, mark: Mark) -> None:
        self._params, self._state, _ = self._step(self._params, self._state, x, y)
        mark()


def contenders(workload: Workload, batch: tuple[Tensor, Tensor], backend: str) -> list[Contender]:
    """All contenders, each with its own copy of the same model; the first is what others are compared to."""
    model = workload.build().to(batch[0].device)
    return [
        adamw(copy.deepcopy(model), backend),
        sgd(copy.deepcopy(model), backend),
        eager_hooks(copy.deepcopy(model), workload.terms),
        drop_in(copy.deepcopy(model), backend),
        Functional("thor_fx, functional", copy.deepcopy(model), batch, backend),
    ]


OPTIONS: dict[str, dict[str, Any]] = {
    "the defaults": {},
    'damping_rule="pi"': {"damping_rule": "pi"},
    "block_size=None": {"block_size": None},
    "max_dim=128": {"max_dim": 128},
    'bias="joint"': {"bias": "joint"},
    'sharing="reduce"': {"sharing": "reduce"},
    "enable_clip_grad=True": {"enable_clip_grad": True},
    "use_nesterov=True": {"use_nesterov": True},
    'fisher="sampled"': {"fisher": "sampled"},
    'fisher="exact"': {"fisher": "exact"},
    "factor_decay=0.9": {"factor_decay": 0.9},
    "refresh=Every(50)": {"factor_decay": 0.9, "refresh": thor_fx.Every(50)},
    "refresh_async=True": {"factor_decay": 0.9, "refresh_async": True},
    "refresh=Staggered(4)": {"factor_decay": 0.9, "refresh": thor_fx.Staggered(4)},
    'inverse="eigen"': {"inverse": "eigen"},
    'inverse="ekfac"': {"inverse": "ekfac"},
    'inverse="newton_schulz"': {"inverse": "newton_schulz"},
    'inverse="eva"': {"inverse": "eva"},
    'damping_rule="relative"': {"damping_rule": "relative"},
    "damping=LevenbergMarquardt": {"damping": thor_fx.LevenbergMarquardt(DAMPING, interval=FREQUENCY)},
    "kl_clip=0.001": {"kl_clip": 1e-3},
    'clip="global"': {"enable_clip_grad": True, "clip": "global"},
    'step_norm="adam"': {"step_norm": "adam"},
    'step_norm="spectral"': {"step_norm": "spectral"},
    'step_norm="orthogonal"': {"step_norm": "orthogonal"},
    'momentum_on="gradient"': {"momentum_on": "gradient"},
    'fallback="adamw"': {"fallback": "adamw"},
    "rows=0.25": {"rows": 0.25},
    "factor_dtype=bfloat16": {"factor_dtype": torch.bfloat16},
    'preset="recommended"': {"preset": "recommended"},
}
"""Settings of :func:`thor_fx.thor`, each changed alone."""


def option_contenders(workload: Workload, batch: tuple[Tensor, Tensor], backend: str) -> list[Contender]:
    """AdamW, then the functional door with one option changed at a time, on copies of the same model."""
    model = workload.build().to(batch[0].device)
    ours = [
        Functional(label, copy.deepcopy(model), batch, backend, settings)
        for label, settings in OPTIONS.items()
    ]
    return [adamw(copy.deepcopy(model), backend), *ours]


def adamw(model: nn.Module, backend: str) -> Loop:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    return Loop("torch.compile + fused AdamW", torch.compile(model, backend=backend), optimizer, False)


def sgd(model: nn.Module, backend: str) -> Loop:
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, fused=True)
    return Loop("torch.compile + fused SGD-momentum", torch.compile(model, backend=backend), optimizer, False)


def eager_hooks(model: nn.Module, terms: int) -> Loop:
    optimizer = EagerKfac(model, LR, DAMPING, MOMENTUM, terms=terms, frequency=FREQUENCY)
    return Loop("eager K-FAC by hooks", model, optimizer, True)


def drop_in(model: nn.Module, backend: str) -> Loop:
    compiled = thor_fx.compile(model, backend=backend)
    optimizer = thor_fx.Thor(compiled, LR, DAMPING, MOMENTUM, frequency=FREQUENCY)
    return Loop("thor_fx, drop-in", compiled, optimizer, True)
