"""Adapter to Dynamo and AOTAutograd: Python functions become step graphs.

The only module that knows how Dynamo traces and how AOTAutograd exports a joint graph; what that graph
means is in joint_graphs.py. Written for torch 2.11, 2.13 and 2.15.

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
from torch._dynamo.convert_frame import compile_lock
from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit, Unsupported
from torch._dynamo.source import LocalSource
from torch._dynamo.utils import preserve_rng_state
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .distributed.dtensors import split_of
from .joint_graphs import describe_joint, step_graph
from .parameters import trainable
from .passes import outputs
from .passes.nodes import upstream
from .passes.outputs import Frozen, Input, InputDescriptor, Param, Tangent
from .recurrent import trainable_rnns

CompilationFailed = BackendCompilerFailed
GraphBreak = Unsupported
without_drawing = preserve_rng_state
LossFn = Callable[..., Any]
Runner = Callable[..., Sequence[Any]]
Handler = Callable[["Captured"], Runner]
Held = Callable[[Tensor], bool]
"""Whether a tensor belongs to the model or the loss function, and is no data."""


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

MANY_GRAPHS = (
    "thor_fx: {} graphs of this step have been compiled, and this call fits none of them. Sizes of batches "
    "share a graph unless the loss function looks at them (a loop over rows, a size as a number): "
    "TORCH_LOGS=recompiles says which. Pad batches to a few sizes, or raise "
    "torch._dynamo.config.recompile_limit."
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
        self._data: Sequence[Any] = ()
        loss_and_aux = own_code(_loss_and_detached_aux(loss_fn))
        settings: dict[str, Any] = {"fullgraph": True, "dynamic": dynamic}
        self._compiled = patient(torch.compile(loss_and_aux, backend=self._backend, **settings))

    def __call__(
        self, params: Mapping[str, Tensor], *batch: Any, data: Sequence[Any] | None = None
    ) -> tuple[Tensor, Any]:
        """Run on these arguments; capture first if no guard fits. ``data`` is ``batch`` unless given."""
        self._params, self._data = params, batch if data is None else data
        try:
            with torch.enable_grad(), self._settings():
                return self._compiled(params, *batch)
        except BackendCompilerFailed as error:
            raise error.inner_exception from None
        except Unsupported as error:
            error.add_note(ONE_GRAPH)
            raise
        except FailOnRecompileLimitHit as error:
            error.add_note(MANY_GRAPHS.format(torch._dynamo.config.recompile_limit))
            raise
        finally:
            self._params, self._data = {}, ()

    def _backend(self, forward: fx.GraphModule, _: Sequence[Any]) -> Runner:
        data = {id(leaf) for leaf in pytree.tree_leaves(self._data)}
        captured = _capture(forward, self._params, lambda tensor: id(tensor) not in data)
        return without_dynamo(self._handler(captured))


def tracing_settings() -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """A maker of contexts in which Dynamo does what it must do otherwise than in stock compilation.

    It makes no symbol of a float that it has seen change (a scale, an epsilon): our export of the joint
    graph cannot resolve those. It traces recurrent modules, for which it would break the graph; see
    NOTE: [Recurrent nets] in recurrent.py. And it leaves out what a model writes to a logger, for which
    it would break the graph, too: ``transformers`` warns once about the loss of GPT-2, for one. The set of
    these methods is built here, once for a door.
    """
    settings: dict[str, Any] = {
        "specialize_float": True,
        "allow_rnn": True,
        "ignore_logging_functions": torch._dynamo.config.ignore_logging_functions | _log_methods(),
    }
    patched = _patching(**settings)
    return functools.partial(_unlogged, patched) if OLD_PATCHES else patched


# NOTE: [One patch] From torch 2.13 on, a patch of the settings has a context variable, whose value Python
# keeps for good: one patch for every step would be a leak. The same one may be entered again, also while it
# is entered already. That of torch 2.11 may not, and keeps nothing.
OLD_PATCHES = torch.__version__.startswith("2.11")


def _patching(**settings: Any) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """A maker of contexts in which Dynamo has other settings."""
    patched = functools.partial(torch._dynamo.config.patch, **settings)
    if OLD_PATCHES:
        return patched
    one = patched()
    return lambda: one


@contextlib.contextmanager
def _unlogged(patched: Callable[[], contextlib.AbstractContextManager[Any]]) -> Iterator[None]:
    """Torch 2.11 wants to log its settings, and logs an error where one of them is a set of functions."""
    with patched(), patch("torch._dynamo.utils._get_dynamo_config_for_logging", lambda: None):
        yield


def rnns_looked_into() -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """A maker of contexts in which Dynamo looks into recurrent modules as under :func:`tracing_settings`."""
    return _patching(allow_rnn=True)


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


# NOTE: [Threads] While one thread traces, ``nn.Module`` is patched for all. Dynamo's guards read it, so
# whoever traces holds Dynamo's lock. And before torch 2.15 a compiled function that another thread calls
# meanwhile believes that it is being traced, and refuses before anything has run.


def tracing_alone() -> contextlib.AbstractContextManager[Any]:
    """Keep other threads from tracing: see NOTE: [Threads]."""
    return compile_lock


def patient(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled function that waits for other threads that trace: see NOTE: [Threads]."""

    @functools.wraps(compiled)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return compiled(*args, **kwargs)
        except RuntimeError as error:
            if "using FX to symbolically trace" not in str(error):
                raise
        with tracing_alone():
            return compiled(*args, **kwargs)

    return call


