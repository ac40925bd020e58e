"""Hyper-parameters that change with the step number.

``lr`` and ``damping`` may be a number, a 0-D tensor, a 1-D tensor with one value per step, or a
callable ``step -> value``. They are looked up on the host, so nothing recompiles and no device waits.
"""

import math
import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .arguments import as_float, shown
from .warn import warn

Value = float | Tensor | Callable[[int], float | Tensor]


class Schedule:
    """A named hyper-parameter: ``schedule(step)`` is its value in that step.

    Args:
        name: what errors call it.
        value: number, 0-D or 1-D tensor, or callable.
        positive: whether 0 is refused too.

    Raises:
        TypeError: ``value`` is none of these.
        ValueError: a value is negative or not finite, or a tensor has two axes or no element.

    Example:
        >>> lr = Schedule("lr", torch.tensor([0.5, 0.25]))
        >>> lr(0), lr(1)
        (0.5, 0.25)
    """

    def __init__(self, name: str, value: Value, *, positive: bool = False) -> None:
        self.name = name
        self._positive = positive
        self._table: list[float] = []
        self._function: Callable[[int], float | Tensor] | None = None
        self._ran_out = False
        if isinstance(value, Tensor):
            self._table = self._read(value)
        elif isinstance(value, numbers.Real) and not isinstance(value, bool):
            self._table = [self._checked(as_float(value))]
        elif callable(value):
            self._function = value
        else:
            raise TypeError(
                f"{name} must be a number, a 0-D or 1-D tensor, or a callable step -> value, "
                f"got {type(value).__name__}: {value!r}"
            )
        self.constant: bool = self._function is None and (not isinstance(value, Tensor) or value.dim() == 0)

    def __call__(self, step: int) -> float:
        """The value in step ``step``; a table that has run out keeps its last value, and says so once."""
        if self._function is not None:
            return self._checked(self._number(self._function(step)))
        if step >= len(self._table) and not (self.constant or self._ran_out):
            self._ran_out = True
            warn(
                f"the {self.name} table has {len(self._table)} values and step {step} is past its end: "
                f"its last value, {self._table[-1]:g}, is used from here on"
            )
        return self._table[min(step, len(self._table) - 1)]

    def __repr__(self) -> str:
        shown = self._function or (self._table if len(self._table) > 1 else self._table[0])
        return f"Schedule({self.name!r}, {shown})"

    def _read(self, value: Tensor) -> list[float]:
        if value.dim() > 1:
            raise ValueError(f"{self.name} must be a 0-D or 1-D tensor, got shape {tuple(value.shape)}")
        if value.dtype == torch.bool or value.is_complex():
            raise TypeError(f"{self.name} must be a tensor of real numbers, got dtype {value.dtype}")
        if value.is_meta:
            raise ValueError(f"{self.name} must be a tensor with values, got one on the meta device")
        if value.numel() == 0:
            raise ValueError(f"{self.name} is an empty table: give it one value per step")
        return [self._checked(v) for v in value.detach().double().reshape(-1).tolist()]

    def _number(self, value: Any) -> float:
        if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
            return float(value)
        if isinstance(value, numbers.Real) and not isinstance(value, bool):
            return as_float(value)
        raise TypeError(f"{self.name} must return a number for every step, got {shown(value)}")

    def _checked(self, value: float) -> float:
        if not math.isfinite(value) or value < 0 or (self._positive and value == 0):
            bound = "> 0" if self._positive else ">= 0"
            raise ValueError(f"{self.name} must be finite and {bound}, got {value}")
        return value
