"""The kinds of training step, each a graph of its own."""

import itertools
from typing import Literal, NamedTuple

from .transform import Transform

Factors = Literal["plain", "measure", "refresh"]


class Kind(NamedTuple):
    """What a step does besides moving.

    Attributes:
        factors: ``"plain"``: it needs none; it measures them; it also inverts them (``"refresh"``).
        compares: it says how the loss should change, and looks whether it did.
    """

    factors: Factors
    compares: bool


def kinds(tx: Transform) -> list[Kind]:
    """The kinds that a transform may ask for."""
    compares = [False] if tx.adaptive is None else [True] if tx.adaptive.interval == 1 else [False, True]
    return [Kind(*kind) for kind in itertools.product(_factors(tx), compares)]


def _factors(tx: Transform) -> list[Factors]:
    if tx.frequency is None:
        return ["plain"]
    if tx.between is not None:
        return ["plain", "measure", "refresh"]
    return ["refresh"] if tx.frequency == 1 else ["plain", "refresh"]


def kind_of(tx: Transform, step: int, due: int | None, *, ready: bool, overdue: bool) -> Kind:
    """The kind of a step.

    Args:
        tx: asks for it.
        step: its number.
        due: the next factor step, where that is not as ``frequency`` says.
        ready: whether there are inverses; until then every step makes some.
        overdue: whether it has to be a factor step.
    """
    factors: Factors = "plain"
    due = None if tx.between is None else due  # a saved state may say what a rule of another step wanted
    if tx.frequency is not None and (not ready or overdue or tx.wants_factors(step, due)):
        factors = "measure" if ready and tx.between is not None else "refresh"
    return Kind(factors, tx.adaptive is not None and tx.adaptive.compares(step))
