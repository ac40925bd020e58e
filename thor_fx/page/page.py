"""What the page shows, and how it is written."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import networkx as nx

from ..graphs.colors import COLORS, UNMARKED
from ..kernels import Kernel
from ..passes.phases import PHASES
from ..passes.stages import Stage
from ..step_cost import StepCost
from .costs import step_facts
from .diffs import stage_facts
from .plots import plot_facts
from .timeline import timeline
from .tree import tree

SCRIPTS = ("elements.js", "table.js", "tree.js", "stages.js", "costs.js", "timeline.js", "page.js")

COLUMNS = ("parameter", "shape", "bytes", "MFLOP", "treatment")
Row = tuple[str, str, str, str, str]
"""Of the table: the text of its columns."""


@dataclass(frozen=True)
class Page:
    """What the page shows; what is empty is left out.

    Attributes:
        title: at its top.
        table_rows: one for every parameter.
        summary: some lines of text under the title.
        graph: of the step, from :func:`thor_fx.graphs.to_networkx`.
        stages: the passes, in the order in which they ran.
        steps: what each kind of step costs.
        kernels: what each kind of step runs.
        plots: SVG text by title.
    """

    title: str
    table_rows: Sequence[Row]
    summary: str
    graph: "nx.DiGraph[str]"
    stages: Sequence[Stage] = ()
    steps: Sequence[StepCost] = ()
    kernels: Mapping[str, Sequence[Kernel]] = field(default_factory=dict)
    plots: Mapping[str, str] = field(default_factory=dict)


def write_page(path: str | Path, page: Page) -> None:
    """Write a page into one ``.html`` file, to be opened in a browser.

    Args:
        path: of the file.
        page: what it shows.

    Raises:
        ValueError: ``path`` does not end in ``.html``, or a row of the table has not five columns.
    """
    if Path(path).suffix.lower() not in {".html", ".htm"}:
        raise ValueError(f"path must end in .html, got {str(path)!r}")
    for row in page.table_rows:
        if len(row) != len(COLUMNS):
            raise ValueError(f"a row of table_rows must be ({', '.join(COLUMNS)}), got {row!r}")
    Path(path).write_text(html(page), encoding="utf-8")


def html(page: Page) -> str:
    """The page as text: the template with style, scripts and content in their places."""
    parts = {
        "title": escape(page.title),
        "style": _read("page.css"),
        "content": as_script(content(page)),
        "scripts": "\n".join(_read(name) for name in SCRIPTS),
    }
    before, *rest = _read("page.html").split("{{")
    places = (place.split("}}", maxsplit=1) for place in rest)
    return before + "".join(parts[name] + text for name, text in places)


def content(page: Page) -> dict[str, Any]:
    """What the scripts of the page read."""
    return {
        "title": page.title,
        "summary": page.summary,
        "rows": [[str(cell) for cell in row] for row in page.table_rows],
        "tree": tree(page.graph),
        "phases": PHASES,
        "colors": {**COLORS, "": UNMARKED},
        "stages": [stage_facts(stage) for stage in page.stages],
        "steps": [step_facts(step) for step in page.steps],
        "kernels": [timeline(kind, kernels) for kind, kernels in page.kernels.items() if kernels],
        "plots": plot_facts(page.plots),
    }


def as_script(value: Any) -> str:
    """JSON with no letter that could end the element of the page that it is put into."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def _read(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
