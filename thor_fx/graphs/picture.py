"""The picture of a step: blocks of the model from top to bottom, phases of the step from left to right."""

import math
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Protocol

import networkx as nx

from ..passes.phases import Phase
from ..units import counted, scaled, times
from . import svg
from .block_edges import Edge, block_edges
from .blocks import Block, blocks
from .colors import color
from .layout import LINE, MARGIN, NAMES, Layout, Rectangle, arrange, phases_of, row_baseline
from .routes import Router, gaps_of, kind_of
from .rows import OWN, Row

NAME_WIDTH = 38  # letters that fit beside the columns
TITLE = "One step of training"


class HasGraph(Protocol):
    """A report, such as :func:`thor_fx.explain` returns."""

    @property
    def graph(self) -> "nx.DiGraph[str]":
        """From :func:`~thor_fx.graphs.to_networkx`."""


def draw(graph: "nx.DiGraph[str] | HasGraph", path: str | Path, title: str = TITLE) -> None:
    """Draw a step into an ``.svg`` file.

    A box for every block of the model and every phase of the step, with what is in it: operators,
    floating-point operations, and the shapes of Kronecker factors. Equal blocks that follow each other are
    one box. Layers with Kronecker factors are highlighted. An arrow is a value that one box makes and
    another reads; pointing at it says how many, and how large they are.

    Args:
        graph: from :func:`~thor_fx.graphs.to_networkx`; or a report that has one.
        path: of the file to write.
        title: above the picture.

    Raises:
        ValueError: ``path`` does not end in ``.svg``, or there is no operator in ``graph``.
    """
    if Path(path).suffix.lower() != ".svg":
        raise ValueError(f"path must end in .svg, got {str(path)!r}: convert the .svg to other formats")
    text = picture(graph if isinstance(graph, nx.DiGraph) else graph.graph, title)
    Path(path).write_text(text, encoding="utf-8")


def picture(graph: "nx.DiGraph[str]", title: str = TITLE) -> str:
    """The picture as SVG text.

    Raises:
        ValueError: there is no operator in ``graph``.
    """
    found, position = blocks(graph)
    if not found:
        raise ValueError("graph has no operator to draw: give that of a step, such as explain(...).graph")
    edges = sorted(block_edges(graph, position), key=lambda edge: abs(edge.target[0] - edge.source[0]))
    layout, lines = _lines(found, edges)
    style = files(__package__).joinpath("picture.css").read_text(encoding="utf-8")
    size = f'width="{layout.width:g}" height="{layout.height:g}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {layout.width:g} {layout.height:g}">',
        f"<style>{style}</style>",
        svg.heads(map(color, layout.columns)),
        *_heading(graph, layout, title),
        *(part for block, band in zip(found, layout.bands, strict=True) for part in _band(block, band)),
        *lines,
        *(part for (i, p), r in layout.boxes.items() for part in _box(found[i], layout.bands[i], r, p)),
        "</svg>\n",
    ]
    return "\n".join(parts)


def _lines(found: Sequence[Block], edges: Sequence[Edge]) -> tuple[Layout, list[str]]:
    """The layout with room for all arrows, and the arrows."""
    phases = phases_of(found)
    boxes = {(i, phase) for i, block in enumerate(found) for phase in block.phases}
    kinds = [kind_of(edge, phases, boxes) for edge in edges]
    crossed = (gap for edge, kind in zip(edges, kinds, strict=True) for gap in gaps_of(edge, phases, kind))
    layout = arrange(found, Counter(crossed))
    router = Router(layout)
    lines = []
    for edge, kind in zip(edges, kinds, strict=True):
        style = "edge" if kind in {"down", "across"} else "edge far"
        hint = f"{counted(edge.values, 'value')}, {scaled(edge.bytes, 'B')}"
        width = min(3.5, 0.8 + math.log10(1 + edge.bytes) / 4)
        lines.append(svg.arrow(router.path(edge, kind), color(edge.source[1]), width, style, hint))
    return layout, lines


