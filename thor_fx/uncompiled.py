"""``on_compile_error``: what becomes of a graph that the compiler cannot compile."""

from collections.abc import Callable
from typing import Literal, TypeVar

from .warn import warn

OnCompileError = Literal["raise", "eager"]

Result = TypeVar("Result")


def compiled_or(
    compiled: Callable[[], Result], interpreted: Callable[[], Result], on_error: OnCompileError
) -> Result:
    """What ``compiled`` returns; with ``"eager"`` what ``interpreted`` does where that fails, and a warning.

    Raises:
        Exception: whatever ``compiled`` raises, with ``"raise"``.
    """
    try:
        return compiled()
    except Exception as error:
        if on_error == "raise":
            raise
        reason = str(error).strip().partition("\n")[0]
        warn(
            f"a graph could not be compiled and runs uncompiled, which is slower, because "
            f"on_compile_error='eager': {type(error).__name__}: {reason}",
            RuntimeWarning,
        )
        return interpreted()
