"""Second-order training (THOR / K-FAC) for PyTorch as a compiler pass."""

from .block_size import block_size_report
from .block_size_rule import BlockSizeReport
from .compile import compile
from .explain import Report, explain
from .factors import Kronecker, factors
from .layers import Coverage, CoverageError, Layer
from .metrics import metrics
from .optimizer import Thor
from .step import CompiledStep, StepOutput, StepState, compile_step
from .thor import decay_all_but_beta_gamma, thor
from .trace import trace_step
from .transform import Signals, Transform, apply_updates, centralize_gradients, chain
from .verify import Certificate, verify

__all__ = [
    "BlockSizeReport",
    "Certificate",
    "CompiledStep",
    "Coverage",
    "CoverageError",
    "Kronecker",
    "Layer",
    "Report",
    "Signals",
    "StepOutput",
    "StepState",
    "Thor",
    "Transform",
    "apply_updates",
    "block_size_report",
    "centralize_gradients",
    "chain",
    "compile",
    "compile_step",
    "decay_all_but_beta_gamma",
    "explain",
    "factors",
    "metrics",
    "thor",
    "trace_step",
    "verify",
]
