"""What Inductor makes of a graph: fused kernels and calls of libraries, and which part of a step they are.

A kernel is what generated code calls. On a CPU that may be a function with several loops in it, for values
that have nothing to do with each other; on a GPU it is one launch.

What a kernel is for follows from the nodes of the given graph that it computes, and not from its name. Cheap
ones may be computed once more in another kernel, in front of a sum, say. So the phases of a kernel are those
of the values that it makes, whatever they come from.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import fx

from .flops import flops_of
from .inductor import Compiled, compile_graph
from .inductor_kernels import TIMED, Call, Event, profiled, recorded, shown_as
from .passes.phases import CARRIED, PHASES, Phase, in_order, phase_of

NAME = "thor_fx name"
"""Where a node of Inductor's says which node of the given graph it comes from."""


@dataclass(frozen=True)
class Kernel:
    """One kernel that Inductor has generated, or one call of a library.

    Attributes:
        name: as Inductor calls it.
        extern: whether it is a call of a library (a product of matrices, a convolution, ...).
        nodes: the names of the nodes that it computes, in their order.
        phases: of the values that it computes, each once, in the order of a step.
        flops: floating-point operations of products, convolutions and attentions.
        bytes: read and written; what no other kernel sees does not count.
        start: when it ran in the measured step, in seconds from the start of the step; on a GPU, when it was
            launched; None: not measured.
        seconds: how long it ran there; None: not measured.
    """

    name: str
    extern: bool
    nodes: tuple[str, ...]
    phases: tuple[Phase, ...]
    flops: int = 0
    bytes: int = 0
    start: float | None = None
    seconds: float | None = None


class Generated(NamedTuple):
    """A compiled graph and the kernels that it runs, in their order."""

    compiled: Compiled
    kernels: list[Kernel]
    calls: list[Call]


def kernels_of(
    gm: fx.GraphModule, fakes: Sequence[Any] | None = None, *, mode: str | None = None
) -> list[Kernel]:
    """The kernels of a graph, in the order that they run in. This compiles it, past all caches.

    Args:
        gm: a graph with phases (:func:`thor_fx.passes.phases.mark`); it is left alone.
        fakes: the fake values of its arguments; None: as its nodes say.
        mode: as in ``torch.compile``.
    """
    return generate(gm, fakes, mode=mode).kernels


def generate(gm: fx.GraphModule, fakes: Sequence[Any] | None = None, *, mode: str | None = None) -> Generated:
    """Compile a graph so that its kernels are known, and can be seen by a profiler: :func:`kernels_of`."""
    named = copy.deepcopy(gm)
    for node in named.graph.nodes:
        if node.op not in {"placeholder", "output"}:
            node.meta[CARRIED] = {**(node.meta.get(CARRIED) or {}), NAME: node.name}
    if fakes is None:
        fakes = [node.meta["val"] for node in named.graph.find_nodes(op="placeholder")]
    with recorded() as calls:
        compiled = compile_graph(named, fakes, mode=mode, options=TIMED)
    order = {node.name: position for position, node in enumerate(gm.graph.nodes)}
    counted: set[fx.Node] = set()
    return Generated(compiled, [_kernel(call, order, counted) for call in calls], calls)


def _kernel(call: Call, order: dict[str, int], counted: set[fx.Node]) -> Kernel:
    """A call, as a kernel; operations of ``counted`` nodes are those of an earlier one."""
    origins = dict.fromkeys(node for result in call.results for node in result)
    names = {(node.meta.get(CARRIED) or {}).get(NAME) for node in origins}
    phases = in_order(_phase(result) for result in call.results)
    flops = sum(flops_of(node) for node in origins if node not in counted)
    counted.update(origins)
    nodes = tuple(sorted((name for name in names if name in order), key=order.__getitem__))
    return Kernel(call.name, call.extern, nodes, phases, flops, call.bytes)


def _phase(result: Iterable[fx.Node]) -> Phase | None:
    """The phase of a value, from the nodes that it comes from: its own, or else the last of theirs."""
    first, *_ = known = [phase_of(node) for node in result]
    return first or next((phase for phase in reversed(PHASES) if phase in known), None)


def timed_kernels(generated: Generated, arguments: Sequence[Any]) -> list[Kernel]:
    """The kernels with the times of one run.

    What a profiler has seen is assigned in order, by name. From the first kernel on that cannot be found, no
    kernel has a time.

    Args:
        generated: a compiled graph; it should have run before.
        arguments: what to run it with; they are written to.
    """
    device = next(value.device for value in arguments if isinstance(value, torch.Tensor))
    with torch.no_grad():
        events = profiled(lambda: generated.compiled(*arguments), device)
    return assigned(generated, events)


def assigned(generated: Generated, events: Sequence[Event]) -> list[Kernel]:
    """The kernels with the times of the events that are runs of them, in order."""
    left, timed = list(events), []
    for kernel, call in zip(generated.kernels, generated.calls, strict=True):
        place = next((place for place, event in enumerate(left) if shown_as(call, event)), len(left))
        if place == len(left):
            left = []
            timed.append(kernel)
        else:
            timed.append(replace(kernel, start=left[place].start, seconds=left[place].seconds))
            left = left[place + 1 :]
    return timed
