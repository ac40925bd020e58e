"""Second-order training (THOR / K-FAC) for PyTorch as a compiler pass."""

import os

from .torch_version import supported

with supported():
    from . import checkpoint, presets
    from .alarm import NumericsWarning
    from .block_size import block_size_report
    from .block_size_rule import BlockSizeReport
    from .compile import compile, statistics
    from .curvature_operator import CurvatureOperator
    from .explain import explain
    from .factors import Factors, Kronecker, factors
    from .layers import Coverage, CoverageError, Layer
    from .levenberg_marquardt import LevenbergMarquardt
    from .logs import configure
    from .metrics import metrics
    from .optimizer import Thor
    from .refresh_rules import ByTrace, Every, Staggered
    from .report import Report
    from .runnable import NotRunnable, write_stage
    from .step import CompiledStep, StepOutput, StepState, compile_step
    from .thor import decay_all_but_beta_gamma, thor
    from .trace import trace_step
    from .transform import Signals, Transform, apply_updates, centralize_gradients, chain
    from .verify import Certificate, verify

__all__ = [
    "BlockSizeReport",
    "ByTrace",
    "Certificate",
    "CompiledStep",
    "Coverage",
    "CoverageError",
    "CurvatureOperator",
    "Every",
    "Factors",
    "Kronecker",
    "Layer",
    "LevenbergMarquardt",
    "NotRunnable",
    "NumericsWarning",
    "Report",
    "Signals",
    "Staggered",
    "StepOutput",
    "StepState",
    "Thor",
    "Transform",
    "apply_updates",
    "block_size_report",
    "centralize_gradients",
    "chain",
    "checkpoint",
    "compile",
    "compile_step",
    "decay_all_but_beta_gamma",
    "explain",
    "factors",
    "metrics",
    "presets",
    "statistics",
    "thor",
    "trace_step",
    "verify",
    "write_stage",
]

configure(os.environ.get("THOR_FX_LOGS", ""))
