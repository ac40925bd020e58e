"""The same search for every optimizer: a climb on a grid of learning rates and one more setting."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

BUDGET = 8
FACTOR = 3.0  # between learning rates
Point = tuple[float, int]
"""Where the search is: the learning rate's power of ``FACTOR``, and the index of the other value."""

MOVES: tuple[Point, ...] = (
    (1, 0),
    (-1, 0),
    (0, 1),
    (0, -1),
    (0.5, 0),
    (-0.5, 0),
    (1, 1),
    (-1, 1),
    (1, -1),
    (-1, -1),
)
"""What is tried next to the best point, in this order."""


@dataclass(frozen=True)
class Space:
    """Where an optimizer's search starts.

    Attributes:
        lr: the first learning rate, by task; the key ``""`` stands for all other tasks.
        knob: the name of the one other setting that is searched.
        values: its values in order, by task like ``lr``; the search starts at the first.
        fixed: all other settings.
    """

    lr: Mapping[str, float]
    knob: str
    values: Mapping[str, tuple[Any, ...]]
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def setting(self, task: str, point: Point) -> dict[str, Any]:
        """The keyword arguments at a point."""
        power, index = point
        lr = float(f"{self.lr.get(task, self.lr['']) * FACTOR**power:.3g}")
        return {**self.fixed, "lr": lr, self.knob: self._values(task)[index]}

    def contains(self, task: str, point: Point) -> bool:
        return 0 <= point[1] < len(self._values(task))

    def _values(self, task: str) -> tuple[Any, ...]:
        return self.values.get(task, self.values[""])


def next_point(space: Space, task: str, found: Mapping[Point, float], budget: int = BUDGET) -> Point | None:
    """Where to look next; None when the budget is spent.

    Where every run so far has diverged, a ninth of the learning rate. Otherwise the first neighbour of the
    best point, in the order of ``MOVES``, that has not been tried: so the search moves on where the best
    point is at the edge of what was tried, and refines around it where it is not.

    Args:
        space: of the optimizer.
        task: name of the task.
        found: what was reached at every point so far, lower is better; infinite where a run diverged.
        budget: how many points may be tried.

    Example:
        >>> space = Space(lr={"": 0.1}, knob="momentum", values={"": (0.9, 0.99)})
        >>> next_point(space, "cnn", {})
        (0.0, 0)
        >>> next_point(space, "cnn", {(0.0, 0): 1.0, (1.0, 0): 0.5})
        (2.0, 0)
    """
    if len(found) >= budget:
        return None
    if not found:
        return 0.0, 0
    best = min(found, key=lambda point: (found[point], point[0]))
    if math.isinf(found[best]):
        return best[0] - 2, best[1]
    neighbours = [(best[0] + power, best[1] + index) for power, index in MOVES]
    free = [point for point in neighbours if point not in found and space.contains(task, point)]
    return free[0] if free else None
