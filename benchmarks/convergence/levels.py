"""Loss curves: smoothing, averaging over seeds, and when a level is reached."""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate

Curve = list[float]

SHARES = {"early": 0.25, "middle": 0.5, "final": 1.0}  # of AdamW's steps


def smooth(losses: Sequence[float | None], window: int) -> Curve:
    """The mean of every step's loss and up to ``window - 1`` before it; infinite from a missing loss on.

    >>> smooth([4.0, 2.0, 0.0], 2)
    [4.0, 3.0, 1.0]
    """
    known = [math.inf if loss is None else loss for loss in losses]
    parts = [known[max(0, i + 1 - window) : i + 1] for i in range(len(known))]
    return [sum(part) / len(part) for part in parts]


def average(curves: Sequence[Curve], steps: int) -> Curve:
    """The mean over seeds; infinite where one of them has ended."""
    padded = [curve + [math.inf] * (steps - len(curve)) for curve in curves]
    return [sum(values) / len(values) for values in zip(*padded, strict=True)]


def levels_of(curve: Curve) -> dict[str, float]:
    """The three levels that a curve defines: its lowest in the first quarter, the first half and all of it.

    >>> levels_of([4.0, 3.0, 1.0, 2.0])
    {'early': 4.0, 'middle': 3.0, 'final': 1.0}
    """
    return {name: min(curve[: math.ceil(share * len(curve))]) for name, share in SHARES.items()}


def steps_to(curve: Curve, level: float) -> int | None:
    """After how many steps a curve is first at or below a level; None if never.

    >>> steps_to([3.0, 2.0, 1.0], 2.0)
    2
    """
    return next((i + 1 for i, loss in enumerate(curve) if loss <= level), None)


def seconds_to(times_ms: Sequence[Sequence[float]], steps: int | None) -> float | None:
    """How long ``steps`` steps took, on average over the seeds; None where there are none."""
    if steps is None:
        return None
    return sum(sum(times[:steps]) for times in times_ms) / len(times_ms) / 1000


def elapsed(times_ms: Sequence[Sequence[float]]) -> Curve:
    """Seconds after every step, on average over the seeds that got there."""
    length = min(len(times) for times in times_ms)
    sums = [list(accumulate(times[:length])) for times in times_ms]
    return [sum(values) / len(values) / 1000 for values in zip(*sums, strict=True)]


def spread(values: Sequence[float]) -> Mapping[str, float]:
    """Mean, and the standard deviation of a sample (0 for a single value)."""
    mean = sum(values) / len(values)
    if len(values) == 1 or not math.isfinite(mean):
        return {"mean": mean, "spread": 0.0}
    return {"mean": mean, "spread": math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))}
