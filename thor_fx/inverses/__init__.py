"""Methods of inversion: what is made of the factors, and what that makes of a gradient. One file each."""

from collections.abc import Mapping
from typing import Literal

from .attempts import FAILED, in_a_row
from .cholesky import CHOLESKY
from .eigen import EIGEN
from .ekfac import EKFAC
from .eva import EVA
from .method import Damping, Method, Pair, Stack, State, Work, cut, join, pick, put, replace, select
from .newton_schulz import NEWTON_SCHULZ

__all__ = [
    "FAILED",
    "METHODS",
    "Damping",
    "Inverse",
    "Method",
    "Pair",
    "Stack",
    "State",
    "Work",
    "cut",
    "in_a_row",
    "join",
    "pick",
    "put",
    "replace",
    "select",
]

Inverse = Literal["cholesky", "eigen", "ekfac", "newton_schulz", "eva"]

METHODS: Mapping[Inverse, Method] = {
    "cholesky": CHOLESKY,
    "eigen": EIGEN,
    "ekfac": EKFAC,
    "newton_schulz": NEWTON_SCHULZ,
    "eva": EVA,
}
