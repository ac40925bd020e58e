"""Ways to train one model, each with the same loop around it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import torch
from eager_hooks import EagerKfac
from from_study import Loop, WithLoss
from torch import Tensor
from workloads import Batch, Workload

import thor_fx

Mark = Callable[[], None]

FREQUENCY = 10  # one factor step in a round of ten
# NOTE: small enough that the loss hardly moves: every timed step computes with ordinary numbers
LR, DAMPING, MOMENTUM = 1e-6, 0.03, 0.9


class Contender(Protocol):
    """Something that trains.

    Attributes:
        second_order: whether one step in ``FREQUENCY`` renews curvature.
        lead: how many steps earlier than step 0, ``FREQUENCY``, ... that is.
    """

    second_order: bool
    lead: int

    def step(self, x: Tensor, y: Tensor, mark: Mark) -> object:
        """Take one step; mark the end of each phase that can be told apart."""


@dataclass
class Looped:
    """The usual loop; marks the end of forward and backward, and of the update."""

    loop: Loop
    second_order: bool
    lead: int = 0

    def step(self, x: Tensor, y: Tensor, mark: Mark) -> None:
        self.loop.step(x, y, 1.0, mark)


class Functional:
    """The functional door: one graph, so one mark. ``params`` are what it trains."""

    second_order, lead = True, 0

    def __init__(
        self, model: WithLoss, batch: Batch, backend: str, settings: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        def loss_fn(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return torch.func.functional_call(model, params, (x, y))

        self._step = thor_fx.compile_step(loss_fn, transform(settings), backend=backend)
        self.params: Any = dict(model.named_parameters())
        self._state = self._step.init(self.params, *batch)

    def step(self, x: Tensor, y: Tensor, mark: Mark) -> None:
        self.params, self._state, _ = self._step(self.params, self._state, x, y)
        mark()


def transform(settings: Mapping[str, Any]) -> thor_fx.Transform:
    """What a functional contender trains with; a preset has values of its own."""
    ours = {} if "preset" in settings else {"damping": DAMPING, "momentum": MOMENTUM, "frequency": FREQUENCY}
    return thor_fx.thor(LR, **{**ours, **settings})


@dataclass(frozen=True)
class Entrant:
    """A row of the tables.

    Attributes:
        label: of the row.
        group: by which rows are chosen.
        enter: make the contender: ``(model, workload, batch, backend)``; it may change the model.
        absent: why the row has no numbers for a workload; None: it has.
        settings: of :func:`thor_fx.thor`; None: somebody else's optimizer.
    """

    label: str
    group: str
    enter: Callable[[WithLoss, Workload, Batch, str], Contender]
    absent: Callable[[Workload], str | None] = lambda workload: None
    settings: Mapping[str, Any] | None = None


def adamw(model: WithLoss, workload: Workload, batch: Batch, backend: str) -> Contender:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    return Looped(Loop(torch.compile(model, backend=backend), [optimizer]), second_order=False)


def sgd(model: WithLoss, workload: Workload, batch: Batch, backend: str) -> Contender:
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, fused=True)
    return Looped(Loop(torch.compile(model, backend=backend), [optimizer]), second_order=False)


def eager_hooks(model: WithLoss, workload: Workload, batch: Batch, backend: str) -> Contender:
    optimizer = EagerKfac(model, LR, DAMPING, MOMENTUM, terms=workload.terms, frequency=FREQUENCY)
    return Looped(Loop(model, [optimizer]), second_order=True)


def not_by_hand(workload: Workload) -> str | None:
    return None if workload.by_hand else "not written for this model"


def drop_in(model: WithLoss, workload: Workload, batch: Batch, backend: str) -> Contender:
    compiled = thor_fx.compile(model, backend=backend)
    optimizer = thor_fx.Thor(compiled, LR, DAMPING, MOMENTUM, frequency=FREQUENCY)
    return Looped(Loop(compiled, [optimizer]), second_order=True)


def functional(label: str, group: str, settings: Mapping[str, Any]) -> Entrant:
    """An entrant through the functional door."""

    def make(model: WithLoss, workload: Workload, batch: Batch, backend: str) -> Contender:
        return Functional(model, batch, backend, settings)

    return Entrant(label, group, make, settings=settings)


ADAMW, SGD = "torch.compile + fused AdamW", "torch.compile + fused SGD-momentum"
HOOKS, DROP_IN, FUNCTIONAL = "eager K-FAC by hooks", "thor_fx, drop-in", "thor_fx, functional"
EVERY_STEP, EVA = "thor_fx, factors every step", 'thor_fx, inverse="eva"'
RECOMMENDED = 'thor_fx, preset="recommended"'
ROUNDED, ROUNDED_EVERY_STEP = "thor_fx, bfloat16 products", "thor_fx, bfloat16 products, factors every step"

BASELINE = Entrant(ADAMW, "baseline", adamw)

ALWAYS = {"frequency": 1, "factor_decay": 0.9, "refresh": thor_fx.Every(FREQUENCY)}
"""Factors in every step, inverses in every tenth."""

ROUNDING = {"factor_dtype": torch.bfloat16, "update_dtype": torch.bfloat16}

OURS = (
    BASELINE,
    Entrant(SGD, "baseline", sgd),
    Entrant(HOOKS, "hooks", eager_hooks, not_by_hand),
    Entrant(DROP_IN, "ours", drop_in, settings={}),
    functional(FUNCTIONAL, "ours", {}),
    functional(EVERY_STEP, "variants", ALWAYS),
    functional(ROUNDED, "variants", ROUNDING),
    functional(ROUNDED_EVERY_STEP, "variants", ALWAYS | ROUNDING),
    functional(EVA, "variants", {"frequency": 1, "inverse": "eva"}),
    functional(RECOMMENDED, "variants", {"preset": "recommended"}),
)
"""The baselines, the hooks, and thor_fx."""

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
    "update_dtype=bfloat16": {"update_dtype": torch.bfloat16},
    'preset="recommended"': {"preset": "recommended"},
}
"""Settings of :func:`thor_fx.thor`, each changed alone."""

WITH_OPTIONS = (
    BASELINE,
    *(functional(label, "options", settings) for label, settings in OPTIONS.items()),
)
"""AdamW, then the functional door with one option changed at a time."""
