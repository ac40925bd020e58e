"""What a step costs, by phase: arithmetic, traffic, time at best and time as measured; and its memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from .passes.phases import Phase


@dataclass(frozen=True)
class PhaseCost:
    """What one phase of a step costs.

    Attributes:
        flops: floating-point operations of products, convolutions and attentions.
        bytes: read and written, if every operator that cannot be fused with its neighbours runs alone.
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
