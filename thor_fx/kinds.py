"""The kinds of training step, each a graph of its own."""

import itertools
from typing import NamedTuple

from .transform import Transform


class Kind(NamedTuple):
    """What a step does besides moving.

    Attributes:
        factors: it measures factors.
        compares: it says how the loss should change, and looks whether it did.
    """

    factors: bool
    compares: bool


def kinds(tx: Transform) -> list[Kind]:
    """The kinds that a transform may ask for."""
    factors = [False] if tx.frequency is None else [True] if tx.frequency == 1 else [False, True]
    compares = [False] if tx.adaptive is None else [True] if tx.adaptive.interval == 1 else [False, True]
    return [Kind(*kind) for kind in itertools.product(factors, compares)]


def kind_of(tx: Transform, step: int, *, ready: bool) -> Kind:
    """The kind of step number ``step``; until the state is ``ready``, every step measures factors."""
    factors = tx.wants_factors(step) or not (ready or tx.frequency is None)
    return Kind(factors, tx.adaptive is not None and tx.adaptive.compares(step))
