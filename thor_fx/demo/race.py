"""SGD-momentum, AdamW and THOR on one task, under the same rules.

All of them: the same initial weights, the same batches, a model compiled by the same compiler, a constant
learning rate. Search: one run of half the steps for every rate of ``RATES``; the lowest final training loss
wins. Race: ``REPEATS`` runs with that rate, the contenders taking turns; of these deterministic runs the
fastest counts. Training loss and test score are computed between steps, while the clock stands.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils import _pytree as pytree

from ..compile import compile as thor_compile
from ..optimizer import Thor
from .progress import Advance
from .tasks import Digits, Task

RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
REPEATS = 3
BATCH = 256
POINTS = 80  # of a curve
MOMENTUM = 0.9
DAMPING = 0.03
FREQUENCY = 50
DIVERGED = 100.0  # times the initial loss


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


@dataclass(frozen=True)
class Curve:
    """One run: after how many steps and seconds which training loss, and the test score at its end."""

    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    score: float = math.nan

    @property
    def final(self) -> float:
        """The last loss; infinite if the run diverged."""
        return self.losses[-1] if math.isfinite(self.losses[-1]) else math.inf

    def first_below(self, loss: float) -> tuple[int, float] | None:
        """The steps and seconds that it took to a loss."""
        reached = (i for i, value in enumerate(self.losses) if value <= loss)
        at = next(reached, None)
        return None if at is None else (self.steps[at], self.seconds[at])


@dataclass(frozen=True)
class Result:
    """What one contender did: the final losses of its search by learning rate, and its best race."""

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


class Contender:
    """A compiled model and an optimizer that start over, without compiling again."""

    def __init__(self, name: str, model: nn.Module, optimizer: Optimizer, task: Task, clip: bool) -> None:
        self.name = name
        self.compile_seconds = 0.0
        self.frequency: int | None = None
        self._model, self._optimizer, self._task, self._clip = model, optimizer, task, clip
        self._initial = {key: value.clone() for key, value in model.state_dict().items()}

    def compile(self, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Take the first two steps, which compile every kind of step there is."""
        started = time.perf_counter()
        for batch in batches[:2]:
            self._step(*batch)
        _wait_for(batches[0][0].device)
        self.compile_seconds = time.perf_counter() - started

    def run(
        self,
        rate: float,
        batches: Sequence[tuple[Tensor, Tensor]],
        digits: Digits,
        every: int,
        advance: Callable[[int], None],
    ) -> Curve:
        """Train from the initial weights, a step for every batch, and stop early if that diverges."""
        self._start_over(rate, batches[0])
        curve = Curve([0], [0.0], [self._evaluate(digits)])
        for start in range(0, len(batches), every):
            chunk = batches[start : start + every]
            curve.seconds.append(curve.seconds[-1] + self._train(chunk))
            curve.steps.append(start + len(chunk))
            curve.losses.append(self._evaluate(digits))
            advance(len(chunk))
            if not curve.losses[-1] < DIVERGED * curve.losses[0]:
                curve.losses[-1] = math.inf
                break
        return Curve(curve.steps, curve.seconds, curve.losses, self._score(digits))

    def _start_over(self, rate: float, batch: tuple[Tensor, Tensor]) -> None:
        if self.frequency is not None:  # as the first step is to be a factor step, make the next one so
            while self._optimizer.param_groups[0]["step"] % self.frequency:
                self._step(*batch)
        self._model.load_state_dict(self._initial)
        for leaf in pytree.tree_leaves(list(self._optimizer.state.values())):
            if isinstance(leaf, Tensor):
                leaf.zero_()
        for group in self._optimizer.param_groups:
            group["lr"] = rate

    def _train(self, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
        device = batches[0][0].device
        _wait_for(device)
        started = time.perf_counter()
        for batch in batches:
            self._step(*batch)
        _wait_for(device)
        return time.perf_counter() - started

    def _step(self, images: Tensor, labels: Tensor) -> None:
        self._task.loss(self._model(images), images, labels).backward()
        if self._clip:
            for p in self._model.parameters():
                nn.utils.clip_grad_norm_(p, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()

    @torch.no_grad()
    def _evaluate(self, digits: Digits) -> float:
        outputs = self._model.forward(digits.images)  # not compiled: another batch size
        return self._task.loss(outputs, digits.images, digits.labels).item()

    @torch.no_grad()
    def _score(self, digits: Digits) -> float:
        outputs = self._model.forward(digits.test_images)
        return self._task.score(outputs, digits.test_images, digits.test_labels).item()


def race(task: Task, digits: Digits, settings: Settings, advance: Advance) -> list[Result]:
    """Compile, search and race; ``advance`` hears of every step."""
    batches = digits.batches(BATCH, settings.steps, settings.seed)
    contenders = _contenders(task, digits, settings)
    total = len(contenders) * (len(RATES) * settings.search_steps + REPEATS * settings.steps)
    done = 0

    def taken(what: str) -> Callable[[int], None]:
        def advance_by(steps: int) -> None:
            nonlocal done
            done += steps
            advance(done, total, what)

        return advance_by

    searches = {}
    every = math.ceil(settings.search_steps / 4)
    for contender in contenders:
        advance(done, total, f"{contender.name} compiles")
        contender.compile(batches)
        searches[contender.name] = {
            rate: contender.run(
                rate, batches[: settings.search_steps], digits, every, taken(f"{contender.name} tries {rate:g}")
            ).final
            for rate in RATES
        }
        done = len(searches) * len(RATES) * settings.search_steps  # also where runs stopped early
    best = {name: min(search, key=lambda rate: search[rate]) for name, search in searches.items()}

    every = math.ceil(settings.steps / POINTS)
    curves: dict[str, list[Curve]] = {contender.name: [] for contender in contenders}
    for _ in range(REPEATS):
        for contender in contenders:
            curve = contender.run(best[contender.name], batches, digits, every, taken(f"{contender.name} races"))
            curves[contender.name].append(curve)
    return [
        Result(
            contender.name,
            searches[contender.name],
            best[contender.name],
            min(curves[contender.name], key=lambda curve: curve.seconds[-1]),
            contender.compile_seconds,
            0 if contender.frequency is None else math.ceil(settings.steps / contender.frequency),
        )
        for contender in contenders
    ]


def _contenders(task: Task, digits: Digits, settings: Settings) -> list[Contender]:
    device = digits.images.device

    def model() -> nn.Module:
        return task.model(settings.seed).to(device)

    def first_order(name: str, optimizer: Callable[[nn.Module], Optimizer]) -> Contender:
        compiled = model()
        compiled.compile(backend=settings.backend)
        return Contender(name, compiled, optimizer(compiled), task, settings.clip_all)

    second_order = thor_compile(model(), backend=settings.backend)
    thor = Contender("THOR", second_order, _thor(second_order, settings), task, clip=False)
    thor.frequency = settings.frequency
    return [
        first_order("SGD", lambda m: SGD(m.parameters(), lr=RATES[0], momentum=MOMENTUM, fused=True)),
        first_order("AdamW", lambda m: AdamW(m.parameters(), lr=RATES[0], weight_decay=0.0, fused=True)),
        thor,
    ]


def _thor(model: nn.Module, settings: Settings) -> Thor:
    return Thor(
        model,
        lr=RATES[0],
        damping=DAMPING,
        momentum=MOMENTUM,
        enable_clip_grad=True,
        frequency=settings.frequency,
    )


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
