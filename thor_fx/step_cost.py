"""What a step costs, by phase: arithmetic, traffic, time at best and time as measured; and its memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import fx

from .flops import flops_of
from .memory_traffic import Traffic, holder, size_of
from .passes.phases import PHASES, Phase, in_order, phase_of
from .rates import Rates


@dataclass(frozen=True)
class PhaseCost:
    """What one phase of a step costs.

    Attributes:
        flops: floating-point operations of products, convolutions and attentions.
        bytes: read and written, if every operator that cannot be fused with its neighbours runs alone
            (:mod:`thor_fx.memory_traffic`).
        floor: the seconds that the machine takes at best: the longer of arithmetic and traffic.
        seconds: as measured; None: not measured.
    """

    flops: int
    bytes: int
    floor: float
    seconds: float | None = None


@dataclass(frozen=True)
class StepCost:
    """What one kind of step costs.

    Attributes:
        kind: a plain step, or a factor step.
        phases: by phase; those that the step does not have are left out.
        peak: bytes that are alive at once, at most, parameters and state included.
        saved: bytes that forward keeps for backward, without parameters and inputs.
    """

    kind: Literal["plain", "factor"]
    phases: Mapping[Phase, PhaseCost]
    peak: int
    saved: int


def step_cost(gm: fx.GraphModule, kind: Literal["plain", "factor"], rates: Rates) -> StepCost:
    """The cost of a graph, from its nodes alone: nothing is compiled, and nothing runs.

    What counts as read and written is in :mod:`thor_fx.memory_traffic`. For ``peak``, nodes run in their
    order; what a library needs for itself does not count.

    Args:
        gm: a graph with phases, of sizes that are numbers.
        kind: what it is called.
        rates: of the machine.
    """
    traffic = Traffic(gm)
    moved = traffic.bytes()
    flops = dict.fromkeys(PHASES, 0)
    for node in gm.graph.nodes:
        flops[phase_of(node) or "forward"] += flops_of(node)
    present = in_order(phase_of(node) for node in gm.graph.nodes if node.op == "call_function")
    phases = {phase: _cost(flops[phase], moved.get(phase, 0), rates) for phase in present}
    return StepCost(kind, phases, _peak(traffic), _saved(traffic))


def _cost(flops: int, bytes: int, rates: Rates) -> PhaseCost:
    return PhaseCost(flops, bytes, rates.seconds(flops, bytes))


def _peak(traffic: Traffic) -> int:
    """Arguments live throughout, and what is written to memory until its last use, through whatever view."""
    graph = traffic.gm.graph
    last = {holder(arg): node for node in graph.nodes for arg in node.all_input_nodes}
    freed: dict[fx.Node, int] = {}
    for value in traffic.written:
        freed[last[value]] = freed.get(last[value], 0) + size_of(value)
    alive = peak = sum(size_of(node) for node in graph.nodes if node.op in {"placeholder", "get_attr"})
    for node in graph.nodes:
        alive += size_of(node) if node in traffic.written else 0
        peak = max(peak, alive)
        alive -= freed.get(node, 0)
    return peak


def _saved(traffic: Traffic) -> int:
    """What forward computes and backward or factors read, each value once."""
    later = ("backward", "factors")
    kept = {value for node, value, _ in traffic.reads() if phase_of(node) in later}
    return sum(size_of(v) for v in kept if v.op == "call_function" and phase_of(v) == "forward")
