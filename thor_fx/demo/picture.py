"""The picture of a demo: loss against steps and against seconds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .race import Result
from .table import target
from .tasks import Task

# Okabe and Ito's colours, told apart without seeing colours by their dashes.
LOOKS = {
    "SGD": {"color": "#E69F00", "linestyle": ":"},
    "AdamW": {"color": "#0072B2", "linestyle": "--"},
    "THOR": {"color": "#D55E00", "linestyle": "-"},
}
AT_RIGHT = ("axes fraction", "data")
SHOWN_FROM_ABOVE = 1.5  # times the initial loss


def draw(results: Mapping[Task, Sequence[Result]], path: Path) -> None:
    """Save one row of two plots per task."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.1 * len(results)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (task, of_task) in zip(
        figure.subplots(len(results), 2, sharey="row"), results.items(), strict=True
    ):
        _plot(axes[0], of_task, "steps")
        _plot(axes[1], of_task, "seconds")
        axes[1].annotate(
            "all get here ", (1, target(of_task)), xycoords=AT_RIGHT, ha="right", va="bottom", color="0.4"
        )
        axes[0].set_ylabel(f"{task.name}\ntraining loss")
    figure.axes[0].legend(frameon=False)
    figure.axes[-2].set_xlabel("steps")
    figure.axes[-1].set_xlabel("seconds of training, compilation not included")
    figure.savefig(path, dpi=110)


def _plot(axes: Any, results: Sequence[Result], against: str) -> None:
    for result in results:
        label = f"{result.name} (lr {result.rate:g})"
        axes.plot(
            getattr(result.curve, against), result.curve.losses, label=label, lw=2, **LOOKS[result.name]
        )
    axes.axhline(target(results), color="0.6", lw=0.8, zorder=0)
    axes.set_yscale("log")
    axes.set_ylim(top=SHOWN_FROM_ABOVE * results[0].curve.losses[0])
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3, lw=0.5)
    axes.spines[["top", "right"]].set_visible(False)
