"""The lines of the picture: from box to box, around the boxes between them.

A line is one of four kinds:

* ``down``: to the next box of its column, straight up or down;
* ``across``: to the same block's box in the next column, straight;
* ``beside``: up or down in one gap between columns, to a box of either column;
* ``over``: to a column further on, above the band of its target.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Literal

from ..passes.phases import Phase
from .block_edges import Box, Edge
from .layout import TRACK, Layout, Rectangle

Kind = Literal["down", "across", "beside", "over"]
HEAD = 7  # the length of an arrow's head
CORNER = 5


def kind_of(edge: Edge, phases: Sequence[Phase | None], boxes: set[Box]) -> Kind:
    """The kind of a line."""
    (block, phase), (other, other_phase) = edge.source, edge.target
    distance = abs(phases.index(phase) - phases.index(other_phase))
    if distance > 1:
        return "over"
    if distance == 1:
        return "across" if block == other else "beside"
    between = range(min(block, other) + 1, max(block, other))
    return "beside" if any((i, phase) in boxes for i in between) else "down"


def gaps_of(edge: Edge, phases: Sequence[Phase | None], kind: Kind) -> list[int]:
    """The gaps that a line needs a track in, by the column at the left of each."""
    start, end = phases.index(edge.source[1]), phases.index(edge.target[1])
    if kind == "beside":
        return [min(start, end)]
    if kind == "over":
        return [start, end - 1] if start < end else [start - 1, end]
    return []


class Router:
    """Gives every line tracks and ends of its own, in the order in which they are asked for."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._phases = list(layout.columns)
        self._tracks: Counter[int] = Counter()
        self._ends: defaultdict[tuple[Box, str, str], int] = defaultdict(int)
        self._over: Counter[int] = Counter()

    def path(self, edge: Edge, kind: Kind) -> str:
        """A line in the notation of SVG."""
        source, target = self._layout.boxes[edge.source], self._layout.boxes[edge.target]
        if kind == "down":
            return _vertical(source, target)
        start, end = self._phases.index(edge.source[1]), self._phases.index(edge.target[1])
        from_right, to_left = start <= end, start < end
        x = source.right if from_right else source.x
        end_x = target.x - HEAD if to_left else target.right + HEAD
        if kind == "across":
            y = source.middle[1]
            return f"M{x:.1f} {y:.1f}H{end_x:.1f}"
        y = self._end(edge.source, source, from_right, edge.target[0] - edge.source[0])
        end_y = self._end(edge.target, target, not to_left, edge.source[0] - edge.target[0])
        points = [(x, y)]
        gaps = [self._track(gap) for gap in gaps_of(edge, self._phases, kind)]
        if kind == "over":
            block = edge.target[0]
            above = self._layout.bands[block].y - 6 - 5 * (self._over[block] % 6)
            self._over[block] += 1
            points += [(gaps[0], y), (gaps[0], above), (gaps[1], above), (gaps[1], end_y)]
        else:
            points += [(gaps[0], y), (gaps[0], end_y)]
        return rounded([*points, (end_x, end_y)])

    def _track(self, gap: int) -> float:
        self._tracks[gap] += 1
        return self._layout.gaps[gap] + TRACK * (self._tracks[gap] + 0.5)

    def _end(self, at: Box, box: Rectangle, right: bool, direction: int) -> float:
        """Where on a side of a box a line ends: above its middle if it goes up, else below."""
        key = at, "right" if right else "left", "up" if direction < 0 else "down"
        self._ends[key] += 1
        offset = min(0.12 + 0.06 * self._ends[key], 0.44) * box.height
        return box.middle[1] + (-offset if direction < 0 else offset)


def _vertical(source: Rectangle, target: Rectangle) -> str:
    down = source.y < target.y
    x = source.x + (0.4 if down else 0.6) * source.width
    start, end = (source.bottom, target.y - HEAD) if down else (source.y, target.bottom + HEAD)
    return f"M{x:.1f} {start:.1f}V{end:.1f}"


def rounded(points: Sequence[tuple[float, float]]) -> str:
    """A line along the points, which goes round corners.

    Example:
        >>> rounded([(0, 0), (20, 0), (20, 30)])
        'M0.0 0.0L15.0 0.0Q20.0 0.0 20.0 5.0L20.0 30.0'
    """
    parts = ["M{:.1f} {:.1f}".format(*points[0])]
    for before, corner, after in zip(points, points[1:], points[2:], strict=False):
        near, far = _toward(corner, before), _toward(corner, after)
        parts.append("L{:.1f} {:.1f}Q{:.1f} {:.1f} {:.1f} {:.1f}".format(*near, *corner, *far))
    return "".join([*parts, "L{:.1f} {:.1f}".format(*points[-1])])


def _toward(point: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    """A place near ``point`` on the way to ``other``."""
    (x, y), (other_x, other_y) = point, other
    length = abs(other_x - x) + abs(other_y - y)
    share = min(CORNER, length / 2) / length if length else 0
    return x + share * (other_x - x), y + share * (other_y - y)