def without_dynamo(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which Dynamo must not look into."""
    return torch._dynamo.disable(function)


def fake_mode() -> FakeTensorMode:
    """A fresh mode under which tensors have shapes and no data.

    With a ``ShapeEnv``, of which static shapes need nothing: without one Inductor caches no graph.
    """
    return FakeTensorMode(shape_env=ShapeEnv())


# --- the forward graph becomes a step graph --------------------------------------------------------


def _loss_and_detached_aux(loss_fn: LossFn) -> LossFn:
    def loss_and_aux(params: Mapping[str, Tensor], *batch: Any) -> tuple[Any, Any]:
        out = loss_fn(params, *batch)
        loss, aux = out if isinstance(out, tuple) and len(out) == 2 else (out, None)
        return loss, pytree.tree_map_only(Tensor, Tensor.detach, aux)

    return loss_and_aux


def _capture(forward: fx.GraphModule, params: Mapping[str, Tensor], is_held: Held) -> Captured:
    inputs = describe_forward_inputs(forward, examples_of(forward), params, is_held)
    _refuse_sparse_gradients(forward, inputs)
    _refuse_subclasses(forward)
    return Captured(step_graph(_joint_of_loss(forward, inputs)), forward, inputs)


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


def examples_of(forward: fx.GraphModule) -> list[Any]:
    """The arguments that Dynamo saw; it forgets them when it is done."""
    placeholders = forward.graph.find_nodes(op="placeholder")
    arguments = [node.meta.get("grapharg") for node in placeholders]
    return [None if argument is None else argument.example for argument in arguments]


def describe_forward_inputs(
    forward: fx.GraphModule, examples: Sequence[Any], params: Mapping[str, Tensor], is_held: Held
) -> tuple[InputDescriptor, ...]:
    """What every argument of Dynamo's forward graph is, by identity.

    Args:
        forward: the graph.
        examples: its arguments in one call.
        params: the parameters, by name.
        is_held: see :data:`Held`.

    Matrices that are held count as frozen weights: a low-rank adapter may be no parameter. Where
    everything is held (a loss function that closes over its data), they count as data.
    """
    seen = set(map(id, examples))
    names: dict[int, InputDescriptor] = {
        id(tensor): Param(name, split_of(name, tensor)) if trainable(tensor) else Frozen(name)
        for name, tensor in params.items()
        if id(tensor) in seen
    }
    placeholders = forward.graph.find_nodes(op="placeholder")
    others = [e for e in examples if isinstance(e, Tensor) and id(e) not in names]
    has_data = not all(map(is_held, others))

    def describe(index: int, node: fx.Node, example: Any) -> InputDescriptor:
        if id(example) in names:
            return names[id(example)]
        frozen = isinstance(example, torch.nn.Parameter) or (
            has_data and _is_matrix(example) and is_held(example)
        )
        return Frozen(node.name) if frozen else Input(index)

    arguments = zip(placeholders, examples, strict=True)
    return tuple(describe(index, *argument) for index, argument in enumerate(arguments))


def _is_matrix(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() >= 2 and value.is_floating_point()


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


def is_fake(value: Any) -> bool:
    """Whether a value stands for a tensor while something is compiled."""
    return isinstance(value, FakeTensor)


def new_leaf(slot: Tensor) -> Tensor:
    """A leaf of its own that shares the memory of a slot."""
    return slot.detach().requires_grad_()


def current_backward() -> int | None:
    """The number of the backward pass that is running in this thread; None outside of one."""
    number = torch._C._current_graph_task_id()
    return None if number < 0 else number
