"""What a graph reads and writes, and what it has to keep, as a compiler that fuses would run it.

Products, convolutions, attentions, factorisations, sorts and the like run alone; everything else is fused
with its neighbours. A *region* is one of the former, or all of the latter that are connected, belong to one
phase and have equally many of the former above them in a row, so that none of these lies between them.

A region reads every value of other regions and every argument once, and writes what others read or the graph
returns. Views are free. Where a part of a value is looked up (an embedding), no more than the part is read.
"""

import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from .flops import flops_of
from .passes.nodes import is_random, is_view, is_write, source, target
from .passes.phases import Phase, phase_of

aten = torch.ops.aten

ALONE = re.compile(r"linalg|cholesky|solve|fft|sort|topk|scatter|index_put|nonzero|pool|multinomial")
"""In the names of operators that are not fused, besides those that count as products."""

LOOKUPS = {aten.embedding, aten.index, aten.gather, aten.index_select}


@dataclass
class Traffic:
    """The regions of a graph."""

    gm: fx.GraphModule

    @cached_property
    def region(self) -> dict[fx.Node, fx.Node]:
        """The region of every node that computes something: one of its nodes, the same for all of them."""
        parents: dict[fx.Node, fx.Node] = {}
        depth: dict[fx.Node, int] = {}
        for node in filter(computes, self.gm.graph.nodes):
            above = [arg for arg in map(maker, node.all_input_nodes) if arg in parents]
            depth[node] = max((depth[arg] + runs_alone(arg) for arg in above), default=0)
            parents[node] = node
            for arg in above:
                if _fuses(arg, node) and depth[arg] == depth[node]:
                    parents[_root(parents, node)] = _root(parents, arg)
        return {node: _root(parents, node) for node in parents}

    def reads(self) -> Iterator[tuple[fx.Node, fx.Node, int]]:
        """Every node that reads a value from memory, the value, and how many bytes at most."""
        for node in filter(computes, self.gm.graph.nodes):
            for arg in node.all_input_nodes[1:] if is_write(node) else node.all_input_nodes:
                value = holder(arg)
                inside = self.region.get(maker(value)) is self.region[node]
                if not inside and not is_constant(value):
                    yield node, value, _bytes_read(node, arg, value)

    @cached_property
    def written(self) -> set[fx.Node]:
        """The values that are written to memory: those that other regions read, or the graph returns."""
        returned = next(node for node in reversed(self.gm.graph.nodes) if node.op == "output").all_input_nodes
        values = {value for _, value, _ in self.reads()} | {holder(node) for node in returned}
        return {value for value in values if value.op == "call_function"}

    def bytes(self) -> dict[Phase, int]:
        """What is read and written, by phase."""
        read: dict[tuple[fx.Node, fx.Node], int] = {}
        for node, value, size in self.reads():
            key = self.region[node], value
            read[key] = max(size, read.get(key, 0))
        total: dict[Phase, int] = {}
        for (region, _), size in read.items():
            _add(total, region, size)
        in_place = [node for node in self.gm.graph.nodes if is_write(node)]
        for node in {*self.written, *in_place}:
            _add(total, node, size_of(node))
        return total


def _add(total: dict[Phase, int], node: fx.Node, size: int) -> None:
    phase = phase_of(node) or "forward"
    total[phase] = total.get(phase, 0) + size


def _fuses(arg: fx.Node, node: fx.Node) -> bool:
    return not runs_alone(arg) and not runs_alone(node) and phase_of(arg) == phase_of(node)


def _root(parents: dict[fx.Node, fx.Node], node: fx.Node) -> fx.Node:
    while parents[node] is not node:
        node = parents[node]
    return node


def runs_alone(node: fx.Node) -> bool:
    """Whether a compiler calls a library for this node."""
    if node.op != "call_function" or target(node) is operator.getitem:
        return False
    named = getattr(node.target, "_schema", None)
    name = str(named.name) if named is not None else str(node.target)
    ours = name.startswith(("aten::", "prims::"))
    return not ours or bool(ALONE.search(name)) or flops_of(node) > 0


def computes(node: fx.Node) -> bool:
    """Whether a node makes or changes values: views and arguments do not."""
    return node.op == "call_function" and target(node) is not operator.getitem and not is_view(node)


def is_constant(node: fx.Node) -> bool:
    """Whether a value is known without any other, so that whoever reads it makes it."""
    return node.op == "call_function" and not node.all_input_nodes and not is_random(node)


def holder(node: fx.Node) -> fx.Node:
    """The node whose value a view looks at."""
    while is_view(node):
        node = source(node)
    return node


def maker(node: fx.Node) -> fx.Node:
    """The node that computes a value: of one of several results, the operator."""
    node = holder(node)
    return source(node) if target(node) is operator.getitem else node


def size_of(node: fx.Node) -> int:
    """Bytes of a value."""
    return _bytes(node.meta.get("val"))


def _bytes(value: Any) -> int:
    if isinstance(value, list | tuple):
        return sum(map(_bytes, value))
    return int(value.numel()) * value.element_size() if isinstance(value, Tensor) else 0


def _bytes_read(node: fx.Node, arg: fx.Node, value: fx.Node) -> int:
    """Of a view, what it shows; of a table, what is looked up in it."""
    size = min(size_of(arg), size_of(value))
    packet = getattr(node.target, "overloadpacket", None)
    is_table = packet in LOOKUPS and node.all_input_nodes[0] is arg
    return min(size, size_of(node)) if is_table else size
