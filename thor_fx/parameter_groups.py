"""The schedules of one group of parameters, or of several that are told apart by a label."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from .layers import Coverage
from .schedule import Schedule
from .transform import Hyper, Transform, partition

Schedules = Mapping[str, Schedule]


@dataclass(frozen=True)
class ParameterGroups:
    """What a chain is made for.

    Attributes:
        schedules: by label and name: ``lr``, ``damping``, ``momentum``, ``weight_decay``, and
            ``fallback_lr`` where it has a value of its own.
        labels: the label of every parameter; None: there is one group, called "".
        centralized: labels of groups whose gradients lose their mean.
    """

    schedules: Mapping[str, Schedules]
    labels: Mapping[str, str] | None = None
    centralized: frozenset[str] = frozenset()

    def each(self, make: Callable[[Schedules], Transform]) -> Transform:
        """One transform for every group."""
        if self.labels is None:
            return make(self.schedules[""])
        return partition({label: make(own) for label, own in self.schedules.items()}, self.labels)

    def parts(self, coverage: Coverage) -> list[Coverage]:
        """What every group sees of a coverage."""
        if self.labels is None:
            return [coverage]
        members: dict[str, list[str]] = {label: [] for label in self.schedules}
        for name, label in self.labels.items():
            members[label].append(name)
        return [coverage.restrict(frozenset(names)) for names in members.values()]

    def named(self, name: str) -> dict[str, Schedule]:
        """The schedule ``name`` of all groups, as a chain of all groups calls it."""
        return {self._key(label, name): own[name] for label, own in self.schedules.items()}

    def lr(self, hyper: Hyper, parameter: str) -> Tensor | float:
        """The learning rate of a parameter in this step."""
        label = "" if self.labels is None else self.labels[parameter]
        return hyper[self._key(label, "lr")]

    def _key(self, label: str, name: str) -> str:
        return name if self.labels is None else f"{label}.{name}"
