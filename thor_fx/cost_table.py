"""What steps cost, as a table of text."""

from collections.abc import Iterator, Sequence

from .step_cost import PhaseCost, StepCost
from .units import scaled

HEADER = ("step", "phase", "MFLOP", "traffic", "at best ms", "measured ms")


def cost_table(steps: Sequence[StepCost]) -> str:
    """A line for every phase of every step, and its memory.

    Args:
        steps: what they cost.

    Example:
        >>> cost = PhaseCost(flops=2_000_000, bytes=4_000, floor=0.001, seconds=None)
        >>> print(cost_table([StepCost("plain", {"forward": cost}, peak=3_000, saved=500)]))
        step   phase    MFLOP  traffic  at best ms  measured ms
        plain  forward      2     4 kB           1
        plain: at most 3 kB at once, 500 B kept for backward
    """
    rows = [HEADER, *(row for step in steps for row in _rows(step))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = ["  ".join(_aligned(row, widths)).rstrip() for row in rows]
    memory = [
        f"{step.kind}: at most {scaled(step.peak, 'B')} at once, {scaled(step.saved, 'B')} kept for backward"
        for step in steps
    ]
    return "\n".join([*lines, *memory])


def _rows(step: StepCost) -> Iterator[tuple[str, ...]]:
    for phase, cost in step.phases.items():
        yield step.kind, phase, f"{cost.flops / 1e6:,.3g}", scaled(cost.bytes, "B"), *_times(cost)


def _times(cost: PhaseCost) -> tuple[str, str]:
    return f"{1e3 * cost.floor:.3g}", "" if cost.seconds is None else f"{1e3 * cost.seconds:.3g}"


def _aligned(row: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    for column, (cell, width) in enumerate(zip(row, widths, strict=True)):
        yield cell.ljust(width) if column < 2 else cell.rjust(width)
