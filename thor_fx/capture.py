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
import functools
import itertools
import logging
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo
from torch import Tensor, fx
from torch._decomp import decompositions
from torch._dynamo.exc import BackendCompilerFailed, Unsupported
from torch._dynamo.source import LocalSource
from torch._functorch._aot_autograd import descriptors as aot
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .parameters import trainable
from .passes import outputs
from .passes.nodes import upstream
from .passes.outputs import (
    Frozen,
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

CompilationFailed = BackendCompilerFailed
GraphBreak = Unsupported
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


ONE_GRAPH = (
    "thor_fx traces a loss function as one graph. A model that cannot be one (packed sequences, values that "
    "decide what is computed) can train through thor_fx.compile(model) and thor_fx.Thor, or call the part "
    "that cannot be traced outside of loss_fn."
)


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
        except Unsupported as error:
            error.add_note(ONE_GRAPH)
            raise
        finally:
            self._params = {}

    def _backend(self, forward: fx.GraphModule, _: Sequence[Any]) -> Runner:
        captured = _capture(forward, self._params)
        return without_dynamo(self._handler(captured))


def tracing_settings() -> contextlib.AbstractContextManager[Any]:
    """What Dynamo must do differently from stock compilation while it traces for us.

    It makes no symbol of a float that it has seen change (a scale, an epsilon): our export of the joint
    graph cannot resolve those. It traces recurrent modules, for which it would break the graph; see
    NOTE: [Recurrent nets]. And it leaves out what a model writes to a logger, for which it would break
    the graph, too: ``transformers`` warns once about the loss of GPT-2, for one.
    """
    settings: Any = torch._dynamo.config.patch(
        specialize_float=True,
        allow_rnn=True,
        ignore_logging_functions=torch._dynamo.config.ignore_logging_functions | _log_methods(),
    )
    return settings


def rnns_looked_into() -> contextlib.AbstractContextManager[Any]:
    """Let Dynamo look into recurrent modules as it does under :func:`tracing_settings`; all else is stock."""
    settings: Any = torch._dynamo.config.patch(allow_rnn=True)
    return settings


def has_recurrent_operator(forward: fx.GraphModule) -> bool:
    """Whether a recurrent layer is part of one of Dynamo's graphs."""
    return any(getattr(node.target, "__name__", "") in RECURRENT for node in forward.graph.nodes)


RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}


# NOTE: [Recurrent nets] ``aten.lstm``, ``gru`` and ``rnn_*`` decompose into their time steps, by Python
# code of torch (2.11, 2.13 and 2.15) that was written for inference. Twice it is wrong for training:
# an LSTM on a CPU in float32 or bfloat16 becomes oneDNN's fused layer in its form for inference, which
# keeps nothing for backward (AOTAutograd would save a None); and dropout between layers never happens.


@contextlib.contextmanager
def trainable_rnns() -> Iterator[None]:
    """Decompose recurrent layers as training needs it. See NOTE: [Recurrent nets]."""
    layers = decompositions._rnn_helper
    ours: dict[str, Any] = {
        "mkldnn_one_layer_lstm": decompositions.one_layer_lstm,
        "_rnn_helper": functools.partial(_layer_by_layer, layers),
    }
    with patch.multiple(decompositions, **ours):
        yield


def _layer_by_layer(
    layers: Callable[..., tuple[Tensor, list[Any]]],
    x: Tensor,
    hidden: Sequence[Any],
    params: Sequence[Any],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    *rest: Any,
) -> tuple[Tensor, list[Any]]:
    """What ``layers`` does, with dropout before all layers but the first."""
    directions = 2 if bidirectional else 1
    final_hidden: list[Any] = []
    for i in range(num_layers):
        if i > 0 and train and dropout > 0:
            x = torch.dropout(x, dropout, train)
        own = slice(i * directions, (i + 1) * directions)
        x, final = layers(x, hidden[own], params[own], has_biases, 1, 0.0, train, bidirectional, *rest)
        final_hidden += final
    return x, final_hidden


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
    _refuse_sparse_gradients(forward, inputs)
    _refuse_subclasses(forward)
    return Captured(_step_graph(_joint_of_loss(forward, inputs)), forward, inputs)


