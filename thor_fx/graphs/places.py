"""Where in the model every node belongs, also those that no module has computed."""

import networkx as nx

from ..passes.outputs import Frozen, Param


def owner(name: str) -> str:
    """The path of the module that has a parameter or a layer; of one without a module, its name.

    Example:
        >>> owner("layers.0.fc.weight"), owner("fc.weight (transposed)"), owner("w1[0:2]")
        ('layers.0.fc', 'fc', 'w1')
    """
    param = name.partition("[")[0].partition(" ")[0]
    return param.rpartition(".")[0] or param


def places(graph: "nx.DiGraph[str]") -> dict[str, str | None]:
    """The path of a module for every node, None outside of all modules.

    A node without a module of its own belongs where the layer does whose gradient or factors it computes;
    else to the parameter that it reads; else, but for a loss, to what it reads last: sums of gradients have
    no module.
    """
    order = {node: position for position, node in enumerate(graph)}
    modular = any(path is not None for _, path in graph.nodes(data="module"))
    found: dict[str, str | None] = {}
    for node, facts in graph.nodes(data=True):
        params = [d.name for d in _read(graph, node) if isinstance(d, Param | Frozen)]
        if facts["module"] is not None:
            found[node] = facts["module"]
        elif facts["site"] or params:
            found[node] = owner((facts["site"] or params)[0])
        elif modular and facts["phase"] == "forward":
            found[node] = None
        else:
            last = max(graph.pred[node], key=order.__getitem__, default=None)
            found[node] = None if last is None else found[last]
    return found


def _read(graph: "nx.DiGraph[str]", node: str) -> list[object]:
    """The descriptors of a node and of what it reads."""
    return [d for name in (node, *graph.pred[node]) for d in graph.nodes[name]["descriptors"]]
