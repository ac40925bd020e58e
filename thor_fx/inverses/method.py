"""What a method of inversion is: pure functions of the state of L matrices of one shape.

A *state* is a NamedTuple whose fields are tuples of tensors, each with L in front. What it holds is
the method's business; that layers may be absent in a step is handled here, for all methods.

Legend: L matrices of one shape, of one layer or of several.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layers import Layer
from ..passes.sides import Side

State = Any
Pair = tuple[Tensor | None, Tensor | None]
"""Factors ``A`` and ``G`` of L matrices, (L, *shape of one group); None where nothing is kept."""

Damping = Callable[[Pair, Layer], tuple[Tensor | float, Tensor | float]]
"""The damping of ``A`` and of ``G``, 0-D or (L,), by the rule that the user chose."""


class Stack(NamedTuple):
    """The matrices of one shape that are refreshed together.

    Attributes:
        layer: one of their layers, for its sides.
        factors: the undamped ``A`` and ``G``.
        before: the state there is.
        failing: how often every block has failed in a row, (L, U): :mod:`.attempts`.
    """

    layer: Layer
    factors: Pair
    before: State
    failing: Tensor


class Work(NamedTuple):
    """What a method takes for one layer.

    Attributes:
        numbers: kept between steps.
        refresh_flops: of a refresh.
        step_flops: of preconditioning, on every step.
    """

    numbers: int
    refresh_flops: int
    step_flops: int


class Method(NamedTuple):
    """A method of inversion.

    Attributes:
        init: ``init(L, (input, output), block_size, like) -> state``, in the dtype and on the device of
            ``like``. A matrix that was never refreshed makes every update zero.
        refresh: ``refresh(stacks, damping, block_size) -> (states, outcomes)``: of all stacks, and how the
            attempts have ended, (L, U) of each: :mod:`.attempts`.
        apply: ``apply(state, gradients, terms, lam) -> (updates, state)``: of gradients (L, out, in), of the
            ``n`` that the loss averages over, and of the ``lambda`` of this step.
        work: ``work(layer, block_size)``.
        units: ``units((input, output), block_size) -> U``: what can fail by itself in one matrix.
        marks: the fields of a state that are zero until the first refresh that succeeds.
        symmetric: whether the square matrices of a state are symmetric, so that one triangle tells all.
    """

    init: Callable[[int, tuple[Side, Side], int | None, Tensor], State]
    refresh: Callable[[list[Stack], Damping, int | None], tuple[list[State], list[Tensor]]]
    apply: Callable[[State, Tensor, Tensor, Tensor], tuple[Tensor, State]]
    work: Callable[[Layer, int | None], Work]
    units: Callable[[tuple[Side, Side], int | None], int]
    marks: tuple[str, ...] = ("input", "output")
    symmetric: bool = False


def all_positive(numbers: Tensor) -> Tensor:
    """Which rows of (N, d) hold nothing but finite numbers above zero, (N,)."""
    return (numbers.isfinite() & (numbers > 0)).all(-1)


def diagonals(matrices: Tensor) -> Tensor:
    """Those of (N, b, b) matrices, (N, b)."""
    return matrices.flatten(1)[:, :: matrices.shape[-1] + 1]


def over(flags: Tensor, like: Tensor) -> Tensor:
    """(N,) in as many axes as (N, ...) has."""
    return flags.reshape(-1, *(1,) * (like.dim() - 1))


def keep(good: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """The new matrices (N, ...) where they are good (N,), and the old ones elsewhere."""
    return torch.where(over(good, new), new, old)


def pick(part: Tensor, places: list[slice], present: list[bool]) -> Tensor:
    """What (L, ...) says of some layers."""
    if all(present):
        return part
    return torch.cat([part[place] for place, here in zip(places, present, strict=True) if here])


def put(part: Tensor, places: list[slice], present: list[bool], new: Tensor) -> Tensor:
    """(L, ...) with what it says of some layers replaced."""
    if all(present):
        return new
    pieces, start = [], 0
    for place, here in zip(places, present, strict=True):
        stop = start + (place.stop - place.start) * here
        pieces.append(new[start:stop] if here else part[place])
        start = stop
    return torch.cat(pieces)


def cut(state: State, counts: list[int]) -> list[State]:
    """The state of so many matrices each."""
    if len(counts) == 1:
        return [state]
    fields = [[part.split(counts) for part in field] for field in state]
    return [type(state)(*(tuple(part[i] for part in field) for field in fields)) for i in range(len(counts))]


def join(state: State, own: list[State], new: list[State]) -> State:
    """The state that :func:`cut` has cut, put together again from what became of its pieces."""
    if len(own) == 1:
        return new[0]
    if all(after is before for before, after in zip(own, new, strict=True)):
        return state

    def joined(part: Tensor, field: int, i: int) -> Tensor:
        pieces = [after[field][i] for after in new]
        same = all(piece is before[field][i] for piece, before in zip(pieces, own, strict=True))
        return part if same else torch.cat(pieces)

    fields = (tuple(joined(part, f, i) for i, part in enumerate(field)) for f, field in enumerate(state))
    return type(state)(*fields)


def select(state: State, places: list[slice], present: list[bool]) -> State:
    """The state of some layers only: not all have a gradient, or factors, in every step."""
    if all(present):
        return state
    return type(state)(*(tuple(pick(part, places, present) for part in field) for field in state))


def replace(state: State, places: list[slice], present: list[bool], new: State) -> State:
    """The state of all layers, with that of some replaced."""
    if all(present):
        return new
    fields = zip(state, new, strict=True)
    merged = (zip(old, field, strict=True) for old, field in fields)
    return type(state)(*(tuple(put(part, places, present, own) for part, own in pairs) for pairs in merged))