EMBEDDINGS: dict[Any, int] = {torch.nn.functional.embedding: 6, torch.nn.functional.embedding_bag: 7}
"""Where their argument ``sparse`` is."""


def _refuse_sparse_gradients(forward: fx.GraphModule, inputs: Sequence[InputDescriptor]) -> None:
    placeholders = forward.graph.find_nodes(op="placeholder")
    names = {n: d.name for n, d in zip(placeholders, inputs, strict=True) if isinstance(d, Param)}
    for node in filter(_has_sparse_gradient, forward.graph.nodes):
        name = next((names[n] for n in upstream(node.all_input_nodes) if n in names), None)
        if name is not None:
            raise TypeError(
                f"the gradient of {name!r} is sparse: THOR needs dense gradients (sparse=False on the "
                "embedding)"
            )


def _has_sparse_gradient(node: fx.Node) -> bool:
    position = EMBEDDINGS.get(node.target) if node.op == "call_function" else None
    if position is None:
        return False
    return bool(node.kwargs.get("sparse", len(node.args) > position and node.args[position]))


def _refuse_subclasses(forward: fx.GraphModule) -> None:
    """The joint graph would take the tensors inside, and the runner gets the ones outside."""
    for node in forward.graph.find_nodes(op="placeholder"):
        value = node.meta.get("example_value")
        if is_traceable_wrapper_subclass(value):
            raise TypeError(
                f"loss_fn reads a {type(value).__name__}; a compiled step takes plain tensors only: "
                "train the model with thor_fx.compile(model) and thor_fx.Thor, or unwrap the tensor"
            )


def _joint_of_loss(forward: fx.GraphModule, inputs: Sequence[InputDescriptor]) -> fx.GraphModule:
    """The joint graph in which the loss alone is differentiable.

    ``aux`` is detached, but ``loss_fn`` may leave further results in attributes of a module. Dynamo
    returns them after the loss.
    """
    joint = export_joint(forward, inputs)
    differentiable = sorted(d.index for d in outputs.input_nodes(joint) if isinstance(d, Tangent))
    return export_joint(_detach(forward, differentiable[1:]), inputs) if differentiable[1:] else joint


def _detach(forward: fx.GraphModule, positions: Iterable[int]) -> fx.GraphModule:
    result = copy.copy(forward)
    result.graph = copy.deepcopy(forward.graph)
    out = outputs.output_node(result.graph)
    returned = outputs.results(result)
    for i in positions:
        with result.graph.inserting_before(out):
            returned[i] = result.graph.call_method("detach", (returned[i],))
    out.args = (tuple(returned),)
    result.recompile()
    return result


def describe_forward_inputs(
    forward: fx.GraphModule, params: Mapping[str, Tensor]
) -> tuple[InputDescriptor, ...]:
    """What every argument of Dynamo's forward graph is, by identity of the tensors it saw."""
    names: dict[int, InputDescriptor] = {
        id(tensor): Param(name) if trainable(tensor) else Frozen(name) for name, tensor in params.items()
    }
    placeholders = forward.graph.find_nodes(op="placeholder")
    return tuple(_describe_input(i, node, names) for i, node in enumerate(placeholders))


def _describe_input(index: int, node: fx.Node, names: Mapping[int, InputDescriptor]) -> InputDescriptor:
    argument = node.meta.get("grapharg")
    example = None if argument is None else argument.example
    captured = Frozen(node.name) if isinstance(example, torch.nn.Parameter) else Input(index)
    return names.get(id(example), captured)


