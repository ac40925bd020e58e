"""Second-order training (THOR / K-FAC) for PyTorch as a compiler pass."""

from .factors import Kronecker, factors
from .step import CompiledStep, StepOutput, StepState, compile_step
from .thor import thor
from .trace import trace_step
from .transform import Signals, Transform, apply_updates, chain

__all__ = [
    "CompiledStep",
    "Kronecker",
    "Signals",
    "StepOutput",
    "StepState",
    "Transform",
    "apply_updates",
    "chain",
    "compile_step",
    "factors",
    "thor",
    "trace_step",
]
