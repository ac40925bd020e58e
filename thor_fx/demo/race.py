"""SGD-momentum, AdamW and THOR on one task, under the same rules.

All of them: the same initial weights, the same batches, a compiled model, a constant learning rate.
*Search*: a run of half the steps for every rate in ``RATES``; the lowest validation loss at its end wins.
*Race*: ``REPEATS`` runs with the winner, the contenders taking turns; they differ in time only, and the
fastest counts. Losses and scores are computed between steps, while the clock stands.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils import _pytree as pytree

from ..compile import compile as thor_compile
from ..optimizer import Thor
from .progress import Advance
from .tasks import Digits, Images, Measure, Task

RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
REPEATS = 3
BATCH = 256
SEARCH_POINTS, RACE_POINTS = 4, 80
MOMENTUM = 0.9
DAMPING = 0.03
FREQUENCY = 50
DIVERGED = 100.0  # times the initial loss

Batches = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Settings:
    """What the user chose."""

    steps: int
    seed: int
    backend: str
    clip_all: bool = False

    @property
    def search_steps(self) -> int:
        """The length of a run in the search."""
        return math.ceil(self.steps / 2)

    @property
    def frequency(self) -> int:
        """THOR renews its factors every so many steps."""
        return min(FREQUENCY, self.steps)

    @property
    def planned_steps(self) -> int:
        """Of all runs of a task."""
        return len(CONTENDERS) * (len(RATES) * self.search_steps + REPEATS * self.steps)


@dataclass
class Curve:
    """A run: after how many steps and seconds which training loss, and what else holds at its end."""

    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    validation: float = math.inf
    score: float = math.nan

    @property
    def diverged(self) -> bool:
        """Whether the loss exploded."""
        return not self.losses[-1] <= DIVERGED * self.losses[0]

    def first_below(self, loss: float) -> tuple[float, float]:
        """The steps and seconds that it took to a loss; infinite if it was never reached."""
        reached = [
            (n, s) for n, s, value in zip(self.steps, self.seconds, self.losses, strict=True) if value <= loss
        ]
        return reached[0] if reached else (math.inf, math.inf)


@dataclass(frozen=True)
class Result:
    """What a contender did.

    Attributes:
        name: of the contender.
        search: the validation loss by learning rate, infinite where the run diverged.
        rate: the best of them.
        curve: the fastest race.
        compile_seconds: what the first two steps took.
        refreshes: how often the factors were renewed in a race.
    """

    name: str
    search: dict[float, float]
    rate: float
    curve: Curve
    compile_seconds: float
    refreshes: int

    @property
    def step_seconds(self) -> float:
        """The mean time of a step."""
        return self.curve.seconds[-1] / self.curve.steps[-1]


@dataclass
class Contender:
    """A compiled model and an optimizer that can start over without compiling again.

    Attributes:
        name: as shown.
        task: what is trained.
        module: the module itself, for evaluation.
        compiled: what training calls.
        optimizer: of the module's parameters.
        clip: clip gradients, tensor by tensor, to norm 1.
        frequency: THOR's; None for others.
    """

    name: str
    task: Task
    module: nn.Module
    compiled: Callable[..., Any]
    optimizer: Optimizer
    clip: bool = False
    frequency: int | None = None

    def __post_init__(self) -> None:
        self._initial = {key: value.clone() for key, value in self.module.state_dict().items()}

    def compile(self, batches: Batches) -> float:
        """Take two steps: they compile every kind of step there is. Returns the seconds."""
        return self._train(batches[:2])

    def run(self, rate: float, batches: Batches, digits: Digits, points: int, advance: Advance) -> Curve:
        """Train from the start, one step per batch; stop where that diverges."""
        self._start_over(rate, batches[0])
        curve = Curve([0], [0.0], [self._measure(self.task.loss, digits.training)])
        every = math.ceil(len(batches) / points)
        while curve.steps[-1] < len(batches) and not curve.diverged:
            done = curve.steps[-1]
            chunk = batches[done : done + every]
            curve.seconds.append(curve.seconds[-1] + self._train(chunk))
            curve.steps.append(done + len(chunk))
            curve.losses.append(self._measure(self.task.loss, digits.training))
            advance(len(chunk), f"{self.name}, rate {rate:g}")
        advance(len(batches) - curve.steps[-1], "")
        if not curve.diverged:
            curve.validation = self._measure(self.task.loss, digits.validation)
            curve.score = self._measure(self.task.score, digits.test)
        return curve

    def _start_over(self, rate: float, batch: tuple[Tensor, Tensor]) -> None:
        if self.frequency is not None:  # the first step has to be a factor step: go to where one is due
            while self.optimizer.param_groups[0]["step"] % self.frequency:
                self._step(*batch)
        self.module.load_state_dict(self._initial)
        for leaf in pytree.tree_leaves(list(self.optimizer.state.values())):
            if isinstance(leaf, Tensor):
                leaf.zero_()
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _train(self, batches: Batches) -> float:
        device = batches[0][0].device
        _wait_for(device)
        started = time.perf_counter()
        for batch in batches:
            self._step(*batch)
        _wait_for(device)
        return time.perf_counter() - started

    def _step(self, images: Tensor, labels: Tensor) -> None:
        self.task.loss(self.compiled(images), images, labels).backward()
        if self.clip:
            for parameter in self.module.parameters():
                nn.utils.clip_grad_norm_(parameter, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def _measure(self, what: Measure, images: Images) -> float:
        outputs = self.module.forward(images.pixels)  # not compiled: the sets differ in size
        return what(outputs, images.pixels, images.labels).item()


def race(task: Task, digits: Digits, settings: Settings, advance: Advance) -> list[Result]:
    """Compile and search, one contender after the other, and race; ``advance`` hears of every step."""
    batches = digits.training.batches(BATCH, settings.steps, settings.seed)
    contenders = [make(task, digits, settings) for make in CONTENDERS]
    compiled, searched, best = {}, {}, {}
    for contender in contenders:
        name = contender.name
        advance(0, f"{name} compiles")
        compiled[name] = contender.compile(batches)
        tries = partial(
            contender.run,
            batches=batches[: settings.search_steps],
            digits=digits,
            points=SEARCH_POINTS,
            advance=advance,
        )
        searched[name] = {rate: tries(rate).validation for rate in RATES}
        best[name] = min(RATES, key=searched[name].__getitem__)
    rounds = [
        [c.run(best[c.name], batches, digits, RACE_POINTS, advance) for c in contenders]
        for _ in range(REPEATS)
    ]
    return [
        Result(
            contender.name,
            searched[contender.name],
            best[contender.name],
            min(curves, key=lambda curve: curve.seconds[-1]),
            compiled[contender.name],
            0 if contender.frequency is None else math.ceil(settings.steps / contender.frequency),
        )
        for contender, curves in zip(contenders, zip(*rounds, strict=True), strict=True)
    ]


def _sgd(task: Task, digits: Digits, settings: Settings) -> Contender:
    return _first_order("SGD", task, digits, settings, partial(SGD, momentum=MOMENTUM))


def _adamw(task: Task, digits: Digits, settings: Settings) -> Contender:
    return _first_order("AdamW", task, digits, settings, partial(AdamW, weight_decay=0.0))


def _first_order(
    name: str, task: Task, digits: Digits, settings: Settings, optimizer: Callable[..., Optimizer]
) -> Contender:
    model = task.model(settings.seed).to(digits.training.pixels.device)
    compiled = torch.compile(model, backend=settings.backend)
    fused = optimizer(model.parameters(), lr=RATES[0], fused=True)
    return Contender(name, task, model, compiled, fused, clip=settings.clip_all)


def _thor(task: Task, digits: Digits, settings: Settings) -> Contender:
    model = task.model(settings.seed).to(digits.training.pixels.device)
    model = thor_compile(model, backend=settings.backend)
    optimizer = Thor(
        model,
        lr=RATES[0],
        damping=DAMPING,
        momentum=MOMENTUM,
        enable_clip_grad=True,
        frequency=settings.frequency,
    )
    return Contender("THOR", task, model, model, optimizer, frequency=settings.frequency)


CONTENDERS = (_sgd, _adamw, _thor)


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
