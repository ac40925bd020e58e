"""Inversion as a refresh does it: what has no good inverse keeps its previous one, and is counted."""

from torch import Tensor

from thor_fx.inverses.method import keep
from thor_fx.inverses.pair import Invert


def renew(invert: Invert, matrices: Tensor, damping: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """The inverses, and how many of them failed."""
    inverse, good = invert(matrices, damping)
    return keep(good, inverse, before), (~good).sum()
