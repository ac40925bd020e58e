"""Damping that adapts itself (Martens & Grosse 2015, section 6.5).

A step ``d`` was chosen by a quadratic model of the loss, which predicts the change ``M(d) - M(0)``
(:mod:`thor_fx.predicted`). The *reduction ratio* compares it with what the same batch says::

    rho = (L(w + d) - L(w)) / (M(d) - M(0))

Near 1 the model is good and the damping may fall; near 0 or below it is not, and the damping has to rise.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .arguments import check_integer, check_number
from .collector import Collector
from .distributed.collectives import World
from .predicted import PredictedState

NEEDS_CLOSURE = (
    "damping=LevenbergMarquardt(...) compares the loss of a batch before and after the step: call "
    "step(closure), where closure computes the loss, calls backward and returns the loss"
)


@dataclass(frozen=True)
class LevenbergMarquardt:
    """A value of ``damping`` that adapts itself: see :mod:`thor_fx.levenberg_marquardt`.

    In every ``interval``-th step the loss is computed a second time, after the update, on the same batch,
    and the host waits for it. The damping is divided by ``decay ** interval`` where the reduction ratio is
    below ``low``, and multiplied by it where it is above ``high``. Where the model itself predicts no fall
    of the loss (momentum or a learning rate that overshoot), or the step was skipped, the damping stays.

    Args:
        initial: the damping of the first steps.
        interval: steps between two comparisons, as ``T_1`` in the paper.
        decay: what the damping may lose in one step; the paper's 19/20.
        low: below this ratio the damping rises.
        high: above this ratio the damping falls.
        minimum: the damping never falls below.
        maximum: the damping never rises above.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: an argument has a wrong value.

    Example:
        >>> rule = LevenbergMarquardt(1.0, interval=2, decay=0.5)
        >>> [rule.adjusted(1.0, ratio) for ratio in (1.0, 0.5, -1.0)]
        [0.25, 1.0, 4.0]
        >>> [step for step in range(6) if rule.compares(step)]
        [1, 3, 5]
    """

    initial: float
    interval: int = 5
    decay: float = 0.95
    low: float = 0.25
    high: float = 0.75
    minimum: float = 1e-8
    maximum: float = 1e8

    def __post_init__(self) -> None:
        for name in ("initial", "decay", "minimum", "maximum"):
            check_number(name, getattr(self, name), positive=True)
        for name in ("low", "high"):
            check_number(name, getattr(self, name))
        check_integer("interval", self.interval)
        if self.decay >= 1:
            raise ValueError(f"decay must be below 1, got {self.decay!r}")
        if self.low >= self.high:
            raise ValueError(f"low must be below high, got low={self.low!r}, high={self.high!r}")
        if not self.minimum <= self.initial <= self.maximum:
            raise ValueError(
                f"initial must be between minimum and maximum, got {self.initial!r}, "
                f"{self.minimum!r} and {self.maximum!r}"
            )

    def compares(self, step: int) -> bool:
        """Whether the loss of step ``step`` is computed a second time."""
        return (step + 1) % self.interval == 0

    def adjusted(self, damping: float, ratio: float) -> float:
        """The damping after a reduction ratio; one that is not a number counts as bad."""
        factor = self.decay**self.interval
        if ratio > self.high:
            damping *= factor
        elif not ratio >= self.low:
            damping /= factor
        return min(max(damping, self.minimum), self.maximum)

    def after(
        self, damping: float, state: Any, before: Tensor, later: Tensor, world: World | None = None
    ) -> float:
        """The damping after a step that predicted a change. Waits for the device.

        Args:
            damping: of the step.
            state: of the transform, after the step; its prediction is used up.
            before: the loss of the batch, 0-D.
            later: the loss of the same batch after the step, 0-D.
            world: the ranks whose losses are averaged.
        """
        change = _predicted(state)
        predicted = float(change)
        change.zero_()
        if not predicted < 0:
            return damping
        achieved = torch.as_tensor(later) - before
        ratio = float(achieved if world is None else world.mean_number(achieved)) / predicted
        return self.adjusted(damping, ratio if math.isfinite(ratio) else -math.inf)


class AdaptiveDamping:
    """The damping of an optimizer's groups of parameters that follow one rule; or none does.

    Args:
        rule: the optimizer's own; None: its damping does not adapt itself.
    """

    def __init__(self, rule: LevenbergMarquardt | None) -> None:
        self._rule = rule
        self._follows: list[bool] = []  # by group

    def current(self, rule: LevenbergMarquardt, groups: Sequence[dict[str, Any]]) -> float:
        """The damping of the groups that follow ``rule``.

        Raises:
            ValueError: it is the rule of a group alone.
        """
        if rule is not self._rule:
            raise ValueError("LevenbergMarquardt adapts one damping: pass it to Thor, not to a group")
        known = itertools.compress(groups, self._follows)
        return float(next((group["damping"] for group in known), rule.initial))

    def add(self, *, follows: bool) -> None:
        """There is one more group."""
        self._follows.append(follows)

    def loss(self, closure: Callable[[], Any] | None) -> Any:
        """What ``closure`` returns before the step; None without one.

        Raises:
            RuntimeError: the damping adapts itself, and there is no closure, or it returns no loss.
        """
        if self._rule is not None and closure is None:
            raise RuntimeError(NEEDS_CLOSURE)
        found = None
        if closure is not None:
            with torch.enable_grad():
                found = closure()
        if self._rule is not None and found is None:
            raise RuntimeError(NEEDS_CLOSURE)
        return found

    def compares(self, step: int) -> bool:
        """Whether the loss of step ``step`` is computed a second time."""
        return self._rule is not None and self._rule.compares(step)

    def adapt(
        self, groups: Sequence[dict[str, Any]], state: Any, before: Any, later: Tensor, world: World | None
    ) -> None:
        """Change the damping by what a step did to the loss of its batch. Waits for the device.

        Args:
            groups: of parameters.
            state: of the transform, after the step.
            before: the loss of the batch.
            later: the loss of the same batch after the step, 0-D.
            world: the ranks whose losses are averaged.
        """
        assert self._rule is not None, "a rule compares"
        damping = self._rule.after(self.current(self._rule, groups), state, before, later, world)
        for group in itertools.compress(groups, self._follows):
            group["damping"] = damping


def _predicted(state: Any) -> Tensor:
    found: list[Tensor] = []
    pytree.tree_map(
        lambda node: found.append(node.change) if isinstance(node, PredictedState) else None,
        state,
        is_leaf=lambda node: isinstance(node, PredictedState),
    )
    return found[0]


def loss_again(closure: Callable[[], Any], params: Iterable[Tensor], collector: Collector) -> Tensor:
    """What ``closure`` returns now; the gradients and factors that it leaves are put aside."""
    kept = [(p, p.grad) for p in params]
    wanted, collector.wanted = collector.wanted, False
    for p, _ in kept:
        p.grad = None
    try:
        with torch.enable_grad():
            return torch.as_tensor(closure()).detach()
    finally:
        for p, gradient in kept:
            p.grad = gradient
        collector.wanted = wanted
        collector.clear()
