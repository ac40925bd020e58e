"""Where everything is in the picture: a band for every block, a column for every phase.

Between columns is a *gap* with *tracks*, one for each line that goes up or down there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..passes.phases import PHASES, Phase
from .block_edges import Box
from .blocks import Block

MARGIN, HEAD, LINE, GAP = 28, 30, 21, 34
NAMES, LEAST_GAP, TRACK = 330, 40, 7
COLUMN, FACTORS = 178, 258
TOP = 138


@dataclass(frozen=True)
class Rectangle:
    """In pixels; ``y`` grows downwards."""

    x: float
    y: float
    width: float
    height: float

    @property
    def right(self) -> float:
        """Of its right side."""
        return self.x + self.width

    @property
    def bottom(self) -> float:
        """Of its lower side."""
        return self.y + self.height

    @property
    def middle(self) -> tuple[float, float]:
        """Its centre."""
        return self.x + self.width / 2, self.y + self.height / 2


@dataclass(frozen=True)
class Layout:
    """Where everything is.

    Attributes:
        bands: of every block.
        boxes: of every block in every phase that it has operators in.
        columns: the phases from left to right, and where they start.
        gaps: where the gap at the right of each column starts.
        width: of the picture.
        height: of the picture.
    """

    bands: tuple[Rectangle, ...]
    boxes: Mapping[Box, Rectangle]
    columns: Mapping[Phase | None, float]
    gaps: Sequence[float]
    width: float
    height: float


def phases_of(blocks: Sequence[Block]) -> list[Phase | None]:
    """The phases that any block has operators in, in the order of a step."""
    there = {phase for block in blocks for phase in block.phases}
    return [phase for phase in (*PHASES, None) if phase in there]


def arrange(blocks: Sequence[Block], tracks: Mapping[int, int]) -> Layout:
    """Put the blocks below each other and the phases beside each other.

    Args:
        blocks: from top to bottom.
        tracks: how many lines go up or down in the gap at the right of a column, by its position.
    """
    columns, gaps = {}, []
    x = float(MARGIN + NAMES + 12)
    for i, phase in enumerate(phases_of(blocks)):
        columns[phase] = x
        gaps.append(x + _width(phase))
        x = gaps[-1] + max(LEAST_GAP, TRACK * (tracks.get(i, 0) + 3))
    bands: list[Rectangle] = []
    y = float(TOP)
    for block in blocks:
        bands.append(Rectangle(MARGIN, y, x - MARGIN, _height(block)))
        y = bands[-1].bottom + GAP
    boxes = {
        (i, phase): Rectangle(columns[phase], band.y + 4, _width(phase), band.height - 8)
        for i, (block, band) in enumerate(zip(blocks, bands, strict=True))
        for phase in block.phases
    }
    return Layout(tuple(bands), boxes, columns, gaps, x + MARGIN, y - GAP + MARGIN)


def _width(phase: Phase | None) -> float:
    return FACTORS if phase == "factors" else COLUMN


def _height(block: Block) -> float:
    return LINE * len(block.rows) + (12 if block.is_plain else HEAD + 8)


def row_baseline(block: Block, band: Rectangle, row: int) -> float:
    """Where the text of a row stands."""
    return band.y + (6 if block.is_plain else HEAD) + LINE * row + 15
