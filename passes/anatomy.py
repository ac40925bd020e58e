"""Which nodes of a step graph depend on the model, which on where backward starts."""

from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx

from .nodes import arguments, downstream, shape, source, target, upstream
from .outputs import KEY, Loss, Mutation, Output, Param, Tangent, output_nodes
from .sites import seeds

aten = torch.ops.aten

# Operators that take a tensor for its shape only: which argument, or all of them.
FOR_SHAPE: dict[Any, int | None] = {
    aten.nll_loss_backward.default: 1,
    aten.nll_loss2d_backward.default: 1,
    aten.zeros_like.default: None,
    aten.ones_like.default: None,
    aten.full_like.default: None,
    aten.empty_like.default: None,
    aten.new_zeros.default: None,
    aten.new_ones.default: None,
    aten.new_full.default: None,
}
NLL_LOSSES = {aten.nll_loss_forward.default, aten.nll_loss2d_forward.default}


@dataclass(frozen=True)
class Anatomy:
    """Sets of nodes.

    Attributes:
        model: the value depends on a parameter.
        backward: it depends on where backward starts.
        forward: a result of forward depends on it.
        seeds: where backward starts.
    """

    model: frozenset[fx.Node]
    backward: frozenset[fx.Node]
    forward: frozenset[fx.Node]
    seeds: tuple[fx.Node, ...]

    def is_data(self, value: Any) -> bool:
        """Whether an argument is known without the model and without the loss."""
        return not isinstance(value, fx.Node) or (value not in self.model and value not in self.backward)

    def is_coefficient(self, value: Any) -> bool:
        """Whether an argument comes from backward and does not depend on the model."""
        return isinstance(value, fx.Node) and value in self.backward and value not in self.model

    def scale(self, node: fx.Node) -> fx.Node | None:
        """The tangent of the scalar that backward reaches ``node`` from, if it is an input of the graph.

        Raises:
            LookupError: backward reaches it from several tangents, or from one that is no scalar.
        """
        above = upstream([node])
        given = [seed for seed in self.seeds if seed in above and seed.op == "placeholder"]
        if len(given) > 1 or any(shape(seed) != () for seed in given):
            raise LookupError
        return given[0] if given else None


def anatomy(gm: fx.GraphModule) -> Anatomy:
    """Look at a step graph or joint graph."""
    model: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if isinstance(node.meta.get(KEY), Param) or any(arg in model for arg in _read(node)):
            model.add(node)
    starts = seeds(gm)
    results = [
        n for d, n in output_nodes(gm).items() if isinstance(d, Loss | Output | Mutation) and n is not None
    ]
    return Anatomy(
        frozenset(model), frozenset(downstream(starts)), frozenset(upstream(results)), tuple(starts)
    )


def _read(node: fx.Node) -> list[fx.Node]:
    """The arguments whose values matter."""
    operator = target(node)
    if operator is getitem and arguments(node)[1] == 1 and target(source(node)) in NLL_LOSSES:
        return source(node).all_input_nodes[1:]  # the sum of the weights of the labels
    if operator not in FOR_SHAPE:
        return node.all_input_nodes
    position = FOR_SHAPE[operator]
    if position is None:
        return []
    return [arg for i, arg in enumerate(node.args) if isinstance(arg, fx.Node) and i != position]


def tangents(gm: fx.GraphModule) -> dict[int, fx.Node]:
    """The tangents that are inputs of the graph, by the output that they belong to."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    found = {n.meta[KEY].index: n for n in placeholders if isinstance(n.meta.get(KEY), Tangent)}
    return dict(sorted(found.items()))
