"""Adapter to Dynamo and AOTAutograd: Python functions become step graphs.

The only module that knows ``torch._dynamo`` and the joint export of AOTAutograd. Written for
torch 2.11, 2.13 and 2.15.

NOTE: [Dynamo guards the loss, we run the step] A loss function is handed to ``torch.compile`` with a
backend of our own. Dynamo traces the *forward* computation only, guards on everything it read
(shapes, modes, closures) and lifts every tensor to an argument. The backend turns that forward graph
into the joint graph, and returns a runner with the same arguments that does whatever the caller wants
with it: a whole training step, say. So the graph is never stale, and a new batch size goes through
Dynamo's dynamic shapes.
"""

import contextlib
import copy
import itertools
import logging
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, fx
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.source import LocalSource
from torch._functorch._aot_autograd import descriptors as aot
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from .parameters import trainable
from .passes import outputs
from .passes.outputs import (
    Grad,
    Input,
    InputDescriptor,
    Loss,
    Mutation,
    Output,
    OutputDescriptor,
    Param,
    Tangent,
)

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
        self._settings = tracing_settings()
        self._params: Mapping[str, Tensor] = {}
        self._frozen: frozenset[str] = frozenset()
        self._compiled = torch.compile(
            own_code(_loss_and_detached_aux(loss_fn)), backend=self._backend, fullgraph=True, dynamic=dynamic
        )

    def __call__(self, params: Mapping[str, Tensor], *batch: Any) -> tuple[Tensor, Any]:
        """Run on these arguments; capture first if no guard fits."""
        self._params = params
        try:
            with torch.enable_grad(), self._settings:
                return self._compiled(params, *batch)
        except BackendCompilerFailed as error:
            raise error.inner_exception from None
        finally:
            self._params = {}

    def _backend(self, forward: fx.GraphModule, _: Sequence[Any]) -> Runner:
        captured = _capture(forward, self._params)
        return without_dynamo(self._handler(captured))


def tracing_settings() -> contextlib.AbstractContextManager[Any]:
    """What Dynamo must do differently from stock compilation while it traces for us.

    It makes no symbol of a float that it has seen change (a scale, an epsilon): our export of the
    joint graph cannot resolve those. And it leaves out what a model writes to a logger, for which it
    would break the graph: ``transformers`` warns once about the loss of GPT-2, for one.
    """
    silent = torch._dynamo.config.ignore_logging_functions | _log_methods()
    patch: Any = torch._dynamo.config.patch(specialize_float=True, ignore_logging_functions=silent)
    return patch


def _log_methods() -> set[Callable[..., Any]]:
    """The methods of loggers that write a message, those that packages have added included."""
    levels = ("debug", "info", "warn", "error", "exception", "critical", "log")
    return {method for name, method in vars(logging.Logger).items() if name.startswith(levels)}


def own_code(function: Any) -> Callable[..., Any]:
    """A copy with a code object of its own: Dynamo counts recompilations per code object."""
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_serial)}")
    return types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )


_serial = itertools.count()


