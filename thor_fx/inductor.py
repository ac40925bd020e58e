"""Adapter to Inductor: graphs become callables.

The only module that knows ``torch._inductor``. Written for torch 2.11, 2.13 and 2.15.
"""

import copy
import functools
import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from functorch.compile import default_partition, make_boxed_func
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.source import LocalSource
from torch._guards import TracingContext, tracing
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options, list_options
from torch._inductor.choices import InductorChoices
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.exc import GPUTooOldForTriton, InductorError, InvalidCxxCompiler, TritonMissing
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor

from .arguments import check_type
from .distributed.collectives import is_collective
from .interpreted import interpreted
from .passes.splice import Decompositions
from .passes.stitch import BACKWARD, FORWARD, SIDE
from .uncompiled import OnCompileError, compiled_or

Compiled = Callable[..., Sequence[Any]]


class NoCompiler(RuntimeError):
    """Inductor needs a compiler that is not installed."""


COMPILER_ERRORS = (InductorError, InvalidCxxCompiler, TritonMissing, GPUTooOldForTriton)
"""What Inductor raises where it cannot compile."""

_OTHERWISE = (
    "; or pass backend='aot_eager' to thor_fx.compile or thor_fx.compile_step (and to Thor, if you gave it a "
    "backend): it interprets the graphs, and needs no compiler"
)
_FOR_CPU = (
    "backend='inductor' writes C++ for a CPU, and there is no C++ compiler: install one (apt install g++, "
    "dnf install gcc-c++, conda install gxx, xcode-select --install), or let the variable CXX name it"
    + _OTHERWISE
)
_FOR_GPU = (
    "backend='inductor' writes Triton for a GPU, and Triton does not work here: pip install triton, in the "
    "version that this torch names (pip show torch)" + _OTHERWISE
)
_FOR_TRITON = (
    "Triton, which backend='inductor' writes for a GPU, builds its launchers with a C compiler, and there is "
    "none: install one (apt install gcc), or let the variable CC name it" + _OTHERWISE
)


def tell_of_compiler(error: BaseException) -> None:
    """Say in our words that a compiler is missing, if that is what an error of Inductor's is about.

    Raises:
        NoCompiler: naming it, and what to do.
    """
    cause = getattr(error, "inner_exception", error)
    if isinstance(cause, InvalidCxxCompiler):
        raise NoCompiler(f"{_FOR_CPU}. torch says: {cause}") from error
    if isinstance(cause, TritonMissing | GPUTooOldForTriton):
        raise NoCompiler(f"{_FOR_GPU}. torch says: {cause}") from error
    if "Failed to find C compiler" in str(cause):
        raise NoCompiler(f"{_FOR_TRITON}. Triton says: {cause}") from error


BACKENDS = ("inductor", "aot_eager", "eager")


def check_backend(backend: str, name: str = "backend") -> None:
    """Refuse a backend that step graphs cannot be given to.

    Raises:
        ValueError: naming the ones that exist.
    """
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"{name} must be one of {list(BACKENDS)}, got {backend!r}")


def check_settings(mode: Any, options: Any) -> None:
    """Refuse a ``mode`` or ``options`` that Inductor does not have, whatever the backend.

    Raises:
        TypeError: ``mode`` is no text, or ``options`` no mapping.
        ValueError: naming the modes that there are, or the option that there is not.
    """
    if mode is not None:
        modes = list(list_mode_options())
        check_type("mode", mode, str, f"one of {modes} or None")
        if mode not in modes:
            raise ValueError(f"mode must be one of {modes} or None, got {mode!r}")
    if options is None:
        return
    check_type("options", options, Mapping, "a mapping from settings of Inductor to values, or None")
    known = list_options()
    for name in options:
        if not isinstance(name, str) or name.replace("-", "_") not in known:
            raise ValueError(f"options has {name!r}, which is no setting: see torch._inductor.list_options()")


def replays(mode: str | None, options: Mapping[str, Any] | None) -> bool:
    """Whether CUDA graphs are asked for."""
    return bool(_patches(mode, options).get("triton.cudagraphs"))


