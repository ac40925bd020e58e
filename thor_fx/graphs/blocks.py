"""A network in blocks: what is drawn as one box, equal blocks that follow each other together.

A *block* is an entry of a list of modules (``layers.3``), or a module without such lists below it. Its *rows*
are the modules in it.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import networkx as nx

from ..passes.phases import Phase
from .live_ranges import memory_of
from .places import places
from .rows import OWN, Row, Shapes, factors_of, rows_of, runs

OUTSIDE = "outside of modules"


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


def blocks(graph: "nx.DiGraph[str]") -> tuple[tuple[Block, ...], dict[str, int]]:
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
    inner = {node: inside_of(home[node], path or "") for node, path in place.items()}
    factors: dict[str, dict[str, Shapes]] = {}
    for path, shapes in factors_of(graph).items():
        name = block_of(path, lists)
        factors.setdefault(name, {})[inside_of(name, path)] = shapes
    found: list[Block] = []
    position: dict[str, int] = {}
    forms: list[object] = []
    for name, nodes in inside.items():
        paths = {node: inner[node] for node in nodes}
        form = _form(graph, paths)
        if found and _follow(found[-1].names[-1], name) and form == forms[-1]:
            found[-1] = replace(found[-1], names=(*found[-1].names, name))
        else:
            phases = frozenset(graph.nodes[n]["phase"] for n in nodes if runs(graph.nodes[n]))
            found.append(Block((name,), rows_of(graph, paths, factors.get(name, {})), phases))
            forms.append(form)
        position |= dict.fromkeys(nodes, len(found) - 1)
    return tuple(found), position


def _form(graph: "nx.DiGraph[str]", paths: Mapping[str, str]) -> object:
    """What equal blocks have in common."""
    facts = [(path, graph.nodes[node]) for node, path in paths.items()]
    return Counter((path, f["operator"] if runs(f) else f["op"], f["phase"], f["shape"]) for path, f in facts)


def inside_of(block: str, path: str) -> str:
    """The path of a module in its block; of what comes from outside of the block, that of the block.

    Example:
        >>> inside_of("h.0", "h.0.attn.q"), inside_of("h.0", "h.0"), inside_of("h.0", "h")
        ('attn.q', '', '')
    """
    if not block:
        return path
    return path.removeprefix(block + ".") if path.startswith(block + ".") else ""


def _homes(graph: "nx.DiGraph[str]", place: Mapping[str, str | None], lists: set[str]) -> dict[str, str]:
    """The block of every node: of a view between blocks, that of what it is a view of."""
    home: dict[str, str] = {}
    for node, path in place.items():
        source = memory_of(graph, node)
        between = (path is None or path in lists) and runs(graph.nodes[source])
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


def _in_order(graph: "nx.DiGraph[str]", home: Mapping[str, str]) -> list[str]:
    """The blocks that compute anything: as forward reaches them, then the others; the loss at the end."""
    operators = [n for n in home if runs(graph.nodes[n])]
    forward = [n for n in operators if graph.nodes[n]["phase"] in {"forward", None}]
    names = dict.fromkeys(home[node] for node in forward + operators)
    return sorted(names, key=lambda name: name == OUTSIDE)


def _follow(one: str, other: str) -> bool:
    """Whether two blocks are neighbours in a list of modules."""
    (parent, _, number), (other_parent, _, next_) = one.rpartition("."), other.rpartition(".")
    return parent == other_parent and number.isdigit() and next_.isdigit() and int(next_) == int(number) + 1
