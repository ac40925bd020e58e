"""Put a forward graph and a backward graph together again to the step graph that they were cut from.

Afterwards the step graph has the inputs and results that it had, by the same computations. What is in both
graphs is computed a second time, behind the place where backward starts; what draws random numbers or has
side effects is not. Every node says which half it belongs to.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from .nodes import is_random
from .outputs import KEY, OutputDescriptor, output_node

aten = torch.ops.aten

ORIGIN = "thor_fx origin"
"""Where a node of a half says which node of the joint graph it is: its name."""

SIDE = "partitioner_tag"
"""Where a node says which half it belongs to; a tag that other tracers carry on."""
FORWARD, BACKWARD = "is_forward", "is_backward"


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
    *given, (start, constant) = halves.inputs.items()
    known = {origin: graph.node_copy(node) for origin, node in given}
    first, computed = _inline(graph, halves.forward, known, FORWARD)
    known |= computed | {start: graph.node_copy(constant)}
    last, _ = _inline(graph, halves.backward, known, BACKWARD)
    values = dict(zip(halves.results, [*first[: len(halves.results) - len(last)], *last], strict=True))
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
    graph: fx.Graph, half: fx.GraphModule, known: Mapping[str, fx.Node], side: str
) -> tuple[list[fx.Node | None], dict[str, fx.Node]]:
    """Append the nodes of ``half``; its results, and what is computed now, by origin."""
    values: dict[fx.Node, fx.Node] = {}

    def read(node: fx.Node) -> fx.Node:
        return _through_view(values[node]) if node.op == "placeholder" else values[node]

    for node in half.graph.nodes:
        if node.op == "output":
            returned: Any = node.args[0]
            computed = {inner.meta[ORIGIN]: new for inner, new in values.items()}
            return [None if result is None else values[result] for result in returned], computed
        origin = node.meta[ORIGIN]
        if node.op == "placeholder" or (origin in known and node.is_impure()):
            values[node] = known[origin]
        else:
            values[node] = graph.node_copy(node, read)
            values[node].meta[SIDE] = side
    raise AssertionError("a graph has an output")


# NOTE: [Backward reads through views] Inductor asks all users of a value which layout it should have, and a
# product or convolution in backward insists on the one of eager. It would be kept in that layout, besides
# the one that forward computes with (channels last, for a convolution). A view, which changes nothing, hides
# these users, as they are hidden where forward is compiled alone. One for every use: several users of one
# view would be asked again.


def _through_view(kept: fx.Node) -> fx.Node:
    value = kept.meta.get("val")
    if kept.meta.get(SIDE) != FORWARD or not isinstance(value, Tensor):
        return kept
    viewed = kept.graph.call_function(aten.unsqueeze.default, (kept, 0))
    result = kept.graph.call_function(aten.select.int, (viewed, 0, 0))
    viewed.meta = {"val": value.unsqueeze(0), SIDE: BACKWARD}
    result.meta = {"val": viewed.meta["val"].select(0, 0), SIDE: BACKWARD}
    return result
