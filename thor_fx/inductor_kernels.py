"""Adapter to Inductor's code generation: which calls a compiled graph makes, and what for.

The only module that knows how Inductor schedules, names and profiles kernels. Written for torch 2.11, 2.13
and 2.15, all of which tell one function about every call that they write down: its name and its nodes.
"""

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import fx
from torch._functorch import config as functorch_config
from torch._inductor import debug
from torch._inductor.codegen import cpp, triton
from torch._inductor.virtualized import V

TOLD = "set_kernel_post_grad_provenance_tracing"

TIMED = {
    "fx_graph_cache": False,
    "fx_graph_remote_cache": False,
    "cpp.enable_kernel_profile": True,
    "triton.unique_kernel_names": True,
}
"""Inductor settings: code that has just been generated, whose calls a profiler can see by name."""

AROUND = "## Call CompiledFxGraph"
"""How the event begins that a compiled graph is, to a profiler."""


@dataclass(frozen=True)
class Call:
    """One call in generated code.

    Attributes:
        name: of a generated function, or of the function of a library.
        extern: whether it is the latter.
        results: for every value that it computes, the nodes of Inductor's graph that this comes from, the one
            that it is first, where that is known.
        bytes: of what it reads that others have written, and writes for others to read.
    """

    name: str
    extern: bool
    results: tuple[tuple[fx.Node, ...], ...]
    bytes: int


@contextlib.contextmanager
def recorded() -> Iterator[list[Call]]:
    """All calls that Inductor generates code for meanwhile, in the order of the code."""
    calls: list[Call] = []

    def tell(schedule: Any, name: str, is_extern: bool = False) -> None:
        parts = [_of_extern(schedule)] if is_extern else [part for part in schedule if hasattr(part, "node")]
        results = [_origins(part.node) for part in parts if getattr(part, "node", None) is not None]
        calls.append(Call(name, is_extern, tuple(filter(None, results)), _traffic(parts)))

    with ExitStack() as stack:
        for module in (debug, cpp, triton):
            stack.enter_context(patch.object(module, TOLD, tell))
        stack.enter_context(functorch_config.patch(enable_autograd_cache=False))
        yield calls


def _of_extern(kernel: Any) -> Any:
    return V.graph.scheduler.name_to_node[kernel.get_operation_name()]


def _origins(buffer: Any) -> tuple[fx.Node, ...]:
    first = getattr(buffer, "origin_node", None)
    nodes = list(buffer.get_origins())
    return tuple(nodes if first is None else dict.fromkeys([first, *nodes]))


def _traffic(parts: Sequence[Any]) -> int:
    """Values that stay inside do not count; what several parts read counts once."""
    own = {node.get_name() for part in parts for node in part.get_nodes()}
    reads, writes = dict[str, int](), dict[str, int]()
    for part in parts:
        _keep_largest(reads, part.get_read_write_buffer_accesses(include_reads=True, include_writes=False))
        _keep_largest(writes, part.get_read_write_buffer_accesses(include_reads=False, include_writes=True))
    outside = sum(size for name, size in reads.items() if name not in writes)
    return outside + sum(size for name, size in writes.items() if _is_read_elsewhere(name, own))


def _keep_largest(sizes: dict[str, int], new: dict[str, int]) -> None:
    for name, size in new.items():
        sizes[name] = max(size, sizes.get(name, 0))


def _is_read_elsewhere(buffer: str, own: set[str]) -> bool:
    known = V.graph.scheduler.name_to_buf.get(buffer)
    if known is None or known.get_mutations():
        return True
    return any(not _names(user.node) <= own for user in known.users)


def _names(user: Any) -> set[str]:
    """The nodes that a user consists of; the output is one, too."""
    return {node.get_name() for node in user.get_nodes()} if hasattr(user, "get_nodes") else {"the output"}


# --- what a profiler has seen ------------------------------------------------------------------------


@dataclass(frozen=True)
class Event:
    """A call that a profiler has seen: its name, and in seconds when it started and how long it took."""

    name: str
    start: float
    seconds: float


def profiled(run: Any, device: torch.device) -> list[Event]:
    """The outermost calls of one run, in order, starting at 0; on a GPU, with the times of their kernels."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds, acc_events=True) as profile:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    on_cpu = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CPU]
    calls = [event for event in on_cpu if _is_outermost(event)]
    calls.sort(key=lambda event: event.time_range.start)
    first = min((event.time_range.start for event in on_cpu), default=0)
    return [_event(event, first, on_gpu=device.type == "cuda") for event in calls]


def _is_outermost(event: Any) -> bool:
    """Whether nothing is around it but the call of the compiled graph."""
    return event.cpu_parent is None or event.cpu_parent.name.startswith(AROUND)


def _event(event: Any, first: float, *, on_gpu: bool) -> Event:
    took = event.device_time_total if on_gpu else event.cpu_time_total
    return Event(event.name, 1e-6 * (event.time_range.start - first), 1e-6 * took)


def shown_as(call: Call, event: Event) -> bool:
    """Whether an event is a run of this call: ``extern_kernels.mm`` is ``aten::mm``, ``x`` ``graph_0_x``."""
    if not call.extern:
        return event.name.endswith(call.name)
    return event.name.rpartition("::")[2] in call.name.split(".")
