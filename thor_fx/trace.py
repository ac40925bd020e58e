"""The researcher's door: a training step as an ATen graph to read and rewrite."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor, fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from .capture import Captured, LossCapture, LossFn, Runner
from .parameters import check_params, trainable
from .passes import outputs
from .passes.outputs import Frozen, Input, InputDescriptor, Mutation, Opaque, OutputDescriptor, Param


def trace_step(loss_fn: LossFn, params: Mapping[str, Tensor], *batch: Any) -> fx.GraphModule:
    """The step graph of ``loss_fn``: forward and backward, before any pass.

    The graph takes the parameters in the order of ``params``, then the tensors of ``batch``, and
    returns a flat tuple; :mod:`thor_fx.passes.outputs` says what each input and output is. Tensors
    that ``loss_fn`` closes over are buffers of the graph module.

    Args:
        loss_fn: ``loss_fn(params, *batch)``, returns a scalar loss or ``(loss, aux)``.
        params: floating-point tensors by name.
        *batch: tensors and nests of tensors.

    Returns:
        A step graph on which every pass of :mod:`thor_fx.passes` works.

    Raises:
        TypeError: ``params`` is no mapping of tensors.
        ValueError: ``params`` is empty or not floating-point, the loss is no scalar, or it does not
            depend on them.

    Example:
        >>> import torch
        >>> from thor_fx.passes import find_sites
        >>> def loss_fn(params, x):
        ...     return (x @ params["w"]).tanh().mean()
        >>> gm = trace_step(loss_fn, {"w": torch.ones(3, 2)}, torch.ones(5, 3))
        >>> [(site.layer, site.dims) for site in find_sites(gm).sites]
        [('w', (2, 3))]
    """
    check_params(params)
    batch = _distinct(batch)
    captured, flat = capture_once(loss_fn, params, *batch)
    leaves = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
    return _in_order_of_arguments(captured.graph, flat, params, leaves)


def _distinct(batch: tuple[Any, ...]) -> tuple[Any, ...]:
    """The batch with a copy where one tensor occurs twice: Dynamo would make one input of the two."""
    seen: set[int] = set()

    def copy(tensor: Tensor) -> Tensor:
        again = id(tensor) in seen
        seen.add(id(tensor))
        return tensor.clone() if again else tensor

    return pytree.tree_map_only(Tensor, copy, batch)


class _Captured(Exception):
    """Leaves Dynamo once the graph is there, before anything runs."""

    def __init__(self, captured: Captured, flat: tuple[Any, ...]) -> None:
        self.captured, self.flat = captured, flat


def capture_once(
    loss_fn: LossFn, params: Mapping[str, Tensor], *batch: Any
) -> tuple[Captured, tuple[Any, ...]]:
    """Capture ``loss_fn`` with static shapes; also return the flat arguments of the graph.

    Raises:
        ValueError: nothing depends on ``params``.
    """

    def handler(captured: Captured) -> Runner:
        def leave(*flat: Any) -> Any:
            raise _Captured(captured, flat)

        return leave

    try:
        LossCapture(loss_fn, handler, dynamic=False)(params, *batch)
    except _Captured as result:
        return result.captured, result.flat
    raise ValueError("the loss does not depend on any of params: it is a constant")


def _in_order_of_arguments(
    gm: fx.GraphModule, flat: tuple[Any, ...], params: Mapping[str, Tensor], leaves: list[Tensor]
) -> fx.GraphModule:
    old = gm.graph.find_nodes(op="placeholder")
    by_tensor = {id(value): node for node, value in zip(old, flat, strict=True)}
    descriptors: list[InputDescriptor] = []
    kept: dict[fx.Node, int] = {}
    with gm.graph.inserting_before(old[0]):
        for descriptor, value in _arguments(params, leaves):
            new = gm.graph.placeholder(_name(descriptor, len(descriptors)))
            descriptors.append(descriptor)
            node = by_tensor.get(id(value))
            if node is not None and node not in kept:
                node.replace_all_uses_with(new)
                kept[node] = len(descriptors) - 1
                new.meta["val"] = node.meta["val"]
            else:
                new.meta["val"] = value.detach().to("meta")
        for node, value in zip(old, flat, strict=True):
            if node not in kept:
                if isinstance(value, Tensor):
                    _to_buffer(gm, node, value)
                else:
                    _to_constant(node, value)
    results = [_moved(result, old, kept) for result in outputs.output_nodes(gm)]
    for node in old:
        gm.graph.erase_node(node)
    outputs.describe(gm, descriptors, results)
    gm.recompile()
    return gm


def _moved(result: OutputDescriptor, old: Sequence[fx.Node], kept: Mapping[fx.Node, int]) -> OutputDescriptor:
    """The descriptor of an output now that inputs have other positions, or are buffers."""
    if not isinstance(result, Mutation):
        return result
    node = old[result.index]
    return Mutation(kept[node]) if node in kept else Opaque(f"the new value of {_buffer_name(node)}")


def _arguments(params: Mapping[str, Tensor], leaves: list[Tensor]) -> list[tuple[InputDescriptor, Tensor]]:
    named: list[tuple[InputDescriptor, Tensor]] = [
        (Param(name) if trainable(value) else Frozen(name), value) for name, value in params.items()
    ]
    return named + [(Input(index), leaf) for index, leaf in enumerate(leaves)]


def _name(descriptor: InputDescriptor, position: int) -> str:
    """A Python identifier, unique even where two parameters differ in punctuation only."""
    if isinstance(descriptor, Param | Frozen):
        return re.sub(r"\W", "_", f"p{position}_{descriptor.name}")
    return f"x{position}_input"


def _buffer_name(node: fx.Node) -> str:
    return f"captured_{node.name}"


def _to_constant(node: fx.Node, number: Any) -> None:
    """Dynamo makes a Python number an input where the same code was compiled with another one before."""

    def constant(argument: fx.Node) -> Any:
        return number if argument is node else argument

    for user in list(node.users):
        user.args = cast(tuple[Any, ...], map_arg(user.args, constant))
        user.kwargs = cast(dict[str, Any], map_arg(user.kwargs, constant))


def _to_buffer(gm: fx.GraphModule, node: fx.Node, value: Any) -> None:
    gm.register_buffer(_buffer_name(node), value)
    buffer = gm.graph.get_attr(_buffer_name(node))
    buffer.meta["val"] = node.meta["val"]
    if isinstance(node.meta.get(outputs.KEY), Frozen):
        buffer.meta[outputs.KEY] = node.meta[outputs.KEY]
    node.replace_all_uses_with(buffer)