def _heading(graph: "nx.DiGraph[str]", layout: Layout, title: str) -> list[str]:
    """The title, what the marks mean, and a sum for every phase."""
    operators = [facts for _, facts in graph.nodes(data=True) if facts["op"] == "call_function"]
    work = scaled(sum(facts["flops"] for facts in operators), "FLOP")
    parts = [
        svg.text(MARGIN, 40, title, "title"),
        svg.text(MARGIN, 62, f"{counted(len(operators), 'operator')}, {work} in products", "faint"),
        svg.diamond(MARGIN + 6, 98),
        svg.text(MARGIN + 20, 102, "a layer with Kronecker factors", "faint"),
        svg.text(MARGIN, 120, "arrows: values that pass between boxes", "faint"),
    ]
    for phase, x in layout.columns.items():
        own = [facts for facts in operators if facts["phase"] == phase]
        work = scaled(sum(facts["flops"] for facts in own), "FLOP")
        parts.append(svg.rectangle(Rectangle(x, 90, 14, 14), "", color(phase)))
        parts.append(svg.text(x + 22, 102, phase or "phase not marked", "column"))
        parts.append(svg.text(x + 22, 120, f"{counted(len(own), 'operator')}, {work}", "faint"))
    return parts


def _band(block: Block, band: Rectangle) -> list[str]:
    """The names at the left: of the block, and of the modules in it."""
    parts = [svg.rectangle(band, "band")]
    for i, row in enumerate(block.rows):
        parts += _name(row, block.title if block.is_plain else "", row_baseline(block, band, i), band)
    if not block.is_plain:
        parts.append(svg.text(MARGIN + 12, band.y + 21, block.title, "block"))
    if len(block.names) > 1:
        badge = Rectangle(MARGIN + NAMES - 50, band.y + 6, 42, 19)
        count = f"\N{MULTIPLICATION SIGN}{len(block.names)}"
        parts += [
            svg.rectangle(badge, "badge"),
            svg.text(badge.middle[0], band.y + 20, count, "badge-text", "middle"),
        ]
    return parts


def _name(row: Row, title: str, y: float, band: Rectangle) -> list[str]:
    name = title or row.name
    name = name if len(name) <= NAME_WIDTH else f"{name[: NAME_WIDTH - 1]}\N{HORIZONTAL ELLIPSIS}"
    shapes = ", ".join(times(shape) for shape in row.params.values())
    parts = []
    if row.has_site:
        parts.append(svg.rectangle(Rectangle(MARGIN + 2, y - 15, band.width - 4, LINE - 1), "site"))
        parts.append(svg.diamond(MARGIN + (NAMES - 4 if title else 16), y - 5))
    style = "block" if title else "faint" if row.name == OWN else ""
    parts.append(svg.text(MARGIN + (12 if title else 28), y, name, style))
    if len(shapes) + len(name) <= NAME_WIDTH + 2:
        parts.append(svg.text(MARGIN + NAMES - 14, y, shapes, "faint", "end"))
    return parts


def _box(block: Block, band: Rectangle, box: Rectangle, phase: Phase | None) -> list[str]:
    """What a phase does in a block."""
    parts = [svg.rectangle(box, "box", color(phase))]
    cells = [(i, row, row.cells[phase]) for i, row in enumerate(block.rows) if phase in row.cells]
    if not block.is_plain:
        total = counted(sum(cell.operators for *_, cell in cells), "operator")
        each = f"{total} in each" if len(block.names) > 1 else total
        parts.append(svg.text(box.x + 10, band.y + 21, each, "number"))
    for i, row, cell in cells:
        y = row_baseline(block, band, i)
        what = (_factors(row) if phase == "factors" else "") or counted(cell.operators, "op")
        parts.append(svg.text(box.x + 10, y, what, "number"))
        if cell.flops:
            parts.append(svg.text(box.right - 10, y, scaled(cell.flops, "FLOP"), "number", "end"))
    return parts


def _factors(row: Row) -> str:
    texts = [f"{side} {times(shape)}" for side, shape in row.factors]
    more = f" +{len(texts) - 2}" if len(texts) > 2 else ""
    return ", ".join(texts[:2]) + more
