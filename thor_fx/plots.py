"""Plots of what training is made of: spectra of factors, block sizes, traces and damping over steps.

All take ``path``, a file to write that ends in ``.png``, ``.svg`` or ``.pdf``, or None for none, and return
the ``matplotlib`` figure. matplotlib is optional: ``pip install "thor-fx[examples]"``.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .block_size_rule import BlockSizeReport
from .factors import Kronecker

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
MOST_NAMES = 12  # lines that a legend names
History = Sequence[Mapping[str, Any]]
"""What ``metrics`` says, once for every step."""


def factor_spectra(factors: Mapping[str, Kronecker], path: str | Path | None = None) -> "Figure":
    """The eigenvalues of every ``A`` and every ``G``, the largest first; one line for every group.

    Lines that fall steeply are of factors that damping decides about; what is 0 up to rounding is not drawn.

    Args:
        factors: from :func:`thor_fx.factors`.
        path: the file.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no factor, or ``path`` has another suffix.
    """
    if not factors:
        raise ValueError("factors is empty: no layer has any, see thor_fx.explain")
    figure, axes = _figure(path, columns=2)
    colors = _colors(len(factors))
    for side, panel in zip(("A", "G"), axes, strict=True):
        for (name, pair), color in zip(factors.items(), colors, strict=True):
            for i, values in enumerate(spectrum(getattr(pair, side))):
                shown = values[values > values.max() * torch.finfo(torch.float32).eps]
                share = (torch.arange(len(shown)) + 1) / len(values)
                panel.plot(share, shown, color=color, lw=1.3, label=name if i == 0 else None)
        panel.set_title(f"${side}$")
        panel.set_yscale("log")
        panel.set_xlabel("share of the eigenvalues, the largest first")
    axes[0].set_ylabel("eigenvalue")
    return _finished(figure, axes, path)


def spectrum(factor: Tensor) -> Tensor:
    """The eigenvalues of every group of a factor, the largest first, shape (groups, side).

    Example:
        >>> spectrum(torch.tensor([[2.0, 0.0], [0.0, 3.0]])), spectrum(torch.tensor([1.0, 4.0]))
        (tensor([[3., 2.]], dtype=torch.float64), tensor([[4., 1.]], dtype=torch.float64))
    """
    factor = factor.detach().to("cpu", torch.float64)
    values = factor[None] if factor.dim() == 1 else torch.linalg.eigvalsh(factor)  # a vector is a diagonal
    return torch.atleast_2d(values).sort(descending=True).values


def block_size_curves(report: BlockSizeReport, path: str | Path | None = None) -> "Figure":
    """The two curves that a block size is chosen from.

    Args:
        report: from :func:`thor_fx.block_size_report`.
        path: the file.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: ``path`` has another suffix.
    """
    _check(path)
    return report.draw(path)


def trace_history(history: History, path: str | Path | None = None) -> "Figure":
    """The trace of the curvature over steps: one line, or one for every layer.

    Args:
        history: what ``metrics`` said of every step; ``"trace"`` is a number, or numbers by layer.
        path: the file.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no step has a ``"trace"``, or ``path`` has another suffix.
    """
    return _over_steps(history, "trace", path)


def damping_history(history: History, path: str | Path | None = None) -> "Figure":
    """Damping over steps.

    Args:
        history: what ``metrics`` said of every step.
        path: the file.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no step has a ``"damping"``, or ``path`` has another suffix.
    """
    return _over_steps(history, "damping", path)


def as_svg(plot: "Figure | str") -> str:
    """A figure as SVG text; what is text stays as it is."""
    if isinstance(plot, str):
        return plot
    text = io.StringIO()
    plot.savefig(text, format="svg")
    return text.getvalue()


def _over_steps(history: History, key: str, path: str | Path | None) -> "Figure":
    lines: dict[str, list[tuple[float, float]]] = {}
    for position, entry in enumerate(history):
        value = entry.get(key)
        values = value if isinstance(value, Mapping) else {} if value is None else {"": value}
        for name, number in values.items():
            lines.setdefault(name, []).append((float(entry.get("step", position)), float(number)))
    if not lines:
        raise ValueError(
            f"history has no {key!r} in any of its {len(history)} steps: see what metrics() returns"
        )
    figure, axes = _figure(path, columns=1)
    for (name, points), color in zip(lines.items(), _colors(len(lines)), strict=True):
        axes[0].plot(*zip(*points, strict=True), color=color, lw=1.5, label=name or None)
    if all(number > 0 for points in lines.values() for _, number in points):
        axes[0].set_yscale("log")
    axes[0].set_xlabel("step")
    axes[0].set_ylabel(key)
    return _finished(figure, axes, path)


def _check(path: str | Path | None) -> None:
    if path is not None and Path(path).suffix.lower() not in FORMATS:
        raise ValueError(f"path must end in {', '.join(FORMATS)}, got {str(path)!r}")


def _figure(path: str | Path | None, columns: int) -> "tuple[Figure, list[Axes]]":
    """A figure with panels beside each other."""
    _check(path)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "thor-fx[examples]"') from error
    figure = Figure(figsize=(2.2 + 4.2 * columns, 4.0), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _colors(count: int) -> Any:
    """Colours from dark to light, in the order of the model."""
    from matplotlib import colormaps

    return colormaps["viridis"]([0.9 * i / max(1, count - 1) for i in range(count)])


def _finished(figure: "Figure", axes: "Sequence[Axes]", path: str | Path | None) -> "Figure":
    for panel in axes:
        panel.grid(alpha=0.3, lw=0.5)
        panel.spines[["top", "right"]].set_visible(False)
    lines, names = axes[0].get_legend_handles_labels()
    if names:
        shown = slice(None, None, -(-len(names) // MOST_NAMES))
        figure.legend(lines[shown], names[shown], loc="outside right center", frameon=False, fontsize=8)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
