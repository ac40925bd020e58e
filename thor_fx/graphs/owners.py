"""Which layers a node works for: it computes their gradient or their factors, and nothing else."""

from collections.abc import Iterable, Sequence

from torch import fx

from ..passes.nodes import downstream, upstream
from ..passes.outputs import KEY, Factor, Grad, OutputDescriptor, Rows, Terms, output_node, output_nodes
from ..passes.walk import Site


def owners(gm: fx.GraphModule, sites: Sequence[Site] = ()) -> dict[fx.Node, tuple[str, ...]]:
    """The layers of every node that belongs to any, in the order of the results.

    A node belongs to the layers whose factors alone need it. It belongs to the layers of a gradient if it is
    one of the contractions of ``sites``, or what becomes of them on the way to the gradient.
    """
    results = described_results(gm)
    found: dict[fx.Node, dict[str, None]] = {}
    for name, nodes in (*_of_factors(results), *_of_gradients(results, sites)):
        for node in nodes:
            found.setdefault(node, {})[name] = None
    return {node: tuple(names) for node, names in found.items()}


def described_results(gm: fx.GraphModule) -> dict[OutputDescriptor, fx.Node]:
    """Every node that the graph returns; of a graph without descriptors, none."""
    if KEY not in output_node(gm.graph).meta:
        return {}
    return {descriptor: node for descriptor, node in output_nodes(gm).items() if node is not None}


def _of_factors(results: dict[OutputDescriptor, fx.Node]) -> Iterable[tuple[str, set[fx.Node]]]:
    needed = upstream(node for d, node in results.items() if not isinstance(d, Factor | Rows | Terms))
    for descriptor, node in results.items():
        if isinstance(descriptor, Factor | Rows):
            yield descriptor.layer, _until([node], needed)


def _of_gradients(
    results: dict[OutputDescriptor, fx.Node], sites: Sequence[Site]
) -> Iterable[tuple[str, set[fx.Node]]]:
    for site in sites:
        gradient = results.get(Grad(site.param))
        if gradient is not None:
            yield site.layer, upstream([gradient]) & downstream([_of_same_graph(site.gradient, gradient)])


def _of_same_graph(node: fx.Node, other: fx.Node) -> fx.Node:
    """The node of this name in the graph of ``other``: sites may have been found in a copy of it."""
    if node.graph is other.graph:
        return node
    return next((n for n in other.graph.nodes if n.name == node.name), other)


def _until(nodes: Iterable[fx.Node], stop: set[fx.Node]) -> set[fx.Node]:
    """Everything that ``nodes`` depend on, without ``stop`` and what is beyond."""
    found: set[fx.Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in found and node not in stop:
            found.add(node)
            todo += node.all_input_nodes
    return found
