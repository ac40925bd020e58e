"""Methods of inversion: what is made of the factors, and what it makes of a gradient. One file each."""

from collections.abc import Mapping
from typing import Literal

from .cholesky import CHOLESKY
from .method import Damping, Method, Pair, Stack, State, replace, select

__all__ = ["METHODS", "Damping", "Inverse", "Method", "Pair", "Stack", "State", "replace", "select"]

Inverse = Literal["cholesky"]

METHODS: Mapping[str, Method] = {"cholesky": CHOLESKY}
