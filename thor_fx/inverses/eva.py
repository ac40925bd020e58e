"""Kronecker vectors: curvature of rank one, from the means of the rows (Zhang et al. 2023, Eva).

In place of factors there are two vectors, ``a`` the mean of the rows of activations and ``g`` of those of
per-term cotangents (:mod:`thor_fx.factors`). The block is ``(a a^T) (x) (g g^T) + lambda I``, and its inverse
is that of Sherman and Morrison::

    U = (W' - (g^T W' a) / (lambda + |a|^2 |g|^2) g a^T) / lambda       for the gradient W'

No matrix is formed, inverted or kept. ``lambda`` is that of the current step, and ``damping_rule`` says
nothing here. Without damping there is no inverse, and a layer stands still.

Legend: L matrices of one shape.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..layers import Layer
from ..passes.sides import Side
from .attempts import GOOD, NOT_FINITE
from .method import Damping, Method, Stack, Work


class Vectors(NamedTuple):
    """The Kronecker vectors of L matrices.

    Attributes:
        input: ``a``, one tensor (L, in).
        output: ``g``, one tensor (L, out).
        known: one tensor (L,): 1 where there are vectors, 0 where there never were.
    """

    input: tuple[Tensor, ...]
    output: tuple[Tensor, ...]
    known: tuple[Tensor, ...]


def _init(count: int, sides: tuple[Side, Side], _: int | None, like: Tensor) -> Vectors:
    input_, output = ((like.new_zeros(count, side.dim),) for side in sides)
    return Vectors(input_, output, (like.new_zeros(count),))


def _refresh(stacks: list[Stack], _: Damping, _size: int | None) -> tuple[list[Vectors], list[Tensor]]:
    found = [_one_shape(stack) for stack in stacks]
    return [state for state, _ in found], [torch.where(good, GOOD, NOT_FINITE)[:, None] for _, good in found]


def _one_shape(stack: Stack) -> tuple[Vectors, Tensor]:
    """The new vectors, and which of them are good: (L,)."""
    a, g = stack.factors
    assert a is not None, "every side keeps its mean"
    assert g is not None, "every side keeps its mean"
    (old_a,), (old_g,), (known,) = stack.before
    good = (a.square().sum(-1) * g.square().sum(-1)).isfinite()
    new_a, new_g = (torch.where(good[:, None], n, o) for n, o in ((a, old_a), (g, old_g)))
    return Vectors((new_a,), (new_g,), (torch.where(good, torch.ones_like(known), known),)), good


def _apply(state: Vectors, gradients: Tensor, _terms: Tensor, lam: Tensor) -> tuple[Tensor, Vectors]:
    (a,), (g,), (known,) = state
    along = ((g[:, None, :] @ gradients).squeeze(1) * a).sum(-1)  # g^T W' a: (L,)
    share = along / (lam + a.square().sum(-1) * g.square().sum(-1))
    update = (gradients - (share[:, None] * g)[:, :, None] * a[:, None, :]) / lam
    moving = (known > 0) & (lam > 0)
    return torch.where(moving[:, None, None], update, torch.zeros_like(update)), state


def _work(layer: Layer, _: int | None) -> Work:
    size = layer.groups * layer.out * layer.in_
    vectors = layer.groups * (layer.out + layer.in_ + 1)
    return Work(numbers=vectors, refresh_flops=0, step_flops=4 * size)  # g^T W', and what is subtracted


def _units(_sides: tuple[Side, Side], _block_size: int | None) -> int:
    return 1  # both vectors, together


EVA = Method(_init, _refresh, _apply, _work, _units, marks=("known",))
