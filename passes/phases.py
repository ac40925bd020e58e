"""Which part of a training step every node of its graph belongs to."""

from typing import Literal, get_args

Phase = Literal["forward", "backward", "factors", "refresh", "update"]

PHASES: tuple[Phase, ...] = get_args(Phase)
"""In the order of a step."""

PHASE = "thor_fx phase"
"""Where a node says its phase: in ``node.meta``."""
