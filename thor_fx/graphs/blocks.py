"""A network in blocks: what is drawn as one box, equal blocks that follow each other together.

A *block* is an entry of a list of modules (``layers.3``), or a module without such lists below it. Its *rows*
are the modules in it.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import networkx as nx

from ..passes.outputs import Factor, Frozen, Param
from ..passes.phases import Phase
from .live_ranges import memory_of
from .places import places

MOST_ROWS = 16
OUTSIDE = "outside of modules"
OWN = "own operators"


@dataclass(frozen=True)
class Cell:
    """What one phase of a step does in a row."""

    operators: int
    flops: int
    bytes: int


@dataclass(frozen=True)
class Row:
    """One module of a block.

    Attributes:
        name: its path in the block.
        cells: what is computed, by phase.
        params: the shapes of its parameters, by name.
        factors: the shapes of its Kronecker factors, by side; of several layers, one after the other.
        has_site: whether it has a preconditioned weight.
    """

    name: str
    cells: Mapping[Phase | None, Cell]
    params: Mapping[str, tuple[int, ...]]
    factors: tuple[tuple[str, tuple[int, ...]], ...]
    has_site: bool


@dataclass(frozen=True)
class Block:
    """One box, or several equal ones.

    Attributes:
        names: the paths of the blocks.
        rows: what is in each of them.
        phases: that it has nodes in.
    """

    names: tuple[str, ...]
    rows: tuple[Row, ...]
    phases: frozenset[Phase | None]

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing to list in it: it is one module, and one box."""
        return len(self.names) == 1 and [row.name for row in self.rows] == [OWN]

    @property
    def title(self) -> str:
        """Its path; of equal blocks, the first and the last."""
        first, last = self.names[0] or "(model)", self.names[-1].rpartition(".")[2]
        return first if len(self.names) == 1 else f"{first} \N{HORIZONTAL ELLIPSIS} {last}"


def blocks(graph: nx.DiGraph) -> tuple[tuple[Block, ...], dict[str, int]]:
    """The blocks of a network in the order of forward, and the position of the block of every operator.

    Operators that no output needs are left out: passes leave some behind, and compilers drop them.
    """
    outputs = {node for node, op in graph.nodes(data="op") if op == "output"}
    needed = set.union(set(), *(nx.ancestors(graph, node) for node in outputs)) if outputs else set(graph)
    place = {node: path for node, path in places(graph).items() if node in needed}
    lists = _lists(path for path in place.values() if path is not None)
    home = _homes(graph, place, lists)
    inside: dict[str, list[str]] = {name: [] for name in _in_order(graph, home)}
    for node, name in home.items():
        if name in inside:
            inside[name].append(node)
    found: list[Block] = []
    position: dict[str, int] = {}
    forms: list[object] = []
    for name, nodes in inside.items():
        rows, form = _rows(graph, name, nodes, place)
        if found and _follow(found[-1].names[-1], name) and form == forms[-1]:
            found[-1] = Block((*found[-1].names, name), found[-1].rows, found[-1].phases)
        else:
            phases = frozenset(
                graph.nodes[n]["phase"] for n in nodes if graph.nodes[n]["op"] != "placeholder"
            )
            found.append(Block((name,), rows, phases))
            forms.append(form)
        position |= dict.fromkeys(nodes, len(found) - 1)
    return tuple(found), position


def _homes(graph: nx.DiGraph, place: Mapping[str, str | None], lists: set[str]) -> dict[str, str]:
    """The block of every node: of a view between blocks, that of what it is a view of."""
    home: dict[str, str] = {}
    for node, path in place.items():
        source = memory_of(graph, node)
        between = (path is None or path in lists) and graph.nodes[source]["op"] == "call_function"
        home[node] = home[source] if between and source != node else block_of(path, lists)
    return home


def block_of(path: str | None, lists: set[str]) -> str:
    """The name of the block that a module lies in.

    Example:
        >>> lists = {"", "h"}  # modules with a numbered module somewhere below
        >>> [block_of(path, lists) for path in ("embed", "h.0.attn.q", "h", None)]
        ['embed', 'h.0', 'h', 'outside of modules']
    """
    if path is None:
        return OUTSIDE
    names = path.split(".") if path else []
    for length in range(len(names) + 1):
        prefix = ".".join(names[:length])
        if length and (names[length - 1].isdigit() or prefix not in lists):
            return prefix
    return path


def _lists(paths: Iterable[str]) -> set[str]:
    """The modules with a numbered module below them; the model itself always counts."""
    found = {""}
    for path in set(paths):
        names = path.split(".")
        last = max((i for i, name in enumerate(names) if name.isdigit()), default=0)
        found.update(".".join(names[:length]) for length in range(last + 1))
    return found


def _in_order(graph: nx.DiGraph, home: Mapping[str, str]) -> list[str]:
    """The blocks that compute anything: as forward reaches them, then the others; the loss at the end."""
    operators = [n for n in home if graph.nodes[n]["op"] == "call_function"]
    forward = [n for n in operators if graph.nodes[n]["phase"] in {"forward", None}]
    names = dict.fromkeys(home[node] for node in forward + operators)
    return sorted(names, key=lambda name: name == OUTSIDE)


def _follow(one: str, other: str) -> bool:
    """Whether two blocks are neighbours in a list of modules."""
    (parent, _, number), (other_parent, _, next_) = one.rpartition("."), other.rpartition(".")
    return parent == other_parent and number.isdigit() and next_.isdigit() and int(next_) == int(number) + 1


def _rows(
    graph: nx.DiGraph, name: str, nodes: list[str], place: Mapping[str, str | None]
) -> tuple[tuple[Row, ...], object]:
    """The rows of a block, and what tells it from blocks that are not equal to it."""
    inner = {node: _inner(place[node] or "", name) for node in nodes}
    if len(set(inner.values())) > MOST_ROWS:
        inner = {node: path.split(".")[0] for node, path in inner.items()}
    order = sorted(nodes, key=lambda node: graph.nodes[node]["op"] == "placeholder")
    by_row: dict[str, list[str]] = {}
    for node in order:
        by_row.setdefault(inner[node], []).append(node)
    rows = tuple(_row(row, [graph.nodes[node] for node in own]) for row, own in by_row.items())
    facts = [(inner[node], graph.nodes[node]) for node in nodes]
    form = Counter(
        (row, f["op"] == "placeholder" or f["operator"], f["phase"], f["shape"]) for row, f in facts
    )
    return rows, form


def _inner(path: str, block: str) -> str:
    """The row of a node: its module, as it is called in the block; a view may come from outside of it."""
    within = not block or path.startswith(block + ".")
    return path.removeprefix(block).lstrip(".") or OWN if within else OWN


def _row(name: str, nodes: list[dict[str, Any]]) -> Row:
    computed = [facts for facts in nodes if facts["op"] != "placeholder"]
    phases = dict.fromkeys(facts["phase"] for facts in computed)
    descriptors = [(descriptor, facts) for facts in nodes for descriptor in facts["descriptors"]]
    params = {d.name.rpartition(".")[2]: f["shape"] for d, f in descriptors if isinstance(d, Param | Frozen)}
    factors = [(d.side, f["shape"]) for d, f in descriptors if isinstance(d, Factor)]
    cells = {phase: _cell([f for f in computed if f["phase"] == phase]) for phase in phases}
    return Row(name, cells, params, tuple(sorted(factors)), any(facts["site"] for facts in nodes))


def _cell(nodes: list[dict[str, Any]]) -> Cell:
    return Cell(len(nodes), sum(f["flops"] for f in nodes), sum(f["bytes"] for f in nodes if not f["view"]))
