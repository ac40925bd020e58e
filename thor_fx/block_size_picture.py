"""The picture of the two curves that a block size is chosen from."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PALE = 0.4


def draw(
    path: str | Path | None,
    *,
    candidates: Sequence[int],
    performance: Sequence[float],
    spectral: Sequence[float],
    crossing: float,
    chosen: int,
    labels: tuple[str, str],
) -> "Figure":
    """Draw both curves over the block size, their crossing and the choice.

    Args:
        path: the file; its suffix says in which format. None: no file.
        candidates: block sizes.
        performance: the falling curve.
        spectral: the rising curve.
        crossing: where they cross.
        chosen: the block size that was chosen.
        labels: of the two curves.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('draw needs matplotlib: pip install "thor-fx[examples]"') from error
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    axes.plot(candidates, performance, marker="o", color="tab:red", label=labels[0])
    axes.plot(candidates, spectral, marker="s", color="tab:blue", label=labels[1])
    axes.axvline(crossing, color="black", linestyle=":", label=f"crossing at {crossing:.4g}")
    axes.axvline(chosen, color="tab:green", alpha=PALE, linewidth=6, label=f"block_size={chosen}", zorder=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(candidates, [str(b) for b in candidates])
    axes.minorticks_off()
    axes.set_xlabel("block size")
    axes.set_ylim(-0.03, 1.03)
    axes.grid(alpha=PALE)
    axes.legend(loc="best")
    if path is not None:
        figure.savefig(path)
    return figure
