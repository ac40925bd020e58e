"""What follows from a coverage, computed once for as long as it stays the same object.

Hooks between steps ask the same in every step. A coverage has every layer in it, and does not change.
"""

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from .layers import Coverage

Value = TypeVar("Value")


class PerCoverage(Generic[Value]):
    """The values of one function of coverages, for the last coverage that it was asked about."""

    def __init__(self) -> None:
        self._coverage: Coverage | None = None
        self._known: dict[Hashable, Value] = {}

    def get(self, coverage: Coverage, about: Hashable, compute: Callable[[], Value]) -> Value:
        """The value; computed where it is not known yet.

        Args:
            coverage: known by identity.
            about: what else the value depends on.
            compute: the value.
        """
        if coverage is not self._coverage:
            self._coverage, self._known = coverage, {}
        if about not in self._known:
            self._known[about] = compute()
        return self._known[about]
