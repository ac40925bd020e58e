"""What holds of a step graph before and after every pass.

1. The graph is well-formed (:meth:`torch.fx.Graph.lint`): every node is defined before it is used.
2. Every placeholder and every output carries a descriptor, and no two are equal.
3. Every node that computes a tensor knows its shape: ``node.meta["val"]``.
4. A gradient has the shape of its parameter; a factor is a square matrix of a layer that has both.
"""

import operator

import torch
from torch import fx

from .outputs import (
    KEY,
    Factor,
    Grad,
    InputDescriptor,
    Param,
    Rows,
    input_nodes,
    output_node,
    output_nodes,
    results,
)


class SpecError(ValueError):
    """A graph breaks the rules that all passes rely on; the message says which, and where."""


def check(gm: fx.GraphModule) -> None:
    """Check all of the rules above.

    Raises:
        SpecError: naming the node and the rule that it breaks.
    """
    try:
        gm.graph.lint()
    except RuntimeError as error:
        raise SpecError(f"the graph is not well-formed: {error}") from error
    _check_inputs(gm)
    _check_outputs(gm)
    _check_values(gm)
    _check_shapes(gm)


def _check_inputs(gm: fx.GraphModule) -> None:
    seen = set()
    for node in gm.graph.find_nodes(op="placeholder"):
        descriptor = node.meta.get(KEY)
        if not isinstance(descriptor, InputDescriptor):
            raise SpecError(f"input {node.name!r} has no descriptor")
        if descriptor in seen:
            raise SpecError(f"two inputs are {descriptor}")
        seen.add(descriptor)


def _check_outputs(gm: fx.GraphModule) -> None:
    descriptors = output_node(gm.graph).meta.get(KEY)
    if descriptors is None or len(descriptors) != len(results(gm)):
        raise SpecError("the outputs do not have one descriptor each")
    if len(set(descriptors)) != len(descriptors):
        raise SpecError(f"two outputs share a descriptor: {descriptors}")


def _check_values(gm: fx.GraphModule) -> None:
    for node in gm.graph.nodes:
        # an output that the operator was told not to compute, or an operator without any: a check of values
        absent = node.target is operator.getitem or _returns_nothing(node)
        if node.op == "call_function" and "val" not in node.meta and not absent:
            raise SpecError(f"node {node.name!r} ({node.target}) has no value in meta['val']")


def _returns_nothing(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and not schema.returns


def _check_shapes(gm: fx.GraphModule) -> None:
    inputs = input_nodes(gm)
    returned = output_nodes(gm)
    for descriptor, node in returned.items():
        if node is None:
            continue
        if isinstance(descriptor, Grad) and Param(str(descriptor.param)) in inputs:
            _same_shape(descriptor, node, inputs[Param(str(descriptor.param))])
        if isinstance(descriptor, Factor):
            shape = node.meta["val"].shape
            if len(shape) < 1 or (len(shape) > 2 and shape[-1] != shape[-2]):
                got = tuple(shape)
                raise SpecError(f"{descriptor} is no matrix, no diagonal and no stack of either: {got}")
            if Rows(descriptor.layer) not in returned:
                raise SpecError(f"layer {descriptor.layer!r} has a factor and no rows")


def _same_shape(descriptor: Grad, gradient: fx.Node, parameter: fx.Node) -> None:
    got, expected = gradient.meta["val"], parameter.meta["val"]
    if isinstance(got, torch.Tensor) and tuple(got.shape) != tuple(expected.shape):
        raise SpecError(f"{descriptor} has shape {tuple(got.shape)}, its parameter {tuple(expected.shape)}")