def export_joint(forward: fx.GraphModule, inputs: Sequence[InputDescriptor]) -> fx.GraphModule:
    """The joint graph of a forward graph, functional, in ATen operators, with our descriptors."""
    placeholders = forward.graph.find_nodes(op="placeholder")
    fakes = [_leaf(node, descriptor) for node, descriptor in zip(placeholders, inputs, strict=True)]
    mode = _mode_of(fakes)
    with contextlib.ExitStack() as stack:
        stack.enter_context(tracing(TracingContext(mode)))
        stack.enter_context(trainable_rnns())
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
    for node in placeholders:
        if _is_zero_tangent(node):
            _leave_out_of_sums(node)


# NOTE: [Parameters that forward changes] ``nn.Embedding(max_norm=...)`` shrinks rows of its weight in
# forward, without gradient. AOTAutograd makes the changed weight an output with a tangent of its own,
# added to the gradient. Nobody can differentiate through what became of a leaf: that tangent is zero.
# The update then starts from the changed weight, as an optimizer does that runs after forward.


def _is_zero_tangent(node: fx.Node) -> bool:
    match node.meta["desc"]:
        case aot.TangentAOTInput(output=aot.InputMutationAOTOutput()):
            return True
    return False


def _leave_out_of_sums(zero: fx.Node) -> None:
    for total in list(zero.users):
        if total.target is torch.ops.aten.add.Tensor and not total.kwargs:
            (other,) = [node for node in total.all_input_nodes if node is not zero] or [zero]
            if other.meta["val"].shape == total.meta["val"].shape:
                total.replace_all_uses_with(other)
                total.graph.erase_node(total)


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
    _unlift_tokens(joint)
    tangents = {d.index: n for d, n in outputs.input_nodes(joint).items() if isinstance(d, Tangent)}
    trained = [d for d in outputs.output_nodes(joint) if isinstance(d, Grad) and isinstance(d.param, str)]
    if not tangents or not trained:
        raise ValueError(
            "the loss does not depend on any of params: call the model with them, not with its own"
        )
    ((index, tangent),) = tangents.items()  # only the loss is differentiable
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
    for node in joint.graph.find_nodes(op="placeholder"):
        if _is_zero_tangent(node):
            _fold(node, 0.0)
    _fold(tangent, 1.0).meta[outputs.KEY] = Tangent(0)
    joint.recompile()
    return joint


def _fold(tangent: fx.Node, number: float) -> fx.Node:
    """Replace an input by a constant."""
    value = tangent.meta["val"]
    graph = tangent.graph
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        constant = graph.call_function(
            torch.ops.aten.full.default,
            (list(value.shape), number),
            {"dtype": value.dtype, "device": value.device, "pin_memory": False},
        )
    constant.meta = {"val": value}
    tangent.replace_all_uses_with(constant)
    graph.erase_node(tangent)
    return constant


def _unlift_tokens(joint: fx.GraphModule) -> None:
    """Make the tokens that order effects (checks of ``linalg``, prints) inside, not arguments and results."""
    graph, out = joint.graph, outputs.output_node(joint.graph)
    placeholders = graph.find_nodes(op="placeholder")
    for node in placeholders:
        if isinstance(node.meta["desc"], TOKENS):
            with graph.inserting_after(placeholders[-1]):
                token = graph.call_function(torch.ops.prims._make_token.default)
            token.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(token)
            graph.erase_node(node)
    described = zip(out.meta["desc"], out.meta[outputs.KEY], outputs.results(joint), strict=True)
    kept = [(key, node) for desc, key, node in described if not isinstance(desc, TOKENS)]
    out.args = (tuple(node for _, node in kept),)
    out.meta[outputs.KEY] = tuple(key for key, _ in kept)


TOKENS = (
    aot.ForwardTokenAOTInput,
    aot.BackwardTokenAOTInput,
    aot.ForwardTokenAOTOutput,
    aot.BackwardTokenAOTOutput,
)


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


def new_leaf(slot: Tensor) -> Tensor:
    """A leaf of its own that shares the memory of a slot."""
    return slot.detach().requires_grad_()


def current_backward() -> int | None:
    """The number of the backward pass that is running in this thread; None outside of one."""
    number = torch._C._current_graph_task_id()
    return None if number < 0 else number
