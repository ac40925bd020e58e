"""Adapter to AOTAutograd's partitioner: which values to keep for backward, and which to compute again.

The only module that knows how the min-cut partitioner tells forward from backward. Written for torch 2.11,
2.13 and 2.15. It goes by names of inputs (with ``tangents`` in it or not), by the order of results (those of
forward first) and by two tags in ``node.meta``: ``partitioner_tag`` says where a node must be computed,
``recompute`` what becomes of its value (:class:`torch.utils.checkpoint.CheckpointPolicy`).
"""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from functorch import make_fx
from functorch.compile import min_cut_rematerialization_partition
from torch import Tensor, fx
from torch.fx.traceback import preserve_node_meta
from torch.utils.checkpoint import CheckpointPolicy

from .passes import outputs
from .passes.nodes import downstream, is_random
from .passes.outputs import Loss, Mutation, Opaque, Output, OutputDescriptor, Tangent
from .passes.resample import is_draw
from .passes.splice import Decompositions, in_mode
from .passes.stitch import ORIGIN, SIDE, Halves

EFFECTS: set[Any] = {torch.ops.prims._make_token.default, torch.ops.higher_order.with_effects}

WISH = "recompute"


class CannotSplit(ValueError):
    """A step graph that has to stay whole; the message says why."""


class PartitionerFailed(RuntimeError):
    """Torch's partitioner finds no cut where there should be one."""


def split(gm: fx.GraphModule, decompositions: Decompositions | None = None) -> Halves:
    """Cut a step graph where backward starts, so that what backward reads of forward is small.

    Args:
        gm: it is left alone.
        decompositions: a table to trace it with first; operators that are whole are never computed again.

    Raises:
        CannotSplit: ``gm`` has nowhere that backward starts, has side effects in an order, or graphs inside;
            or an operator is made of constants.
        PartitionerFailed: torch finds no cut.
    """
    start = outputs.input_nodes(gm).get(Tangent(0))
    if start is None or start.op == "placeholder":
        raise CannotSplit("its backward starts at no constant")
    for node in gm.graph.nodes:
        _check(gm, node)
    constants = gm.graph.find_nodes(op="get_attr")
    inputs = [*gm.graph.find_nodes(op="placeholder"), *constants, start]
    early, late = _results(gm, start)
    joint = _lifted(gm, inputs, [*early.values(), *late.values()])
    if decompositions:
        joint = _decomposed(joint, decompositions)
        if joint.graph.find_nodes(op="get_attr"):
            raise CannotSplit("a constant comes up where an operator is taken apart")
    joint = _named(joint)
    drawn = [node.name for node in joint.graph.nodes if is_random(node)]
    try:
        forward, backward = min_cut_rematerialization_partition(
            joint,
            None,
            num_fwd_outputs=len(early),
            static_lifetime_input_indices=list(range(len(inputs) - 1)),  # the caller holds them: no cost
        )
    except (RuntimeError, AssertionError) as error:
        raise PartitionerFailed(str(error)) from error
    origins = dict(zip(_names(len(inputs)), inputs, strict=True))
    return Halves(forward, backward, origins, [*early, *late], drawn)


def _check(gm: fx.GraphModule, node: fx.Node) -> None:
    schema: Any = getattr(node.target, "_schema", None)
    if node.target in EFFECTS or (schema is not None and schema.is_mutable):
        raise CannotSplit(f"{node.name} has a side effect, whose order counts")
    if node.op == "get_attr" and not isinstance(getattr(gm, str(node.target), None), Tensor):
        raise CannotSplit(f"{node.name} is a graph inside of the graph")


Results = dict[OutputDescriptor, fx.Node | None]


def _results(gm: fx.GraphModule, start: fx.Node) -> tuple[Results, Results]:
    """The results of forward and those of backward."""
    backward = downstream([start])
    early: Results = {}
    late: Results = {}
    for descriptor, node in outputs.output_nodes(gm).items():
        forward = isinstance(descriptor, Loss | Output | Mutation | Opaque) and node not in backward
        (early if forward else late)[descriptor] = node
    return early, late


# --- a joint graph that the partitioner can read -----------------------------------------------------

# NOTE: [Draws belong to backward] Cotangents that are drawn, and the copies of the backward below them,
# depend on no tangent, and no result of forward on them. The partitioner would be free to put a part of them
# in forward, or in both halves. What is left to its choice are the input sides of factors and the counts:
# the matrix A may be smaller than the activation that it is made of.


def _lifted(
    gm: fx.GraphModule, inputs: Sequence[fx.Node], results: Sequence[fx.Node | None]
) -> fx.GraphModule:
    """A copy with these inputs, the start of backward among them, and results."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for position, node in enumerate(inputs):
        env[node] = graph.placeholder(f"input_{position}")
        env[node].meta = {**node.meta, "val": _value(gm, node, inputs[-1])}
    for node in gm.graph.nodes:
        if node not in env and node.op == "call_function":
            env[node] = graph.node_copy(node, env.__getitem__)
            if is_draw(node):
                env[node].meta[SIDE] = "must_be_in_backward"
    graph.output(tuple(None if result is None else env[result] for result in results))
    return fx.GraphModule(gm, graph)


def _value(gm: fx.GraphModule, node: fx.Node, start: fx.Node) -> Any:
    """The fake value of an input; sizes are as they are."""
    value = node.meta.get("val")
    if value is None and node.op == "get_attr":
        value = getattr(gm, str(node.target)).to("meta")
    mode = start.meta["val"].fake_mode
    if not isinstance(value, Tensor):
        return value
    with mode:
        return in_mode(mode, value)


def _decomposed(joint: fx.GraphModule, decompositions: Decompositions) -> fx.GraphModule:
    """The same, traced again; tags on nodes go over to what comes of them."""
    values = [node.meta["val"] for node in joint.graph.find_nodes(op="placeholder")]
    interpreter = fx.Interpreter(joint)
    mode = values[-1].fake_mode
    tracing_mode = "real" if mode.shape_env is None else "symbolic"  # as in thor_fx.passes.splice
    with mode, torch.no_grad(), preserve_node_meta():
        return make_fx(interpreter.run, dict(decompositions), tracing_mode)(*values)


def _named(joint: fx.GraphModule) -> fx.GraphModule:
    """A copy whose inputs have the names that the partitioner goes by, and whose nodes know theirs."""
    graph = fx.Graph()
    inputs = joint.graph.find_nodes(op="placeholder")
    env: dict[fx.Node, fx.Node] = {}
    for node, name in zip(inputs, _names(len(inputs)), strict=True):
        env[node] = graph.placeholder(name)
        env[node].meta = dict(node.meta)
    for node in joint.graph.nodes:
        if node not in env:
            env[node] = graph.node_copy(node, env.__getitem__)
    for node in graph.nodes:
        node.meta[ORIGIN] = node.name
        if is_random(node):
            _save(node)
    return fx.GraphModule(joint, graph)


def _names(inputs: int) -> list[str]:
    return [*(f"primals_{position}" for position in range(1, inputs)), "tangents_1"]


def _save(node: fx.Node) -> None:
    """Let nobody compute a value again, in a checkpointed region neither."""
    node.meta[WISH] = CheckpointPolicy.MUST_SAVE
    for user in node.users:
        if user.target is operator.getitem:
            _save(user)


def forget_wishes(gm: fx.GraphModule) -> None:
    """Take off the tags on what should be computed again, in place.

    NOTE: torch acts on them once more when it compiles one graph with forward and backward, and raises where
    backward does not lie in one piece behind forward, or a region draws random numbers.
    """
    for node in gm.graph.nodes:
        node.meta.pop(WISH, None)
