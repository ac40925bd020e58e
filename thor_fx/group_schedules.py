"""The hyper-parameters of an optimizer's groups of parameters: each was given by a schedule of its own."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from .options import damping_schedule, number_schedule
from .schedule import Schedule

SCHEDULES: dict[str, Callable[[Any], Schedule]] = {
    "lr": partial(Schedule, "lr"),
    "damping": damping_schedule,
    "momentum": partial(number_schedule, "momentum"),
    "weight_decay": partial(number_schedule, "weight_decay"),
    "fallback_lr": partial(Schedule, "fallback_lr"),
}
"""What a group of parameters may have a value of its own for."""


def schedules_of(given: Mapping[str, Any]) -> dict[str, Schedule]:
    """The schedules of one group; without one of ``fallback_lr`` where that is ``lr``.

    Args:
        given: every name in :data:`SCHEDULES`, with what the user gave for it.

    Raises:
        TypeError: a setting has a wrong type.
        ValueError: a setting has a wrong value.
    """
    wanted = [name for name in SCHEDULES if name != "fallback_lr" or given[name] is not None]
    return {name: SCHEDULES[name](given[name]) for name in wanted}


class GroupSchedules:
    """The schedules of all groups, in their order."""

    def __init__(self) -> None:
        self._all: list[dict[str, Schedule]] = []

    def add(self, schedules: dict[str, Schedule]) -> None:
        """There is one more group."""
        self._all.append(schedules)

    @property
    def by_label(self) -> dict[str, dict[str, Schedule]]:
        """The schedules by the label of the group, its number."""
        return {str(label): own for label, own in enumerate(self._all)}

    def values(self, groups: Sequence[dict[str, Any]]) -> dict[str, float | Tensor]:
        """The value of every hyper-parameter in this step: ``"0.lr"`` is that of the first group.

        A group's own value counts, and is overwritten where the schedule varies.
        """
        found: dict[str, float | Tensor] = {}
        for label, (group, schedules) in enumerate(zip(groups, self._all, strict=True)):
            for name, schedule in schedules.items():
                if not schedule.constant:
                    group[name] = schedule(group["step"])
                found[f"{label}.{name}"] = group[name]
        return found
