"""Adapter to Dynamo and AOTAutograd: Python functions become step graphs.

The only module that knows ``torch._dynamo`` and the joint export of AOTAutograd. Written for torch
2.11, 2.13 and 2.15.

NOTE: [Dynamo guards the loss, we run the step] A loss function is handed to ``torch.compile`` with a
backend of our own. Dynamo traces the *forward* computation only, guards on everything it read
(shapes, modes, closures) and lifts every tensor to an argument. The backend turns that forward graph
into the joint graph, and returns a runner with the same arguments that does whatever the caller wants
with it: a whole training step, say. So the graph is never stale, and a new batch size goes through
Dynamo's dynamic shapes.
"""

import contextlib
import itertools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, fx
from torch._dynamo.exc import BackendCompilerFailed
from torch._functorch._aot_autograd import descriptors as aot
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from .parameters import trainable
from .passes import outputs
from .passes.outputs import Grad, Input, InputDescriptor, Loss, Mutation, Output, OutputDescriptor, Param, Tangent

LossFn = Callable[..., Any]
Runner = Callable[..., Sequence[Any]]
Handler = Callable[["Captured"], Runner]


@dataclass(frozen=True)
class Captured:
    """One trace of a loss function.

    Attributes:
        graph: the step graph; inputs in Dynamo's order, without tangents.
        forward: the same computation up to the loss, as Dynamo saw it.
        inputs: one descriptor for every argument that the runner gets.
    """

    graph: fx.GraphModule
    forward: fx.GraphModule
    inputs: tuple[InputDescriptor, ...]

    @property
    def fakes(self) -> list[Any]:
        """The fake values of the arguments, symbolic sizes among them."""
        return [node.meta["val"] for node in self.graph.graph.find_nodes(op="placeholder")]


class LossCapture:
    """A loss function under Dynamo, whose compiled form is decided by ``handler``.

    Args:
        loss_fn: ``loss_fn(params, *batch)`` returning a scalar loss or ``(loss, aux)``.
        handler: turns a :class:`Captured` into the callable that runs in place of the forward pass.
            It gets Dynamo's flat arguments and returns the values of the forward graph's outputs.
        dynamic: as in ``torch.compile``.
    """

    def __init__(self, loss_fn: LossFn, handler: Handler, dynamic: bool | None = None) -> None:
        self._handler = handler
        self._params: Mapping[str, Tensor] = {}
        self._frozen: frozenset[str] = frozenset()
        self._compiled = torch.compile(
            _own_code(_loss_and_detached_aux(loss_fn)), backend=self._backend, fullgraph=True, dynamic=dynamic
        )

    def __call__(self, params: Mapping[str, Tensor], *batch: Any) -> tuple[Tensor, Any]:
        """Run on these arguments; capture first if no guard fits."""
        self._params = params
        try:
            with torch.enable_grad():
                return self._compiled(params, *batch)
        except BackendCompilerFailed as error:
            raise error.inner_exception from None
        finally:
            self._params = {}

    def _backend(self, forward: fx.GraphModule, _: Sequence[Any]) -> Runner:
        captured = _capture(forward, self._params)
        return torch._dynamo.disable(self._handler(captured))


def fake_mode() -> FakeTensorMode:
    """A fresh mode under which tensors have shapes and no data."""
    return FakeTensorMode()


# --- the forward graph becomes a step graph --------------------------------------------------------


def _loss_and_detached_aux(loss_fn: LossFn) -> LossFn:
    def loss_and_aux(params: Mapping[str, Tensor], *batch: Any) -> tuple[Any, Any]:
        out = loss_fn(params, *batch)
        loss, aux = out if isinstance(out, tuple) and len(out) == 2 else (out, None)
        return loss, pytree.tree_map_only(Tensor, Tensor.detach, aux)

    return loss_and_aux


_serial = itertools.count()


