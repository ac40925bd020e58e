"""What a step costs, as the page shows it."""

from typing import Any

from ..passes.phases import PHASES
from ..step_cost import StepCost
from .numbers import finite


def step_facts(step: StepCost) -> dict[str, Any]:
    """One kind of step: its memory, and a line for every phase in the order of a step."""
    costs = [(phase, step.phases[phase]) for phase in PHASES if phase in step.phases]
    return {
        "kind": step.kind,
        "peak": step.peak,
        "saved": step.saved,
        "phases": [
            {
                "phase": phase,
                "flops": cost.flops,
                "bytes": cost.bytes,
                "floor": finite(cost.floor),
                "seconds": finite(cost.seconds),
            }
            for phase, cost in costs
        ],
    }
