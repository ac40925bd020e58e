"""The classes that states consist of, for ``torch.load(file, weights_only=True)``."""

from .adam import AdamState
from .averages import Averages, FactorPair
from .clips import KLState
from .inverses.ekfac import Eigenbasis
from .inverses.eva import Vectors
from .inverses.pair import InversePair
from .precondition import PreconditionState
from .predicted import PredictedState
from .renewal import Memory
from .routes import RouteState
from .step import StepState
from .step_norm import GraftState
from .trace_rule import Watch
from .transform import SkipState

STATE_CLASSES: list[type] = [
    AdamState,
    Averages,
    Eigenbasis,
    FactorPair,
    GraftState,
    InversePair,
    KLState,
    Memory,
    PreconditionState,
    PredictedState,
    RouteState,
    SkipState,
    StepState,
    Vectors,
    Watch,
]
"""All of ours; a state dict of :class:`thor_fx.Thor` has none of them in it.

Example:
    >>> import io, torch
    >>> file = io.BytesIO()
    >>> torch.save(StepState(3, {"w": (torch.ones(2),)}), file)
    >>> _ = file.seek(0)
    >>> with torch.serialization.safe_globals(STATE_CLASSES):
    ...     torch.load(file, weights_only=True).step
    3
"""
