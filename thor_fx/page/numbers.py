"""Numbers that JSON can hold."""

import math


def finite(value: float | None) -> float | None:
    """The number; None for what is not one."""
    return value if value is not None and math.isfinite(value) else None
