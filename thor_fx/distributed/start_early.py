"""Sums over ranks that run beside backward.

An update is spliced behind the gradients, and its collectives with it: backward is over when they start.
Afterwards each sum of what backward returns starts right behind the last of its parts, with the nodes that
pack them. Where its result is waited for stays, and so does everything else.

NOTE: [One order] All ranks have to start collectives in one order, or they wait for each other without end.
So the order does not follow from the graph, which a rank with a batch of another shape compiles by itself,
but from that of the parameters, which ranks have compared: backward reaches the last of them first. A sum
that is ready before its turn waits for it. Collectives that the model itself has in its graph are not passed.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import fx

from ..layers import Coverage
from ..passes.layout import layer_of
from ..passes.outputs import Factor, Grad, OutputDescriptor, Rows, output_nodes
from .collectives import is_collective, is_sum


class _Sum(NamedTuple):
    """A collective, the nodes that only pack what it sends, and what that is."""

    start: fx.Node
    packing: list[fx.Node]
    sent: list[fx.Node]


def start_early(gm: fx.GraphModule, trained: Sequence[str], found: Coverage) -> None:
    """Start sums over ranks as early as what they send is there, in place.

    Args:
        gm: a step graph with an update, which still returns what backward has computed.
        trained: the names of all parameters, in an order that is the same on all ranks.
        found: the coverage of the model.
    """
    nodes = list(gm.graph.nodes)
    order = {node: position for position, node in enumerate(nodes)}
    results = {node: d for d, node in output_nodes(gm).items() if node is not None}
    update = 1 + max(order[node] for node in results)  # behind backward
    fixed = [node for node in nodes[:update] if node.op == "placeholder" or is_collective(node)]
    sums = [_sum_of(node, results) for node in nodes[update:] if is_sum(node)]
    places = {node: _place(descriptor, trained, found) for node, descriptor in results.items()}
    last = fixed[-1]
    for one in sorted(filter(None, sums), key=lambda one: -min(places[node] for node in one.sent)):
        last = max(last, *one.sent, key=order.__getitem__)
        for node in sorted((*one.packing, one.start), key=order.__getitem__):
            if order[node] > order[last]:
                last.append(node)
                order[node], last = order[last], node
    gm.recompile()


def _place(result: OutputDescriptor, trained: Sequence[str], found: Coverage) -> int:
    """Of a result of backward, the place of its parameter."""
    if isinstance(result, Factor | Rows):
        return trained.index(found.layers[layer_of(result.layer)].param)
    return trained.index(result.param) if isinstance(result, Grad) and result.param in trained else 0


def _sum_of(start: fx.Node, results: dict[fx.Node, OutputDescriptor]) -> _Sum | None:
    """A sum of results of backward; None where it is one of something that another collective has brought."""
    packing, sent, todo = dict[fx.Node, None](), dict[fx.Node, None](), [*start.all_input_nodes]
    while todo:
        node = todo.pop()
        if is_collective(node):
            return None
        if node in results:
            sent[node] = None
        elif node.op != "placeholder" and node not in packing:
            packing[node] = None
            todo += node.all_input_nodes
    return _Sum(start, [*packing], [*sent]) if sent else None