# NOTE: [Few pairs] Inductor asks of every two readers of one buffer, if they are near enough in order,
# whether to fuse them. All parameters read the same learning rate, and whether the step is skipped: with
# hundreds of them most of the time would go to these questions. Neighbours suffice: what is fused is a
# neighbour again.
FEW_PAIRS = {"max_fusion_buffer_group_pairwise_attempts": 16}

# NOTE: [Late waits] Inductor keeps the order of collectives, and orders everything else for little memory:
# then it waits for most of them right behind their start. This pass comes last, and moves waits only: as late
# as they can be.
LATE_WAITS: dict[str, Any] = {
    "reorder_for_compute_comm_overlap": True,
    "reorder_for_compute_comm_overlap_passes": ["sink_waits"],
}


def compile_graph(
    gm: fx.GraphModule,
    fakes: Sequence[Any],
    *,
    backend: str = "inductor",
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    fixed: Collection[fx.Node] = (),
    on_error: OnCompileError = "raise",
) -> Compiled:
    """Compile a flat graph that is not differentiated any further.

    Args:
        gm: takes flat arguments, returns a flat tuple; it may write to its arguments with ``copy_``.
        fakes: the fake values of its arguments, symbolic sizes among them.
        backend: ``"inductor"``, or one of the others to interpret the graph as it is.
        mode: as in ``torch.compile``.
        options: Inductor settings, as in ``torch.compile``.
        fixed: the arguments that are the same tensors in every call. CUDA graphs write into no others, and
            copy those first.
        on_error: ``"eager"``: where Inductor fails, interpret the graph as it is, with a warning.

    Raises:
        NoCompiler: Inductor finds none.
    """
    if backend != "inductor":
        return interpreted(gm)
    late = LATE_WAITS if any(map(is_collective, gm.graph.nodes)) else {}
    patches = {**FEW_PAIRS, **late, **_patches(mode, options)}
    if patches.get("triton.cudagraphs"):
        _tell_fixed(gm, fixed)
    fake_mode = next(fake.fake_mode for fake in fakes if isinstance(fake, FakeTensor))
    with (
        tracing(TracingContext(fake_mode)),
        torch.no_grad(),
        inductor_config.patch(patches),
        V.set_choices_handler(_halves_apart(V.choices) if _has_halves(gm) else V.choices),
    ):
        spare, compiled = _spare(gm, on_error), functools.partial(compile_fx, gm, list(fakes))
        try:
            return cast(Compiled, compiled_or(compiled, lambda: spare, on_error))
        except COMPILER_ERRORS as error:
            tell_of_compiler(error)
            raise


def _spare(gm: fx.GraphModule, on_error: OnCompileError) -> fx.GraphModule:
    """A graph to interpret where compiling ``gm``, which changes it, fails."""
    return gm if on_error == "raise" else copy.deepcopy(gm)


def _tell_fixed(gm: fx.GraphModule, fixed: Collection[fx.Node]) -> None:
    """Say it as Dynamo says it of the parameters of a module: AOTAutograd asks no other graph."""
    gm.meta["dynamo_compile_id"] = None
    gm._param_name_to_source = {}  # type: ignore[assignment]
    for index, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        node._dynamo_source = LocalSource(f"argument_{index}")
        if node in fixed:
            node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}


# NOTE: [Halves apart] Inductor fuses whatever reads the same buffer. A value that is computed again in
# backward, or copied to another layout there, reads what forward read: it would be computed in forward's
# kernel, and kept. So no kernel may span forward and backward where the graph says which is which. The update
# says nothing, and is free.


def _has_halves(gm: fx.GraphModule) -> bool:
    return any(SIDE in node.meta for node in gm.graph.nodes)


def _halves_apart(choices: InductorChoices) -> InductorChoices:
    """The same choices, but for fusions of forward with backward."""
    result = copy.copy(choices)

    def can_fuse(scheduler: Any, node1: Any, node2: Any, *args: Any, **kwargs: Any) -> bool:
        sides = {_side(node1), _side(node2)}
        return sides != {FORWARD, BACKWARD} and choices.can_fuse(scheduler, node1, node2, *args, **kwargs)

    result.can_fuse = can_fuse  # type: ignore[method-assign]
    return result


