"""Graph -> graph: find Kronecker factors in a step graph and emit them.

Nothing in here knows of optimizers, training or state. A *step graph* is an ATen
:class:`torch.fx.GraphModule` that holds forward and backward; every input and output carries a
descriptor (:mod:`thor_fx.passes.outputs`), so no pass relies on positions.
"""

from .accumulate import accumulate
from .canonicalize import canonicalize
from .emit_factors import drop_factors, emit_factors
from .operands import Operand
from .outputs import Factor, Grad, Input, Loss, Mutation, Output, Param, Rows, Statistic, Tangent, Terms
from .phases import mark
from .pipeline import Pass, PassError, observe, run
from .sites import SiteReport, find_sites
from .spec import SpecError, check
from .splice import splice
from .stages import Stage
from .walk import Site

__all__ = [
    "Factor",
    "Grad",
    "Input",
    "Loss",
    "Mutation",
    "Operand",
    "Output",
    "Param",
    "Pass",
    "PassError",
    "Rows",
    "Site",
    "SiteReport",
    "SpecError",
    "Stage",
    "Statistic",
    "Tangent",
    "Terms",
    "accumulate",
    "canonicalize",
    "check",
    "drop_factors",
    "emit_factors",
    "find_sites",
    "mark",
    "observe",
    "run",
    "splice",
]
