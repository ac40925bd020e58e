"""What goes from one box of the picture to another."""

from collections.abc import Mapping
from dataclasses import dataclass

import networkx as nx

from ..passes.phases import Phase

Box = tuple[int, Phase | None]
"""The position of a block, and a phase."""


@dataclass(frozen=True)
class Edge:
    """The values that a box makes and another reads.

    Attributes:
        source: the box that makes them.
        target: the box that reads them.
        values: how many.
        bytes: of all of them.
    """

    source: Box
    target: Box
    values: int
    bytes: int


def block_edges(graph: "nx.DiGraph[str]", position: Mapping[str, int]) -> tuple[Edge, ...]:
    """The edges between boxes, each once; between equal blocks that are one box there is none.

    Args:
        graph: the network.
        position: of the block of every operator, from :func:`~thor_fx.graphs.blocks.blocks`.
    """
    values: dict[tuple[Box, Box], set[str]] = {}
    for source, user in graph.edges:
        if {source, user} <= position.keys() and graph.nodes[source]["op"] == "call_function":
            ends = _box(graph, source, position), _box(graph, user, position)
            if ends[0] != ends[1]:
                values.setdefault(ends, set()).add(source)
    sizes = dict(graph.nodes(data="bytes"))
    return tuple(Edge(*ends, len(nodes), sum(sizes[n] for n in nodes)) for ends, nodes in values.items())


def _box(graph: "nx.DiGraph[str]", node: str, position: Mapping[str, int]) -> Box:
    return position[node], graph.nodes[node]["phase"]
