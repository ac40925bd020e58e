"""Checks of single arguments: every message names the argument, its value and what is allowed."""

import math
import numbers
from collections.abc import Collection
from typing import Any, get_args

from .passes.layout import LikelihoodName
from .passes.switches import OPTIMISATIONS


def check_number(name: str, value: Any, *, positive: bool = False) -> None:
    """Refuse what is no finite number of the right sign."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    bound = "> 0" if positive else ">= 0"
    if not math.isfinite(as_float(value)) or value < 0 or (positive and value == 0):
        raise ValueError(f"{name} must be finite and {bound}, got {value!r}")


def as_float(value: Any) -> float:
    """A number as a float; infinite where it is an integer beyond all floats."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def check_integer(name: str, value: Any, *, optional: bool = False) -> None:
    """Refuse what is no integer of at least 1 (or None, where that is allowed)."""
    if value is None and optional:
        return
    allowed = "an integer >= 1 or None" if optional else "an integer >= 1"
    check_type(name, value, int, allowed)
    if isinstance(value, bool):
        raise TypeError(f"{name} must be {allowed}, got {shown(value)}")
    if value < 1:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def check_type(name: str, value: Any, expected: type, allowed: str) -> None:
    """Refuse a value that is not of type ``expected``."""
    if not isinstance(value, expected):
        raise TypeError(f"{name} must be {allowed}, got {shown(value)}")


def check_dynamic(value: Any) -> None:
    """Refuse what ``torch.compile`` fails on when it compiles."""
    if value is not None:
        check_type("dynamic", value, bool, "True, False or None")


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Refuse what is none of the texts of a ``Literal``."""
    allowed = list(get_args(choices))
    check_type(name, value, str, f"one of {allowed}")
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")


def check_sharing(name: str, value: Any) -> None:
    """Refuse what is neither ``"expand"`` nor ``"reduce"`` nor a function."""
    if callable(value):
        return
    if not isinstance(value, str):
        raise TypeError(f"{name} must be 'expand', 'reduce' or a callable name -> str, got {shown(value)}")
    if value not in {"expand", "reduce"}:
        raise ValueError(f"{name} must be 'expand', 'reduce' or a callable, got {value!r}")


def check_likelihood(name: str, value: Any) -> None:
    """Refuse what is neither None nor the name of a likelihood nor a function."""
    if value is None or callable(value):
        return
    allowed = [*get_args(LikelihoodName), None]
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {allowed} or a callable z -> score, got {shown(value)}")
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed} or a callable z -> score, got {value!r}")


def checked_disabled(names: Any) -> tuple[str, ...]:
    """The value of the argument ``disable_passes``, sorted.

    Raises:
        TypeError: it is no list of texts.
        ValueError: it names no optimisation.
    """
    if isinstance(names, str) or hasattr(names, "__array__") or not isinstance(names, Collection):
        raise TypeError(f"disable_passes must be a list of names, got {shown(names)}")
    for name in names:
        check_type("disable_passes", name, str, "a list of names")
        if name not in OPTIMISATIONS:
            raise ValueError(f"disable_passes must name some of {list(OPTIMISATIONS)}, got {name!r}")
    return tuple(sorted(set(names)))


def shown(value: Any) -> str:
    """A value with its type, as errors show it."""
    return f"{type(value).__name__}: {value!r}"
