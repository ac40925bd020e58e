"""Pictures of a task: smoothed training loss against steps and against seconds."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from levels import Curve, elapsed
from optimizers import OPTIMIZERS
from runs import Record
from summary import BASELINE, Result, levels, mean_curve
from tasks import Task

COLOURS = dict(
    zip(
        OPTIMIZERS,
        ("#7f7f7f", "#bcbd22", "#1f77b4", "#9467bd", "#8c564b", "#2ca02c", "#ff7f0e", "#d62728"),
        strict=True,
    )
)
BOLD = "recommended"
LONGEST = 4.0  # times the baseline's seconds: slower runs leave the picture


def draw(path: Path, task: Task, found: Mapping[str, Result], clock: str) -> None:
    """Draw one task; nothing where there are no runs."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    curves = {n: (mean_curve(one.records, task), one.records) for n, one in found.items() if one.records}
    marks = levels(found, task)
    if not curves:
        return
    figure, (by_steps, by_seconds) = plt.subplots(1, 2, figsize=(13, 5), sharey=True, layout="constrained")
    for name, (curve, records) in curves.items():
        seconds = elapsed([record[f"{clock}_ms"] for record in records])
        style: dict[str, Any] = {"color": COLOURS[name], "linewidth": 2.8 if name == BOLD else 1.5}
        by_steps.plot(range(1, len(curve) + 1), drawn(curve), label=OPTIMIZERS[name].label, **style)
        by_seconds.plot(seconds, drawn(curve)[: len(seconds)], **style)
    for axis in (by_steps, by_seconds):
        for level in marks.values():
            axis.axhline(level, color="black", linewidth=0.7, linestyle=":")
        axis.grid(alpha=0.25)
    for level, loss in marks.items():
        by_steps.annotate(f" {level}", (0, loss), ha="left", va="bottom", fontsize=8)
    by_steps.set(xlabel="steps", ylabel="training loss, smoothed", xlim=(0, task.steps))
    by_steps.set_ylim(*limits([curve for curve, _ in curves.values()], marks))
    by_seconds.set(xlabel=f"seconds ({clock}, without compilation)", xlim=(0, longest(curves, clock)))
    figure.suptitle(task.title)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def drawn(curve: Curve) -> Curve:
    """Missing values are gaps."""
    return [loss if math.isfinite(loss) else math.nan for loss in curve]


def limits(curves: Sequence[Curve], marks: Mapping[str, float]) -> tuple[float, float]:
    """From the lowest loss to well above the first level: the start of a run says nothing."""
    low = min(loss for curve in curves for loss in curve)
    start = max(curve[0] for curve in curves if math.isfinite(curve[0]))
    high = min(start, marks["early"] + 1.5 * (marks["early"] - low)) if marks else start
    return low - 0.04 * (high - low), high


def longest(curves: Mapping[str, tuple[Curve, Sequence[Record]]], clock: str) -> float:
    ends = {
        name: elapsed([record[f"{clock}_ms"] for record in records])[-1]
        for name, (_, records) in curves.items()
    }
    return min(max(ends.values()), LONGEST * ends.get(BASELINE, math.inf))
