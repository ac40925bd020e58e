"""What forward keeps for backward."""

from collections.abc import Collection
from dataclasses import dataclass

import networkx as nx

from ..passes.phases import Phase
from .live_ranges import memory_of

BACKWARD: tuple[Phase, ...] = ("backward",)


@dataclass(frozen=True)
class Cut:
    """What crosses from one part of a step to a later one.

    Attributes:
        edges: from a node of forward to a node behind the cut.
        values: what is kept, the largest first: each once, and in place of a view what it is a view of.
        bytes: of ``values``.
    """

    edges: tuple[tuple[str, str], ...]
    values: tuple[str, ...]
    bytes: int


def forward_backward_cut(graph: "nx.DiGraph[str]", later: Collection[Phase] = BACKWARD) -> Cut:
    """The edges that lead from forward to backward, and the values that have to be kept for them.

    Parameters and inputs are not among the values: they are there anyway.

    Args:
        graph: from :func:`~thor_fx.graphs.to_networkx`, of a graph whose phases are marked.
        later: the phases behind the cut: with ``"factors"`` among them, also what they read of forward.

    Raises:
        ValueError: no node of ``graph`` has a phase.
    """
    phase = dict(graph.nodes(data="phase"))
    if all(found is None for found in phase.values()):
        raise ValueError(
            "the nodes of graph have no phase: mark the step (thor_fx.passes.phases) before to_networkx(step)"
        )
    edges = [
        (source, user)
        for source, user in graph.edges
        if phase[source] == "forward" and phase[user] in later and _computed(graph, source)
    ]
    values = {memory_of(graph, source) for source, _ in edges}
    size = {node: graph.nodes[node]["bytes"] for node in graph if node in values and _computed(graph, node)}
    kept = sorted(size, key=size.__getitem__, reverse=True)
    return Cut(tuple(edges), tuple(kept), sum(size.values()))


def _computed(graph: "nx.DiGraph[str]", node: str) -> bool:
    return bool(graph.nodes[node]["op"] == "call_function")