def _side(node: Any) -> str | None:
    """The half of a node of Inductor's: backward where any part of it is."""
    parts = [part.node for part in node.get_nodes()]
    found = {origin.meta.get(SIDE) for part in parts if part is not None for origin in part.get_origins()}
    return next((side for side in (BACKWARD, FORWARD) if side in found), None)


def inductor_decompositions() -> Decompositions:
    """How Inductor takes operators apart before it fuses them."""
    table: Decompositions = select_decomp_table()
    return table


# --- the drop-in door: a pass over AOTAutograd's joint graph -----------------------------------------

JointPass = Callable[..., None]
"""``joint_pass(gm, decompositions=...)`` rewrites a joint graph in place."""


def compile_differentiable(
    forward: fx.GraphModule,
    inputs: Sequence[Any],
    joint_pass: JointPass,
    *,
    key: str | None,
    backend: str = "inductor",
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    on_error: OnCompileError = "raise",
) -> Compiled:
    """Compile a forward graph and its backward, with a pass over the joint graph in between.

    Args:
        forward: Dynamo's graph.
        inputs: its example inputs.
        joint_pass: called once with the joint graph, before any of Inductor's own passes.
        key: all that the effect of ``joint_pass`` depends on; part of the cache key. None: do not cache.
        backend: as in :func:`compile_graph`.
        mode: as in ``torch.compile``.
        options: Inductor settings, as in ``torch.compile``.
        on_error: as in :func:`compile_graph`.
    """

    def interpreted(forward: fx.GraphModule) -> Compiled:
        def partition(gm: fx.GraphModule, joint_inputs: Any, **kwargs: Any) -> Any:
            joint_pass(gm, decompositions={})
            return default_partition(gm, joint_inputs, **kwargs)

        nop = aot_autograd(fw_compiler=_interpret, bw_compiler=_interpret, partition_fn=partition)
        return cast(Compiled, nop(forward, list(inputs)))

    if backend != "inductor":
        return interpreted(forward)
    spare = _spare(forward, on_error)
    patches = _patches(mode, options)
    patches["joint_custom_pre_pass"] = _OnJointGraph(joint_pass, key, patches.get("joint_custom_pre_pass"))
    compiled = functools.partial(compile_fx, forward, list(inputs), config_patches=patches)
    return cast(Compiled, compiled_or(compiled, functools.partial(interpreted, spare), on_error))


def _patches(mode: str | None, options: Mapping[str, Any] | None) -> dict[str, Any]:
    return {**(list_mode_options(mode) if mode else {}), **(options or {})}


def compile_as_torch_does(
    forward: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    backend: str = "inductor",
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    on_error: OnCompileError = "raise",
) -> Compiled:
    """What ``torch.compile`` makes of Dynamo's graph; arguments as of :func:`compile_differentiable`."""
    if backend != "inductor":
        return cast(Compiled, lookup_backend(backend)(forward, list(inputs)))
    spare = _spare(forward, on_error)
    compiled = functools.partial(compile_fx, forward, list(inputs), config_patches=_patches(mode, options))
    return cast(Compiled, compiled_or(compiled, lambda: spare.forward, on_error))


def _interpret(gm: fx.GraphModule, _: Sequence[Any]) -> Compiled:
    return make_boxed_func(gm.forward)


class _OnJointGraph(CustomGraphPass):
    """A pass of ours, and then the user's, where there is one. One object: torch 2.11 takes no list."""

    def __init__(self, joint_pass: JointPass, key: str | None, users: Any) -> None:
        self._joint_pass, self._key, self._users = joint_pass, key, users

    def __call__(self, graph: fx.Graph) -> None:
        self._joint_pass(graph.owning_module, decompositions=select_decomp_table())
        for users in self._users if isinstance(self._users, list | tuple) else [self._users]:
            if users is not None:
                users(graph)

    def uuid(self) -> Any:
        if self._users is not None or self._key is None:
            return None  # not ours to name: do not cache
        return f"{_source_hash()}:{self._key}"


@functools.cache
def _source_hash() -> str:
    """A hash of all of our code: a new version must not find old kernels in a cache."""
    here = Path(__file__).parent
    sources = sorted({*here.rglob("*.py"), *here.joinpath("passes").glob("*.py")})
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
