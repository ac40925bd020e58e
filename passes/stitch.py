"""Put a forward graph and a backward graph together again to the step graph that they were cut from.

Afterwards the step graph has the inputs and results that it had, by the same computations. What is in both
graphs is computed a second time, behind the place where backward starts; what draws random numbers or has
side effects is not.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import fx

from .nodes import is_random
from .outputs import KEY, OutputDescriptor, output_node

ORIGIN = "thor_fx origin"
"""Where a node of a half says which node of the joint graph it is: its name."""


class Halves(NamedTuple):
    """A step graph in two.

    The nodes of both graphs say in ``meta[ORIGIN]`` which node of the joint graph they are.

    Attributes:
        forward: returns the first of ``results``, and then whatever backward reads.
        backward: returns the other ``results``.
        inputs: what the step graph has for every input of the joint graph, by origin: an input of its own, a
            constant, or (the last one) the start of backward.
        results: what the two return, in this order.
        drawn: the origins of all nodes that draw random numbers, in order.
    """

    forward: fx.GraphModule
    backward: fx.GraphModule
    inputs: Mapping[str, fx.Node]
    results: Sequence[OutputDescriptor]
    drawn: Sequence[str]


class OrderError(ValueError):
    """Two graphs that cannot run one after the other without a change of what they compute."""


def stitch(gm: fx.GraphModule, halves: Halves) -> None:
    """Let ``gm`` compute what the forward and then the backward half compute, in place.

    Args:
        gm: the step graph that both were cut from.
        halves: its halves.

    Raises:
        OrderError: random numbers would be drawn in another order; ``gm`` is as it was.
    """
    graph = fx.Graph()
    (*given, start) = halves.inputs.items()
    known = {origin: graph.node_copy(node) for origin, node in given}
    first, computed = _inline(graph, halves.forward, known)
    known |= computed | {start[0]: graph.node_copy(start[1])}
    last, _ = _inline(graph, halves.backward, known)
    early = len(halves.results) - len(last)
    values = dict(zip(halves.results, [*first[:early], *last], strict=True))
    out = output_node(gm.graph)
    order: Sequence[OutputDescriptor] = out.meta[KEY]
    graph.output(tuple(values[descriptor] for descriptor in order)).meta = dict(out.meta)
    if [node.meta[ORIGIN] for node in graph.nodes if is_random(node)] != list(halves.drawn):
        raise OrderError("random numbers would be drawn in another order")
    for node in graph.nodes:
        node.meta.pop(ORIGIN, None)
    gm.graph = graph
    gm.recompile()


def _inline(
    graph: fx.Graph, half: fx.GraphModule, known: Mapping[str, fx.Node]
) -> tuple[list[fx.Node | None], dict[str, fx.Node]]:
    """Append the nodes of ``half``; its results, and what is computed now, by origin."""
    values: dict[fx.Node, fx.Node] = {}
    for node in half.graph.nodes:
        if node.op == "output":
            returned: Any = node.args[0]
            computed = {inner.meta[ORIGIN]: new for inner, new in values.items()}
            return [None if result is None else values[result] for result in returned], computed
        origin = node.meta[ORIGIN]
        reused = node.op == "placeholder" or (origin in known and node.is_impure())
        values[node] = known[origin] if reused else graph.node_copy(node, values.__getitem__)
    raise AssertionError("a graph has an output")
