"""Which operators could be one kernel."""

from dataclasses import dataclass

import networkx as nx


@dataclass(frozen=True)
class Region:
    """Operators that could be one kernel.

    Attributes:
        nodes: in the order of the graph.
        reads: the values from outside.
        writes: the values that are needed outside.
        saved: the bytes that need not be written, nor read again, if it is one kernel.
    """

    nodes: tuple[str, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    saved: int


def fusible_regions(graph: "nx.DiGraph[str]") -> tuple[Region, ...]:
    """The regions of pointwise operators, those that save most first.

    An operator is *fusible* if it is pointwise or a view. All others are *barriers*: reductions, products,
    convolutions, gathers. A region is a connected component of the fusible operators that have as many
    barriers before them, on the longest path from the inputs, and holds two pointwise operators or more.
    A path through a barrier has more barriers at its end, so no path leaves a region and comes back: each
    region can run as a whole. Sizes are not compared: in one kernel a smaller value is broadcast.

    Args:
        graph: from :func:`~thor_fx.graphs.to_networkx`.
    """
    depth = _barriers_before(graph)
    same = nx.Graph()
    same.add_nodes_from(node for node in graph if _fusible(graph, node))
    same.add_edges_from(
        (source, user)
        for source, user in graph.edges
        if source in same and user in same and depth[source] == depth[user]
    )
    order = {node: position for position, node in enumerate(graph)}
    components = [sorted(nodes, key=order.__getitem__) for nodes in nx.connected_components(same)]
    regions = [_region(graph, nodes) for nodes in components if _work(graph, nodes) > 1]
    return tuple(sorted(regions, key=lambda region: (-region.saved, order[region.nodes[0]])))


def _fusible(graph: "nx.DiGraph[str]", node: str) -> bool:
    facts = graph.nodes[node]
    return facts["op"] == "call_function" and (facts["pointwise"] or facts["view"])


def _barriers_before(graph: "nx.DiGraph[str]") -> dict[str, int]:
    depth: dict[str, int] = {}
    for node in graph:
        barriers = (s for s in graph.pred[node] if graph.nodes[s]["op"] == "call_function")
        behind = (depth[source] + (not _fusible(graph, source)) for source in barriers)
        depth[node] = max(behind, default=0)
    return depth


def _work(graph: "nx.DiGraph[str]", nodes: list[str]) -> int:
    return sum(graph.nodes[node]["pointwise"] for node in nodes)


def _region(graph: "nx.DiGraph[str]", nodes: list[str]) -> Region:
    inside = set(nodes)
    reads = dict.fromkeys(source for node in nodes for source in graph.pred[node] if source not in inside)
    writes = [node for node in nodes if not inside.issuperset(graph.succ[node])]
    kept = [n for n in nodes if graph.nodes[n]["pointwise"] and not _needed_outside(graph, n, inside)]
    return Region(tuple(nodes), tuple(reads), tuple(writes), 2 * sum(graph.nodes[n]["bytes"] for n in kept))


def _needed_outside(graph: "nx.DiGraph[str]", node: str, inside: set[str]) -> bool:
    """Whether a value, or a view of it, is read outside."""
    users = graph.succ[node]
    return any(
        u not in inside or (graph.nodes[u]["view"] and _needed_outside(graph, u, inside)) for u in users
    )
