"""A small graph as SVG, node by node: operators from top to bottom, and what changed between two of them.

thor_fx draws steps in boxes, one for a module and a phase; a pass changes single nodes, so here every node
is a box of its own.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from html import escape

import networkx as nx

from thor_fx.graphs.colors import color

WIDTH, HEIGHT = 98, 38  # of a box
GAP_X, GAP_Y = 10, 24
MARGIN, HEAD = 16, 46
NARROW = 0.62  # of a box: the distance of a waypoint from what is at its left

Place = tuple[float, float]
STYLE = """
text { font: 12px Helvetica, Arial, sans-serif; fill: #1b1b1b; }
.title { font-size: 15px; font-weight: bold; }
.shape { font-size: 10.5px; fill: #555; }
.result { font-size: 11px; font-weight: bold; fill: #00543d; }
.edge { fill: none; stroke: #888; stroke-width: 1.2; }
.node { fill-opacity: .12; stroke-width: 1.2; }
.new { stroke-width: 3; fill-opacity: .3; }
.gone { stroke-dasharray: 5 3; fill-opacity: 0; }
"""
MARKER = (
    '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
    'orient="auto">'
    '<path d="M0 0L8 4L0 8Z" fill="#888"/></marker></defs>'
)


@dataclass(frozen=True)
class Panel:
    """One of the graphs of a picture.

    Attributes:
        title: above it.
        graph: nodes have ``label``, ``shape``, ``phase`` and ``results``, all but the first may be empty.
        marked: the nodes that the other graph has not.
        style: how they are marked: ``"new"`` or ``"gone"``.
    """

    title: str
    graph: nx.DiGraph
    marked: Collection[str] = ()
    style: str = "new"


def picture(panels: Sequence[Panel], *, stacked: bool = False) -> str:
    """Graphs beside each other, or below each other, as SVG text."""
    parts: list[str] = []
    x, y, width, height = float(MARGIN), 0.0, 0.0, 0.0
    for panel in panels:
        routed, places = arrange(panel.graph)
        there = {name: (x + left, y + HEAD + top) for name, (left, top) in places.items()}
        parts += drawn(panel, routed, there, (x, y + 24))
        width = max(width, *(left for left, _ in there.values()))
        height = max(height, *(top for _, top in there.values()))
        if stacked:
            y = height + HEIGHT + 2 * MARGIN
        else:
            x = width + WIDTH + 3 * MARGIN
    width, height = width + WIDTH + MARGIN, height + HEIGHT + 2 * MARGIN
    size = f'width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
    frame = f'<rect width="{width:g}" height="{height:g}" fill="#fff"/>'
    return "\n".join([head, f"<style>{STYLE}</style>{MARKER}{frame}", *parts, "</svg>\n"])


def arrange(graph: nx.DiGraph) -> tuple[nx.DiGraph, dict[str, Place]]:
    """The graph with a waypoint in every row that an edge passes, and the top left corners of all.

    Parts that do not hang together stand beside each other, single nodes below each other.
    """
    whole, places, left = nx.DiGraph(), {}, 0.0
    for part in sorted(nx.weakly_connected_components(graph), key=len, reverse=True):
        if len(part) == 1:
            continue
        routed, found = arrange_part(part_of(graph, part))
        whole = nx.compose(whole, routed)
        places |= {name: (left + x, y) for name, (x, y) in found.items()}
        left = max(x for x, _ in places.values()) + WIDTH + 2 * GAP_X
    alone = [name for name in graph if graph.degree(name) == 0]
    return whole, places | {name: (left, i * (HEIGHT + GAP_Y)) for i, name in enumerate(alone)}


def part_of(graph: nx.DiGraph, names: Collection[str]) -> nx.DiGraph:
    """Some of the nodes, in their order (that of ``subgraph`` differs from run to run)."""
    part = nx.DiGraph()
    part.add_nodes_from((name, facts) for name, facts in graph.nodes(data=True) if name in names)
    part.add_edges_from(edge for edge in graph.edges if set(edge) <= set(names))
    return part


def arrange_part(graph: nx.DiGraph) -> tuple[nx.DiGraph, dict[str, Place]]:
    """Rows by the longest path; in a row, near what is read and what reads."""
    rows = pulled_down(graph, [list(row) for row in nx.topological_generations(graph)])
    routed = with_waypoints(graph, rows)
    order = {name: float(i) for row in rows for i, name in enumerate(row)}
    for sweep in range(12):
        down = sweep % 2 == 0
        near = routed.predecessors if down else routed.successors
        for row in rows if down else rows[::-1]:
            wanted = {name: mean([order[other] for other in near(name)], order[name]) for name in row}
            row.sort(key=wanted.__getitem__)
            order |= spread(row, wanted)
    first, across, below = min(order.values()), WIDTH + GAP_X, HEIGHT + GAP_Y
    return routed, {n: ((order[n] - first) * across, i * below) for i, row in enumerate(rows) for n in row}


def with_waypoints(graph: nx.DiGraph, rows: list[list[str]]) -> nx.DiGraph:
    """Edges that pass rows in pieces, from waypoint to waypoint; all that leave a node share theirs."""
    level = {name: i for i, row in enumerate(rows) for name in row}
    routed = nx.DiGraph()
    routed.add_nodes_from(graph.nodes(data=True))
    for source, user in graph.edges:
        before = source
        for i in range(level[source] + 1, level[user]):
            point = f"{source} past {i}"
            if point not in routed:
                rows[i].append(point)
            routed.add_edge(before, point)
            before = point
        routed.add_edge(before, user)
    return routed


def spread(row: Sequence[str], wanted: dict[str, float]) -> dict[str, float]:
    """Places in a row, at least one box apart, around where they are wanted."""
    found: dict[str, float] = {}
    for name in row:
        left = max(found.values(), default=-1e9) + (NARROW if " past " in name else 1.0)
        found[name] = max(wanted[name], left)
    shift = mean([found[name] - wanted[name] for name in row], 0.0)
    return {name: place - shift for name, place in found.items()}


def pulled_down(graph: nx.DiGraph, rows: list[list[str]]) -> list[list[str]]:
    """Inputs stand right above the first that reads them."""
    level = {name: i for i, row in enumerate(rows) for name in row}
    for name in graph:
        if graph.in_degree(name) == 0 and graph.out_degree(name):
            level[name] = min(level[user] for user in graph.successors(name)) - 1
    found: list[list[str]] = [[] for _ in rows]
    for name, i in level.items():
        found[i].append(name)
    return [row for row in found if row]


def mean(values: Sequence[float], default: float) -> float:
    """The mean, or of nothing the default."""
    return sum(values) / len(values) if values else default


def drawn(panel: Panel, routed: nx.DiGraph, places: dict[str, Place], title: Place) -> list[str]:
    """The edges and boxes of one graph."""
    parts = [f'<text x="{title[0]:g}" y="{title[1]:g}" class="title">{escape(panel.title)}</text>']
    parts += [edge(source, user, places, panel.graph) for source, user in routed.edges]
    for name, facts in panel.graph.nodes(data=True):
        parts += box(facts, places[name], panel.style if name in panel.marked else "")
    return parts


def edge(source: str, user: str, places: dict[str, Place], graph: nx.DiGraph) -> str:
    """A curve from below one box to above another, or a piece of it."""
    (x, y), (to_x, to_y) = places[source], places[user]
    x, y, to_x = x + WIDTH / 2, y + HEIGHT, to_x + WIDTH / 2
    bend = (to_y - y) / 2
    past = "" if source in graph else f"M{x:.1f} {y - HEIGHT:.1f}L{x:.1f} {y:.1f}"
    head = ' marker-end="url(#head)"' if user in graph else ""
    start = past or f"M{x:.1f} {y:.1f}"
    curve = f"C{x:.1f} {y + bend:.1f} {to_x:.1f} {to_y - bend:.1f} {to_x:.1f} {to_y:.1f}"
    return f'<path class="edge" d="{start}{curve}"{head}/>'


def box(facts: dict[str, object], place: tuple[float, float], style: str) -> list[str]:
    """A node: what it computes, its shape, and as what it is returned."""
    (x, y), ink = place, color(facts["phase"])  # type: ignore[arg-type]
    corner = HEIGHT / 2 if facts["input"] else 4
    size = f'width="{WIDTH}" height="{HEIGHT}" rx="{corner:g}"'
    parts = [
        f'<rect x="{x:.1f}" y="{y:.1f}" {size} class="node {style}" fill="{ink}" stroke="{ink}"/>',
        centred(x, y + (16 if facts["shape"] else 23), str(facts["label"]), ""),
        centred(x, y + 31, str(facts["shape"]), "shape"),
    ]
    return [*parts, centred(x, y + HEIGHT + 13, str(facts["results"]), "result")]


def centred(x: float, y: float, what: str, style: str) -> str:
    """A line of text in the middle of a box."""
    place = f'x="{x + WIDTH / 2:.1f}" y="{y:.1f}" text-anchor="middle"'
    return f'<text {place} class="{style}">{escape(what)}</text>' if what else ""
