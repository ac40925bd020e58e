"""How long every value of a step is kept, in the order of the graph, and how much is alive at once."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

import networkx as nx


@dataclass(frozen=True)
class LiveRange:
    """How long one value is kept.

    Attributes:
        node: that makes it.
        start: the position of that node in the graph; 0 for what is there before the step.
        end: the position of the last node that reads it or a view of it; of a result, the end of the graph.
        bytes: of the value.
    """

    node: str
    start: int
    end: int
    bytes: int

    @property
    def length(self) -> int:
        """How many nodes run while it is kept."""
        return self.end - self.start


@dataclass(frozen=True)
class LiveRanges:
    """All values that have memory of their own.

    Attributes:
        ranges: the longest first; of the same length, the largest first.
        peak: the bytes that are alive at once, at most.
        peak_node: the node that runs then.
    """

    ranges: tuple[LiveRange, ...]
    peak: int
    peak_node: str

    @property
    def largest(self) -> tuple[LiveRange, ...]:
        """The largest first; of the same size, the longest first."""
        return tuple(sorted(self.ranges, key=lambda r: (-r.bytes, -r.length)))

    def alive(self, position: int) -> tuple[LiveRange, ...]:
        """What is alive while the node at this position runs, the largest first."""
        return tuple(r for r in self.largest if r.start <= position <= r.end)


def live_ranges(graph: "nx.DiGraph[str]") -> LiveRanges:
    """The values of a graph, if every node runs in its order and allocates its own value.

    Inputs are alive throughout, for they belong to the caller, and results from where they are made to the
    end. A view takes no memory and keeps alive what it is a view of.

    Args:
        graph: from :func:`~thor_fx.graphs.to_networkx`.
    """
    order = {node: position for position, node in enumerate(graph)}
    ends: dict[str, int] = {}
    for node in graph:
        own = memory_of(graph, node)
        last = max((order[user] for user in graph.succ[node]), default=order[node])
        ends[own] = max(ends.get(own, 0), last)
    ranges = [_range(graph, node, order, ends) for node in ends if graph.nodes[node]["bytes"]]
    peak, position = _peak(ranges, len(order))
    ranges.sort(key=lambda r: (-r.length, -r.bytes))
    return LiveRanges(tuple(ranges), peak, list(order)[position] if order else "")


def memory_of(graph: "nx.DiGraph[str]", node: str) -> str:
    """The node whose memory a value lies in: its own, but for views."""
    while graph.nodes[node]["view"] and graph.pred[node]:
        node = next(iter(graph.pred[node]))
    return node


def _range(graph: "nx.DiGraph[str]", node: str, order: dict[str, int], ends: dict[str, int]) -> LiveRange:
    given = graph.nodes[node]["op"] in {"placeholder", "get_attr"}
    start, end = (0, len(order) - 1) if given else (order[node], ends[node])
    return LiveRange(node, start, end, graph.nodes[node]["bytes"])


def _peak(ranges: Iterable[LiveRange], length: int) -> tuple[int, int]:
    """The most bytes at once, and the first position with as many."""
    change = [0] * (length + 1)
    for one in ranges:
        change[one.start] += one.bytes
        change[one.end + 1] -= one.bytes
    alive = list(accumulate(change))
    position = max(range(len(alive)), key=alive.__getitem__)
    return alive[position], position
