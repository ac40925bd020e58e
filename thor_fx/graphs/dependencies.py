"""What a value of a step is computed from: of a factor, which parameters and inputs, by how much work."""

from dataclasses import dataclass

import networkx as nx

from ..passes.outputs import Factor, Frozen, Grad, Input, Loss, OutputDescriptor, Param


@dataclass(frozen=True)
class Dependencies:
    """What a value depends on.

    Attributes:
        node: that has the value.
        nodes: all that it is computed by, itself included, in the order of the graph.
        params: the parameters, frozen ones included.
        inputs: the positions of the inputs that are no parameters.
        own: those of ``nodes`` that the loss and the gradients do not need: what the value adds to a step.
        flops: of ``nodes``.
        own_flops: of ``own``.
    """

    node: str
    nodes: tuple[str, ...]
    params: tuple[str, ...]
    inputs: tuple[int, ...]
    own: tuple[str, ...]
    flops: int
    own_flops: int


def dependencies(graph: "nx.DiGraph[str]", of: str | OutputDescriptor) -> Dependencies:
    """What one value depends on.

    Args:
        graph: from :func:`~thor_fx.graphs.to_networkx`.
        of: the name of a node; or what the graph returns, such as ``Factor("fc.weight", "A")``.

    Raises:
        KeyError: there is no such node, or the graph does not return it.
    """
    return _dependencies(graph, _named(graph, of), _needed_for_gradients(graph))


def factor_dependencies(graph: "nx.DiGraph[str]") -> dict[Factor, Dependencies]:
    """What each factor that the graph returns depends on."""
    needed = _needed_for_gradients(graph)
    factors = {d: name for d, name in _results(graph).items() if isinstance(d, Factor)}
    return {factor: _dependencies(graph, name, needed) for factor, name in factors.items()}


def _dependencies(graph: "nx.DiGraph[str]", node: str, elsewhere: set[str]) -> Dependencies:
    needed = _behind(graph, {node})
    nodes = tuple(name for name in graph if name in needed)
    own = tuple(name for name in nodes if name not in elsewhere)
    inputs = [descriptor for name in nodes for descriptor in graph.nodes[name]["descriptors"]]
    return Dependencies(
        node,
        nodes,
        params=tuple(d.name for d in inputs if isinstance(d, Param | Frozen)),
        inputs=tuple(d.index for d in inputs if isinstance(d, Input)),
        own=own,
        flops=sum(graph.nodes[name]["flops"] for name in nodes),
        own_flops=sum(graph.nodes[name]["flops"] for name in own),
    )


def _named(graph: "nx.DiGraph[str]", of: str | OutputDescriptor) -> str:
    if isinstance(of, str):
        if of not in graph:
            raise KeyError(f"no node {of!r}: list(graph) has the names")
        return of
    results = _results(graph)
    if of not in results:
        raise KeyError(
            f"the graph does not return {of}: it returns {', '.join(map(str, results)) or 'nothing'}"
        )
    return results[of]


def _results(graph: "nx.DiGraph[str]") -> dict[OutputDescriptor, str]:
    return {
        descriptor: name
        for name, descriptors in graph.nodes(data="descriptors")
        for descriptor in descriptors
        if isinstance(descriptor, OutputDescriptor)
    }


def _needed_for_gradients(graph: "nx.DiGraph[str]") -> set[str]:
    return _behind(graph, {name for d, name in _results(graph).items() if isinstance(d, Loss | Grad)})


def _behind(graph: "nx.DiGraph[str]", nodes: set[str]) -> set[str]:
    """All that ``nodes`` are computed from, themselves included."""
    found, todo = set(nodes), list(nodes)
    while todo:
        new = [source for source in graph.pred[todo.pop()] if source not in found]
        found.update(new)
        todo += new
    return found
