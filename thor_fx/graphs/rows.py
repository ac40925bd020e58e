"""The rows of a block: what each of its modules does in each phase of a step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx

from ..passes.outputs import Factor, Frozen, Param
from ..passes.phases import Phase
from .places import owner

MOST_ROWS = 16
OWN = "own operators"

Shapes = tuple[tuple[str, tuple[int, ...]], ...]
"""Sides and shapes of factors."""


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
        factors: sides and shapes of its Kronecker factors; of several layers, one after the other.
        has_site: whether it has a preconditioned weight.
    """

    name: str
    cells: Mapping[Phase | None, Cell]
    params: Mapping[str, tuple[int, ...]]
    factors: Shapes
    has_site: bool


def rows_of(
    graph: "nx.DiGraph[str]", paths: Mapping[str, str], factors: Mapping[str, Shapes]
) -> tuple[Row, ...]:
    """The rows of a block, those that compute anything first.

    Args:
        graph: the network.
        paths: the path of every node in the block, ``""`` for the block itself.
        factors: what each module of the block has, by the same paths.
    """
    short = _shortened([*paths.values(), *factors])
    nodes: dict[str, list[dict[str, Any]]] = {}
    for node in sorted(paths, key=lambda node: not runs(graph.nodes[node])):
        nodes.setdefault(short[paths[node]], []).append(graph.nodes[node])
    kept: dict[str, Shapes] = {}
    for path, shapes in factors.items():
        kept[short[path]] = kept.get(short[path], ()) + shapes
    return tuple(_row(name, facts, kept.get(name, ())) for name, facts in nodes.items())


def factors_of(graph: "nx.DiGraph[str]") -> dict[str, Shapes]:
    """The factors that a graph returns, by the path of the module that has the layer."""
    found: dict[str, Shapes] = {}
    for _, facts in graph.nodes(data=True):
        for factor in facts["descriptors"]:
            if isinstance(factor, Factor):
                path = owner(factor.layer)
                found[path] = tuple(sorted((*found.get(path, ()), (factor.side, facts["shape"]))))
    return found


def runs(facts: Mapping[str, Any]) -> bool:
    """Whether a node is an operator: no input, and no constant."""
    return bool(facts["op"] == "call_function")


def _shortened(paths: Sequence[str]) -> dict[str, str]:
    """The name of a row for every path: so deep that there are not too many rows."""
    deepest = max((path.count(".") + 1 for path in paths), default=1)
    for depth in range(deepest, 0, -1):
        names = {path: ".".join(path.split(".")[:depth]) or OWN for path in paths}
        if len(set(names.values())) <= MOST_ROWS:
            break
    return names


def _row(name: str, nodes: list[dict[str, Any]], factors: Shapes) -> Row:
    computed = [facts for facts in nodes if runs(facts)]
    phases = dict.fromkeys(facts["phase"] for facts in computed)
    descriptors = [(descriptor, facts["shape"]) for facts in nodes for descriptor in facts["descriptors"]]
    params = {d.name: shape for d, shape in descriptors if isinstance(d, Param | Frozen)}
    cells = {phase: _cell([facts for facts in computed if facts["phase"] == phase]) for phase in phases}
    return Row(name, cells, params, factors, has_site=any(facts["site"] for facts in nodes))


def _cell(nodes: list[dict[str, Any]]) -> Cell:
    return Cell(len(nodes), sum(f["flops"] for f in nodes), sum(f["bytes"] for f in nodes if not f["view"]))