def without_dynamo(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which Dynamo must not look into."""
    return torch._dynamo.disable(function)


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


def _capture(forward: fx.GraphModule, params: Mapping[str, Tensor]) -> Captured:
    inputs = describe_forward_inputs(forward, params)
    joint = export_joint(forward, inputs)
    return Captured(_step_graph(joint), forward, inputs)


def describe_forward_inputs(
    forward: fx.GraphModule, params: Mapping[str, Tensor]
) -> tuple[InputDescriptor, ...]:
    """What every argument of Dynamo's forward graph is, by identity of the tensors it saw."""
    names = {id(tensor): name for name, tensor in params.items() if trainable(tensor)}
    placeholders = forward.graph.find_nodes(op="placeholder")
    return tuple(_describe_input(i, node, names) for i, node in enumerate(placeholders))


def _describe_input(index: int, node: fx.Node, names: Mapping[int, str]) -> InputDescriptor:
    argument = node.meta.get("grapharg")
    example = None if argument is None else argument.example
    name = names.get(id(example))
    return Input(index) if name is None else Param(name)


def export_joint(forward: fx.GraphModule, inputs: Sequence[InputDescriptor]) -> fx.GraphModule:
    """The joint graph of a forward graph, functional, in ATen operators, with our descriptors."""
    placeholders = forward.graph.find_nodes(op="placeholder")
    fakes = [_leaf(node, descriptor) for node, descriptor in zip(placeholders, inputs, strict=True)]
    mode = _mode_of(fakes)
    with contextlib.ExitStack() as stack:
        stack.enter_context(tracing(TracingContext(mode)))
        joint = aot_export_joint_with_descriptors(stack, forward, tuple(fakes)).graph_module
    joint.graph.set_codegen(fx.graph.CodeGen())
    describe_joint(joint, inputs)
    joint.recompile()
    return joint


def _mode_of(values: Iterable[Any]) -> FakeTensorMode:
    return next(value.fake_mode for value in values if isinstance(value, FakeTensor))


def _leaf(node: fx.Node, descriptor: InputDescriptor) -> Any:
    value = node.meta["example_value"]
    if not isinstance(value, Tensor):
        return value
    differentiable = isinstance(descriptor, Param) or value.requires_grad
    return value.detach().requires_grad_(differentiable)


def describe_joint(joint: fx.GraphModule, inputs: Sequence[InputDescriptor]) -> None:
    """Translate AOTAutograd's descriptors of a joint graph into ours.

    Args:
        joint: as AOTAutograd hands it to compilers.
        inputs: what the inputs of the forward graph are, in order.
    """
    placeholders = joint.graph.find_nodes(op="placeholder")
    results = outputs.output_node(joint.graph)
    described_inputs = [_describe_joint_input(i, node, inputs) for i, node in enumerate(placeholders)]
    described_outputs = [
        _describe_output(position, desc, inputs) for position, desc in enumerate(results.meta["desc"])
    ]
    outputs.describe(joint, described_inputs, described_outputs)


def _describe_joint_input(position: int, node: fx.Node, inputs: Sequence[InputDescriptor]) -> InputDescriptor:
    match node.meta["desc"]:
        case aot.PlainAOTInput(idx=index):
            return inputs[index]
        case aot.TangentAOTInput(output=aot.PlainAOTOutput(idx=index)):
            return Tangent(index)
    return Input(-1 - position)  # a random seed, a tangent of an aliased output, ...


def _describe_output(position: int, desc: Any, inputs: Sequence[InputDescriptor]) -> OutputDescriptor:
    match desc:
        case aot.PlainAOTOutput(idx=index):
            return Output(index)
        case aot.InputMutationAOTOutput(mutated_input=aot.PlainAOTInput(idx=index)):
            return Mutation(index)
        case aot.GradAOTOutput(grad_of=aot.PlainAOTInput(idx=index)):
            source = inputs[index]
            return Grad(source.name if isinstance(source, Param) else index)
    return outputs.Opaque(f"output {position}")


def _step_graph(joint: fx.GraphModule) -> fx.GraphModule:
    """Start the backward of a joint graph from the constant 1 instead of a tangent."""
    tangents = {d.index: n for d, n in outputs.input_nodes(joint).items() if isinstance(d, Tangent)}
    trained = [d for d in outputs.output_nodes(joint) if isinstance(d, Grad) and isinstance(d.param, str)]
    if not tangents or not trained:
        raise ValueError(
            "the loss does not depend on any of params: call the model with them, not with its own"
        )
    ((index, tangent),) = tangents.items()  # aux is detached: only the loss is differentiable
    described = [
        (Loss() if descriptor == Output(index) else descriptor, node)
        for descriptor, node in outputs.output_nodes(joint).items()
        if node is not None  # no gradient
    ]
    results = outputs.output_node(joint.graph)
    results.args = (tuple(node for _, node in described),)
    results.meta[outputs.KEY] = tuple(descriptor for descriptor, _ in described)
    value = outputs.output_nodes(joint)[Loss()].meta["val"]  # type: ignore[union-attr]
    if value.dim() != 0:
        raise ValueError(f"loss_fn must return a scalar loss, got shape {tuple(value.shape)}: take its mean")
    _fold(tangent)
    joint.recompile()
    return joint


def _fold(tangent: fx.Node) -> None:
    value = tangent.meta["val"]
    graph = tangent.graph
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        one = graph.call_function(
            torch.ops.aten.full.default,
            ([], 1.0),
            {"dtype": value.dtype, "device": value.device, "pin_memory": False},
        )
    one.meta = {"val": value, outputs.KEY: Tangent(0)}
    tangent.replace_all_uses_with(one)
    graph.erase_node(tangent)


# --- slots -----------------------------------------------------------------------------------------

# NOTE: [Slots] AOTAutograd refuses backward outputs beyond one gradient per input. But an extra input
# that requires grad and is unused in forward has nothing at its gradient's place. The factor goes
# there, and autograd delivers it in ``slot.grad``: it adds up over backward passes by itself.


def add_slots(forward: fx.GraphModule, slots: Sequence[Tensor]) -> tuple[fx.GraphModule, list[Tensor]]:
    """A copy of a forward graph with one more, unused input for every slot; and their fake values."""
    result = copy.deepcopy(forward)  # Dynamo goes on using its own
    placeholders = result.graph.find_nodes(op="placeholder")
    last = placeholders[-1]
    mode = _mode_of(node.meta.get("example_value") for node in placeholders)
    fakes: list[Tensor] = []
    for index, slot in enumerate(slots):
        with result.graph.inserting_after(last):
            last = result.graph.placeholder(f"slot_{index}")
        fakes.append(mode.from_tensor(slot, static_shapes=True))
        last._dynamo_source = LocalSource(f"slot_{index}")
        last.meta["example_value"] = fakes[-1]
    result.recompile()
    return result, fakes


def make_slot(shape: Sequence[int], like: Tensor) -> Tensor:
    """A leaf that takes no memory, in the dtype that the factors of a parameter ``like`` are summed in."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.zeros((), dtype=dtype, device=like.device).expand(tuple(shape)).requires_grad_()