def _own_code(function: Any) -> LossFn:
    """A copy with a code object of its own: Dynamo counts recompilations per code object."""
    code = function.__code__.replace(co_name=f"loss_{next(_serial)}")
    return types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)


def _capture(forward: fx.GraphModule, params: Mapping[str, Tensor]) -> Captured:
    names = {id(tensor): name for name, tensor in params.items() if trainable(tensor)}
    placeholders = forward.graph.find_nodes(op="placeholder")
    inputs = tuple(_describe_input(i, node, names) for i, node in enumerate(placeholders))
    fakes = [_leaf(node, descriptor) for node, descriptor in zip(placeholders, inputs, strict=True)]
    with contextlib.ExitStack() as stack:
        joint = aot_export_joint_with_descriptors(stack, forward, tuple(fakes)).graph_module
    graph = _step_graph(joint, inputs)
    return Captured(graph, forward, inputs)


def _describe_input(index: int, node: fx.Node, names: Mapping[int, str]) -> InputDescriptor:
    argument = node.meta.get("grapharg")
    example = None if argument is None else argument.example
    name = names.get(id(example))
    return Input(index) if name is None else Param(name)


def _leaf(node: fx.Node, descriptor: InputDescriptor) -> Any:
    value = node.meta["example_value"]
    if isinstance(value, Tensor):
        value = value.detach()
        return value.requires_grad_() if isinstance(descriptor, Param) else value
    return value


def _step_graph(joint: fx.GraphModule, inputs: Sequence[InputDescriptor]) -> fx.GraphModule:
    """Describe a joint graph, and start its backward from the constant 1 instead of a tangent."""
    graph = joint.graph
    graph.set_codegen(fx.graph.CodeGen())
    placeholders = graph.find_nodes(op="placeholder")
    tangents = [node for node in placeholders if isinstance(node.meta["desc"], aot.TangentAOTInput)]
    loss = _loss_index(tangents)
    results = outputs.output_node(graph)
    described = [
        (_describe_output(desc, inputs, loss), node)
        for desc, node in zip(results.meta["desc"], results.args[0], strict=True)  # type: ignore[arg-type]
        if node is not None  # no gradient
    ]
    results.args = (tuple(node for _, node in described),)
    _fold(tangents[0])
    outputs.describe(joint, inputs, [descriptor for descriptor, _ in described])
    value = outputs.output_nodes(joint)[Loss()].meta["val"]  # type: ignore[union-attr]
    if value.dim() != 0:
        raise ValueError(f"loss_fn must return a scalar loss, got shape {tuple(value.shape)}: take its mean")
    joint.recompile()
    return joint


def _loss_index(tangents: Sequence[fx.Node]) -> int:
    if not tangents:
        raise ValueError("the loss does not depend on any of params: call the model with them, not with its own")
    (tangent,) = tangents  # aux is detached: only the loss is differentiable
    return tangent.meta["desc"].output.idx


def _describe_output(desc: Any, inputs: Sequence[InputDescriptor], loss: int) -> OutputDescriptor:
    match desc:
        case aot.PlainAOTOutput(idx=index):
            return Loss() if index == loss else Output(index)
        case aot.InputMutationAOTOutput(mutated_input=aot.PlainAOTInput(idx=index)):
            return Mutation(index)
        case aot.GradAOTOutput(grad_of=aot.PlainAOTInput(idx=index)):
            source = inputs[index]
            return Grad(source.name if isinstance(source, Param) else index)
    return outputs.Opaque(desc.expr())


def _fold(tangent: fx.Node) -> None:
    value = tangent.meta["val"]
    graph = tangent.graph
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        one = graph.call_function(
            torch.ops.aten.full.default, ([], 1.0), {"dtype": value.dtype, "device": value.device, "pin_memory": False}
        )
    one.meta = {"val": value, outputs.KEY: Tangent(0)}
    tangent.replace_all_uses_with(one)
    graph.erase_node(tangent)
