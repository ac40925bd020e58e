"""Optimisations that change no result beyond rounding, by name, and a way to go without some of them.

What one is worth is the difference between a step with it and one without it.
"""

import contextlib
from collections.abc import Collection, Iterator
from contextvars import ContextVar

import torch

OPTIMISATIONS: dict[str, str] = {
    "accumulate": "running averages of factors are the end of their product (functional door)",
    "batched_inverses": "all blocks of one size are inverted in one call",
    "recompute": "cheap activations are computed again in backward (functional door, Inductor)",
    "shared_inputs": "layers that read the same rows have one factor between them",
    "shifts": "A of a convolution that moves by one pixel is summed over shifts, not pairs of taps",
    "stacked_updates": "small parameters of one shape are updated as one stack",
    "start_early": "sums over ranks travel beside backward (functional door)",
    "symmetric_products": "half of a product of rows with themselves is left out",
}
"""What may be switched off: its name, and what it does."""

_off: ContextVar[frozenset[str]] = ContextVar("switched off", default=frozenset())


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator] # Dynamo looks into no ContextVar
def is_on(name: str) -> bool:
    """Whether an optimisation is on in what is traced now."""
    assert name in OPTIMISATIONS, name
    return name not in _off.get()


@contextlib.contextmanager
def without(names: Collection[str]) -> Iterator[None]:
    """What is traced inside goes without these optimisations."""
    token = _off.set(_off.get() | frozenset(names))
    try:
        yield
    finally:
        _off.reset(token)
