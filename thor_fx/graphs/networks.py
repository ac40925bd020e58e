"""A step graph as a ``networkx.DiGraph``, with what is known of every node on it."""

from collections.abc import Sequence
from operator import getitem
from typing import Any, TypedDict

import networkx as nx
import torch
from torch import fx

from ..flops import flops_of
from ..kernels import Kernel
from ..passes.nodes import is_pointwise, is_view, target
from ..passes.outputs import KEY, InputDescriptor, OutputDescriptor
from ..passes.phases import PHASE, Phase
from ..passes.walk import Site
from .modules import modules
from .owners import described_results, owners
from .values import bytes_of, shape_of


class Facts(TypedDict):
    """What is on every node of the network, in ``graph.nodes[name]``.

    Attributes:
        op: as in ``torch.fx``: ``"placeholder"``, ``"call_function"``, ``"output"``, ...
        operator: what it calls.
        shape: of its value, None where that is no tensor; a symbolic size as in the traced batch.
        dtype: of its value, None where that is no tensor.
        phase: the part of the step, None in a graph whose phases nobody has marked.
        site: the layers whose gradient or factors it computes and nothing else; None: not known.
        module: the path of the ``nn.Module`` that it comes from, ``""`` for the model; None: from none.
        flops: of products, convolutions and attentions.
        bytes: of its value.
        kernel: the kernel that computes it; None: not known.
        view: whether its value lies in the memory of its first argument.
        pointwise: whether every number of its value depends on one place of its arguments.
        descriptors: what it is to the caller: an input, or results.
    """

    op: str
    operator: str
    shape: tuple[int, ...] | None
    dtype: torch.dtype | None
    phase: Phase | None
    site: tuple[str, ...] | None
    module: str | None
    flops: int
    bytes: int
    kernel: str | None
    view: bool
    pointwise: bool
    descriptors: tuple[InputDescriptor | OutputDescriptor, ...]


def to_networkx(
    gm: fx.GraphModule, sites: Sequence[Site] = (), kernels: Sequence[Kernel] = ()
) -> "nx.DiGraph[str]":
    """A graph as a ``networkx.DiGraph`` with an edge from every value to its users.

    Args:
        gm: a graph whose nodes have values in ``meta``; descriptors and phases are read where there are any.
        sites: the uses of weights in it.
        kernels: what Inductor made of it.

    Returns:
        Nodes by name, in the order of the graph, with the attributes of :class:`Facts`.

    Example:
        >>> import thor_fx
        >>> params, x = {"w": torch.ones(3, 2)}, torch.ones(4, 3)
        >>> step = thor_fx.trace_step(lambda p, x: (x @ p["w"]).sum(), params, x)
        >>> facts = to_networkx(step).nodes["mm"]
        >>> facts["operator"], facts["shape"], facts["flops"], facts["bytes"]
        ('aten.mm.default', (4, 2), 48, 32)
    """
    graph = nx.DiGraph()
    place, owner, results = modules(gm), owners(gm, sites), _results(gm)
    kernel = {node: found.name for found in kernels for node in found.nodes}
    for node in gm.graph.nodes:
        facts = _facts(node)
        facts["module"], facts["site"] = place.get(node), owner.get(node)
        facts["kernel"] = kernel.get(node.name)
        facts["descriptors"] += tuple(results.get(node, ()))
        graph.add_node(node.name, **facts)
        graph.add_edges_from((source.name, node.name) for source in node.all_input_nodes)
    return graph


def _facts(node: fx.Node) -> Facts:
    value: Any = node.meta.get("val")
    described = node.meta.get(KEY)
    return Facts(
        op=node.op,
        operator=str(node.target),
        shape=shape_of(value),
        dtype=getattr(value, "dtype", None),
        phase=node.meta.get(PHASE),
        site=None,
        module=None,
        flops=flops_of(node) if value is not None else 0,
        bytes=bytes_of(value),
        kernel=None,
        view=is_view(node) or target(node) is getitem,
        pointwise=is_pointwise(node),
        descriptors=(described,) if isinstance(described, InputDescriptor) else (),
    )


def _results(gm: fx.GraphModule) -> dict[fx.Node, list[OutputDescriptor]]:
    """What every node is returned as."""
    found: dict[fx.Node, list[OutputDescriptor]] = {}
    for descriptor, node in described_results(gm).items():
        found.setdefault(node, []).append(descriptor)
    return found
