"""Methods that keep the damped inverses of both sides: ``U = G_d^-1 g A_d^-1``.

They differ in how a damped matrix is inverted, and in nothing else. Factors that are diagonals are
inverted number by number.

Legend: L matrices of one shape; F equal blocks along the diagonal of each, b their side; N = L F.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .. import blocks
from ..blocks import Blocks
from ..layers import Layer
from ..passes.sides import Side
from .batches import Job, in_batches
from .method import Damping, Method, Stack, Work, all_positive, keep

Invert = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""``invert(matrices (N, b, b), damping (N, 1, 1)) -> (inverses, which are good (N,))``"""


class InversePair(NamedTuple):
    """The damped inverses of L matrices of one shape."""

    input: Blocks
    output: Blocks


def pair_method(invert: Invert, flops: Callable[[int], int], *, symmetric: bool = True) -> Method:
    """The method that inverts blocks with ``invert``, which takes ``flops(b)``.

    Args:
        invert: of many blocks.
        flops: operations for one.
        symmetric: whether inverses may be made exactly symmetric.
    """
    return Method(_init, partial(_refresh, invert), _apply, partial(_work, flops), symmetric=symmetric)


def damped_reciprocal(diagonals: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """``1 / (d + damping)`` of the diagonals of many diagonal matrices.

    Args:
        diagonals: shape (N, d).
        damping: broadcastable to (N, 1).

    Returns:
        The inverses, shape (N, d), and which matrices have a finite one, a boolean tensor of shape (N,).
    """
    inverse = 1 / (diagonals + damping)
    return inverse, all_positive(inverse)


def _init(count: int, sides: tuple[Side, Side], block_size: int | None, like: Tensor) -> InversePair:
    # NOTE: zeros and not identities: a layer that never had a good inverse does not move
    return InversePair(*(blocks.zeros(count, side, block_size, like) for side in sides))


def _refresh(
    invert: Invert, stacks: list[Stack], damping: Damping, block_size: int | None
) -> tuple[list[InversePair], Tensor | int]:
    jobs: list[Job] = []
    kept: list[Tensor] = []
    for layer, pair, before in stacks:
        sides, strengths = (layer.input, layer.output), damping(pair, layer)
        for factors, side, strength, old in zip(pair, sides, strengths, before, strict=True):
            if factors is not None:
                per_matrix = strength * torch.ones(len(factors), dtype=factors.dtype, device=factors.device)
                cut = blocks.cut(factors, side, block_size)
                jobs += [_job(part, per_matrix) for part in cut]
                kept += old
    found, failed = in_batches(jobs, partial(_one_size, invert))
    results = iter([_renewed(inverse, good, old) for (inverse, good), old in zip(found, kept, strict=True)])
    return [InversePair(*(tuple(next(results) for _ in side) for side in s.before)) for s in stacks], failed


def _job(part: Tensor, strength: Tensor) -> Job:
    """All blocks of all matrices in one axis, with a damping for each."""
    if part.dim() == 2:
        return part, strength[:, None]
    _, count, b, _ = part.shape
    return part.reshape(-1, b, b), strength.repeat_interleave(count)[:, None, None]


def _one_size(invert: Invert, part: Tensor, strength: Tensor) -> tuple[Job, Tensor]:
    inverse, good = (invert if part.dim() == 3 else damped_reciprocal)(part, strength)
    return (inverse, good), (~good).sum()


def _renewed(inverse: Tensor, good: Tensor, before: Tensor) -> Tensor:
    """What has no good inverse keeps its previous one."""
    flat = before.reshape(inverse.shape)
    return keep(good, inverse, flat).reshape(before.shape)


def _apply(state: InversePair, gradients: Tensor, _terms: Tensor, _lam: Tensor) -> tuple[Tensor, InversePair]:
    return blocks.precondition(state.output, gradients, state.input), state


def _work(flops: Callable[[int], int], layer: Layer, block_size: int | None) -> Work:
    sides = (layer.input, layer.out), (layer.output, layer.in_)
    cuts = [blocks.counts(side, block_size) for side, _ in sides]
    return Work(
        numbers=sum(blocks.numel(side, block_size) for side, _ in sides),
        refresh_flops=sum(count * flops(b) for cut in cuts for count, b in cut),
        step_flops=sum(blocks.multiply_flops(side, block_size, columns) for side, columns in sides),
    )
