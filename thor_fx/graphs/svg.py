"""The marks that the picture is made of, as SVG text."""

from collections.abc import Iterable
from html import escape

from .layout import Rectangle


def text(x: float, y: float, what: str, style: str = "", anchor: str = "start") -> str:
    """A line of text that stands at ``y``."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{style}">{escape(what)}</text>'


def rectangle(r: Rectangle, style: str, ink: str = "") -> str:
    """A rectangle, filled and outlined in ``ink`` where the style sheet does not say how."""
    place = f'x="{r.x:.1f}" y="{r.y:.1f}" width="{r.width:.1f}" height="{r.height:.1f}"'
    inked = f' fill="{ink}" stroke="{ink}"' if ink else ""
    return f'<rect {place} rx="6" class="{style}"{inked}/>'


def diamond(x: float, y: float) -> str:
    """The mark of a layer with Kronecker factors."""
    return f'<path class="mark" d="M{x} {y - 5}l5 5l-5 5l-5 -5Z"/>'


def arrow(path: str, ink: str, width: float, style: str, hint: str) -> str:
    """A line with a head; a browser shows ``hint`` where the pointer is on it."""
    stroke = f'stroke="{ink}" stroke-width="{width:.1f}" marker-end="url(#{ink[1:]})"'
    return f'<path d="{path}" class="{style}" {stroke}><title>{escape(hint)}</title></path>'


def heads(inks: Iterable[str]) -> str:
    """The heads of arrows, to be defined once."""
    size = 'viewBox="0 0 10 10" refX="3" refY="5" markerWidth="10" markerHeight="10"'
    marks = (
        f'<marker id="{ink[1:]}" {size} markerUnits="userSpaceOnUse" orient="auto">'
        f'<path d="M0 0L10 5L0 10Z" fill="{ink}"/></marker>'
        for ink in inks
    )
    return f"<defs>{''.join(marks)}</defs>"
