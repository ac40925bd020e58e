"""Plots as images that are part of the page."""

from base64 import b64encode
from collections.abc import Mapping


def plot_facts(plots: Mapping[str, str]) -> list[dict[str, str]]:
    """Titles and images; as images, scripts in an SVG file do not run."""
    kind = "data:image/svg+xml;base64,"
    return [{"title": t, "image": kind + b64encode(svg.encode()).decode()} for t, svg in plots.items()]
