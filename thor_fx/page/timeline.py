"""The kernels of a step on a line."""

from collections.abc import Sequence
from typing import Any

from ..kernels import Kernel


def timeline(kind: str, kernels: Sequence[Kernel]) -> dict[str, Any]:
    """When every kernel runs, as shares of the whole.

    If the time of any of them is not known, all are put one after the other, as wide as their bytes.

    Example:
        >>> kernels = [Kernel("a", False, (), ("forward",), bytes=3), Kernel("b", True, (), (), bytes=1)]
        >>> made = timeline("plain", kernels)
        >>> made["measured"], [(bar["name"], bar["start"], bar["width"]) for bar in made["bars"]]
        (False, [('a', 0.0, 0.75), ('b', 0.75, 0.25)])
    """
    measured = all(kernel.seconds is not None for kernel in kernels)
    widths = [kernel.seconds or 0.0 if measured else float(kernel.bytes) for kernel in kernels]
    starts = _starts(kernels, widths, measured=measured)
    end = max((start + width for start, width in zip(starts, widths, strict=True)), default=0.0)
    bars = zip(kernels, starts, widths, strict=True)
    return {
        "kind": kind,
        "measured": measured,
        "total": end,
        "bars": [_bar(kernel, start / (end or 1), width / (end or 1)) for kernel, start, width in bars],
    }


def _starts(kernels: Sequence[Kernel], widths: Sequence[float], *, measured: bool) -> list[float]:
    """Where each begins: when it ran, or when the one before it has ended."""
    first = min((k.start for k in kernels if k.start is not None), default=0.0)
    found: list[float] = []
    end = 0.0
    for kernel, width in zip(kernels, widths, strict=True):
        found.append(kernel.start - first if measured and kernel.start is not None else end)
        end = found[-1] + width
    return found


def _bar(kernel: Kernel, start: float, width: float) -> dict[str, Any]:
    return {
        "name": kernel.name,
        "start": start,
        "width": width,
        "phases": list(kernel.phases),
        "library": kernel.extern,
        "nodes": list(kernel.nodes),
        "flops": kernel.flops,
        "bytes": kernel.bytes,
        "seconds": kernel.seconds,
    }
