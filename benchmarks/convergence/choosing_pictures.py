"""The plots of docs/choosing.md, from what ``choosing.py`` wrote.

``python benchmarks/convergence/choosing_pictures.py``
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from choosing import FREQUENCIES, INTERVAL, RULES, Record, means

HERE = Path(__file__).parent
IMAGES = HERE.parents[1] / "docs" / "images"
TITLES: Mapping[str, str] = {
    "thor": 'the defaults, damping_rule="factor"',
    "recommended": 'preset="recommended"',
}


def grids(runs: Sequence[Record], path: Path) -> None:
    """The loss by learning rate and damping, one panel for every rule."""
    from matplotlib import colors
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    found = [run for run in means(runs) if run["frequency"] == INTERVAL]
    finite = [run["loss"] for run in found if math.isfinite(run["loss"])]
    shade = colors.LogNorm(min(finite), max(finite))
    for axis, rule in zip(figure.subplots(1, len(RULES)), RULES, strict=True):
        cells = {(run["damping"], run["lr"]): run["loss"] for run in found if run["rule"] == rule}
        dampings, rates = (sorted({cell[i] for cell in cells}) for i in (0, 1))
        table = [[cells[damping, lr] for lr in rates] for damping in dampings]
        drawn = [[loss if math.isfinite(loss) else math.nan for loss in row] for row in table]
        image = axis.imshow(drawn, norm=shade, cmap="viridis_r", origin="lower", aspect="auto")
        for (damping, lr), loss in cells.items():
            place = rates.index(lr), dampings.index(damping)
            axis.text(*place, written(loss), ha="center", va="center", fontsize=8, **ink(loss, cells, shade))
        axis.set_xticks(range(len(rates)), [f"{lr:g}" for lr in rates], rotation=45)
        axis.set_yticks(range(len(dampings)), [f"{damping:g}" for damping in dampings])
        axis.set(title=TITLES[rule], xlabel="learning rate", ylabel="damping")
    figure.colorbar(image, ax=figure.axes, label="held-out loss")
    figure.savefig(path, dpi=100)


def written(loss: float) -> str:
    """Two digits; a cross where a run diverged."""
    return f"{loss:.2g}" if math.isfinite(loss) else "x"


def ink(loss: float, cells: Mapping[Any, float], shade: Any) -> dict[str, Any]:
    """How a number is written on its colour; the best one is bold, in a frame."""
    style = {"color": "white" if math.isfinite(loss) and shade(loss) > 0.6 else "black"}
    if loss == min(cells.values()):
        style |= {"fontweight": "bold", "bbox": {"boxstyle": "round", "fill": False, "edgecolor": "red"}}
    return style


def intervals(runs: Sequence[Record], path: Path) -> None:
    """Frequencies: the loss by damping, and against the time of a step."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.2), layout="constrained")
    *by_damping, by_time = figure.subplots(1, 3)
    colours = colormaps["viridis"]([0.9 * i / (len(FREQUENCIES) - 1) for i in range(len(FREQUENCIES))])
    for axis, rule in zip(by_damping, RULES, strict=True):
        for frequency, colour in zip(FREQUENCIES, colours, strict=True):
            line = at_best_rate(runs, rule, frequency)
            shown = [(run["damping"], run["loss"]) for run in line if math.isfinite(run["loss"])]
            axis.plot(*zip(*shown, strict=True), color=colour, marker="o", ms=3, label=f"every {frequency}")
        axis.set(xscale="log", yscale="log", xlabel="damping", ylabel="held-out loss", title=TITLES[rule])
    by_damping[0].legend(fontsize=8, frameon=False)
    for rule in RULES:
        points = [min(at_best_rate(runs, rule, f), key=lambda run: run["loss"]) for f in FREQUENCIES]
        times, losses = [mean_ms(run) for run in points], [run["loss"] for run in points]
        (line,) = by_time.plot(times, losses, marker="o", ms=4, label=TITLES[rule])
        for frequency, *place in zip(FREQUENCIES, times, losses, strict=True):
            offset = {"xytext": (3, 3), "textcoords": "offset points", "fontsize": 7}
            by_time.annotate(str(frequency), place, color=line.get_color(), **offset)
    by_time.set(
        yscale="log", xlabel="ms per step, on average", ylabel="held-out loss", title="best damping of each"
    )
    by_time.legend(fontsize=8, frameon=False)
    for axis in figure.axes:
        axis.grid(alpha=0.3, lw=0.5, which="both")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)


def at_best_rate(runs: Sequence[Record], rule: str, frequency: int) -> list[Record]:
    """All dampings, at the learning rate that was best with curvature every ``INTERVAL`` steps."""
    own = [run for run in means(runs) if run["rule"] == rule]
    best = min((run for run in own if run["frequency"] == INTERVAL), key=lambda run: run["loss"])
    return [run for run in own if run["frequency"] == frequency and run["lr"] == best["lr"]]


def mean_ms(run: Record) -> float:
    """Of a step, over an interval."""
    plain = run["plain_ms"] or 0.0
    return plain + (run["factor_ms"] - plain) / run["frequency"]


def main(command_line: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "choosing.json")
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder of the pictures")
    asked = parser.parse_args(command_line)
    runs = json.loads(asked.results.read_text())["runs"]
    grids(runs, asked.out / "choosing_grid.png")
    intervals(runs, asked.out / "choosing_frequency.png")


if __name__ == "__main__":
    main()
