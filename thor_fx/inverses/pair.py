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
from .attempts import bounds, by_matrix, ended, first_order, strength
from .batches import Job, in_batches
from .method import Damping, Method, Stack, Work, all_positive, diagonals, keep, over

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
    refresh, work = partial(_refresh, invert), partial(_work, flops)
    return Method(_init, refresh, _apply, work, blocks.units, symmetric=symmetric)


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
    # NOTE: zeros and not identities: a layer that never had factors does not move
    return InversePair(*(blocks.zeros(count, side, block_size, like) for side in sides))


def _refresh(
    invert: Invert, stacks: list[Stack], damping: Damping, block_size: int | None
) -> tuple[list[InversePair], list[Tensor]]:
    jobs: list[Job] = []
    kept: list[Tensor] = []
    for layer, pair, before, failing in stacks:
        sides, strengths = (layer.input, layer.output), damping(pair, layer)
        cut: list[tuple[Tensor, Tensor]] = []
        for factors, side, per_side, old in zip(pair, sides, strengths, before, strict=True):
            if factors is not None:
                per_matrix = per_side * torch.ones(len(factors), dtype=factors.dtype, device=factors.device)
                cut += [(part, per_matrix) for part in blocks.cut(factors, side, block_size)]
                kept += old
        own = blocks.by_part(failing, [part for part, _ in cut])
        jobs += [_job(*one, flags) for one, flags in zip(cut, own, strict=True)]
    results = iter(zip(in_batches(jobs, partial(_one_size, invert)), kept, strict=True))
    states, outcomes = [], []
    for stack in stacks:
        sides_of_it = [[next(results) for _ in side] for side in stack.before]
        states.append(InversePair(*(tuple(_renewed(job, old) for job, old in side) for side in sides_of_it)))
        outcomes.append(by_matrix([job[-1] for side in sides_of_it for job, _ in side], stack.failing))
    return states, outcomes


def _job(part: Tensor, damping: Tensor, failing: Tensor) -> Job:
    """All blocks of all matrices in one axis, with the damping of each and how often it failed."""
    flat = part if part.dim() == 2 else part.flatten(0, 1)
    return flat, damping.repeat_interleave(blocks.per_matrix(part)), failing.flatten()


def _one_size(invert: Invert, part: Tensor, damping: Tensor, failing: Tensor) -> Job:
    damping = strength(part, damping, failing)
    inverse, good = (invert if part.dim() == 3 else damped_reciprocal)(part, over(damping, part))
    above = bounds(part)
    return inverse, good, first_order(above, damping), ended(good, above)


def _renewed(job: Job, before: Tensor) -> Tensor:
    """What has no good inverse keeps its previous one; what never had any gets the first-order one."""
    inverse, good, simple, _ = job
    old = before.reshape(inverse.shape)
    diagonal = old if old.dim() == 2 else diagonals(old)
    nothing = (diagonal == 0).all(-1)
    spare = keep(nothing, simple if old.dim() == 2 else torch.diag_embed(simple), old)
    return keep(good, inverse, spare).reshape(before.shape)


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
