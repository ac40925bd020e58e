"""How long a compiled step takes, in total and by phase.

The total is measured without a profiler. Times of kernels are those of the fastest of some profiled runs. The
time of a kernel that makes values of several phases is divided by the bytes of these values.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, fx

from .kernels import Generated, Kernel, timed_kernels
from .memory_traffic import size_of
from .passes.phases import Phase, phase_of
from .step_cost import StepCost

WARMUP, REPEATS, PROFILED = 3, 20, 3


@dataclass(frozen=True)
class MeasuredStep:
    """A step that has run.

    Attributes:
        seconds: the median of several runs.
        kernels: with their times.
        cost: with the seconds of every phase; without, where a profiler has not seen every kernel.
    """

    seconds: float
    kernels: tuple[Kernel, ...]
    cost: StepCost


def measure(
    gm: fx.GraphModule, generated: Generated, cost: StepCost, arguments: Sequence[Any]
) -> MeasuredStep:
    """Run a compiled step several times.

    Args:
        gm: its graph.
        generated: what was compiled of it.
        cost: its cost.
        arguments: what to run it with; they are written to.
    """
    device = next(value.device for value in arguments if isinstance(value, Tensor))
    seconds = [_run(generated, arguments, device) for _ in range(WARMUP + REPEATS)][WARMUP:]
    runs = [timed_kernels(generated, arguments) for _ in range(PROFILED)]
    kernels = min(runs, key=_total)
    return MeasuredStep(median(seconds), tuple(kernels), with_seconds(cost, gm, kernels))


def _run(generated: Generated, arguments: Sequence[Any], device: torch.device) -> float:
    start = time.perf_counter()
    with torch.no_grad():
        generated.compiled(*arguments)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _total(kernels: Sequence[Kernel]) -> float:
    return sum(kernel.seconds if kernel.seconds is not None else float("inf") for kernel in kernels)


def with_seconds(cost: StepCost, gm: fx.GraphModule, kernels: Sequence[Kernel]) -> StepCost:
    """The cost with the times of kernels; unchanged where one of them has none."""
    if any(kernel.seconds is None for kernel in kernels):
        return cost
    nodes = {node.name: node for node in gm.graph.nodes}
    spent = dict.fromkeys(cost.phases, 0.0)
    for kernel in kernels:
        for phase, share in _shares(kernel, nodes).items():
            spent[phase] += share * (kernel.seconds or 0.0)
    phases = {phase: replace(known, seconds=spent[phase]) for phase, known in cost.phases.items()}
    return replace(cost, phases=phases)


def _shares(kernel: Kernel, nodes: dict[str, fx.Node]) -> dict[Phase, float]:
    """The parts of a kernel's time that go to its phases."""
    sizes: dict[Phase, int] = dict.fromkeys(kernel.phases, 1)
    for name in kernel.nodes:
        phase = phase_of(nodes[name])
        if phase in sizes:
            sizes[phase] += size_of(nodes[name])
    total = sum(sizes.values())
    return {phase: size / total for phase, size in sizes.items()}
