"""The chain of operators that a step cannot be faster than, however many of them run at once."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import networkx as nx

Weight = Callable[["nx.DiGraph[str]", str], float]
"""What one node weighs, by its name."""


@dataclass(frozen=True)
class CriticalPath:
    """The heaviest chain of a graph.

    Attributes:
        nodes: in their order.
        weight: of all of them together.
        total: of all nodes of the graph together; ``total / weight`` is how much could run at once.
    """

    nodes: tuple[str, ...]
    weight: float
    total: float


def critical_path(
    graph: "nx.DiGraph[str]", weight: Literal["flops", "bytes"] | Weight = "flops"
) -> CriticalPath:
    """The chain of nodes, each of which reads the one before, that weighs most.

    Args:
        graph: from :func:`~thor_fx.graphs.to_networkx`.
        weight: ``"flops"``; ``"bytes"``, read and written; or a function, such as :func:`floor`.

    Raises:
        ValueError: ``weight`` is neither.
    """
    weigh = _weight(weight)
    weights = {node: weigh(graph, node) for node in graph}
    best: dict[str, float] = {}
    before: dict[str, str | None] = {}
    for node in graph:
        before[node] = max(graph.pred[node], key=best.__getitem__, default=None)
        best[node] = weights[node] + max((best[source] for source in graph.pred[node]), default=0)
    node = max(graph, key=best.__getitem__, default=None)
    chain, heaviest = [], 0.0 if node is None else best[node]
    while node is not None:
        chain.append(node)
        node = before[node]
    return CriticalPath(tuple(chain[::-1]), heaviest, sum(weights.values()))


def flops(graph: "nx.DiGraph[str]", node: str) -> float:
    """Floating-point operations of products, convolutions and attentions."""
    return float(graph.nodes[node]["flops"])


def traffic(graph: "nx.DiGraph[str]", node: str) -> float:
    """The bytes that an operator reads and writes if it runs alone; a view does neither."""
    facts = graph.nodes[node]
    if facts["view"] or facts["op"] != "call_function":
        return 0
    return float(facts["bytes"] + sum(graph.nodes[source]["bytes"] for source in graph.pred[node]))


def floor(flops_per_second: float, bytes_per_second: float) -> Weight:
    """The seconds that a machine takes for an operator at best: the longer of arithmetic and traffic.

    Raises:
        ValueError: one of them is not positive.
    """
    for name, value in {"flops_per_second": flops_per_second, "bytes_per_second": bytes_per_second}.items():
        if not value > 0:
            raise ValueError(f"{name} must be > 0, got {value}: give what the machine can do")

    def seconds(graph: "nx.DiGraph[str]", node: str) -> float:
        return max(flops(graph, node) / flops_per_second, traffic(graph, node) / bytes_per_second)

    return seconds


def _weight(weight: Literal["flops", "bytes"] | Weight) -> Weight:
    if callable(weight):
        return weight
    named: dict[str, Weight] = {"flops": flops, "bytes": traffic}
    if weight not in named:
        raise ValueError(f"weight must be 'flops', 'bytes' or a function such as floor(...), got {weight!r}")
    return named[weight]
