"""Eigenvalue-corrected scaling: K-FAC's eigenbasis, and a second moment for every coordinate in it.

With the eigenvectors ``Q_A`` and ``Q_G`` of the factors' blocks, the gradient ``g`` of a weight is rotated,
divided coordinate by coordinate, and rotated back (George et al. 2018, EKFAC, algorithm 1)::

    P = Q_G^T g Q_A
    U = Q_G (P / (S + lambda)) Q_A^T
    S <- DECAY S + (1 - DECAY) n P^2       for the next step

A refresh sets ``S`` to the outer product of the eigenvalues of ``G`` and ``A``, so that its step is exactly
``(A (x) G + lambda I)^-1``: the product is damped, and not its factors. ``damping_rule`` says nothing here.

How this differs from the paper: there ``S`` is the mean of squared *per-example* gradients. Those are not in
the graph; the gradient of the batch is, for free. It averages over ``n`` terms, so the expectation of
``n P^2`` is the per-example second moment as far as the terms are independent and their mean gradient is
small beside their spread: of the mean, ``n`` times the square is counted. It is noisier by far, hence the
average over steps; and it is renewed on every step, where the factors are not. The paper also renews ``S``
before it takes the step; here ``S`` is what was known before, so that no gradient is divided by itself.

A new basis starts with new eigenvalues. To rotate ``S`` would keep older steps, at the price of a product
that assumes moments to be uncorrelated in the old basis; but a refresh in which ``S`` is not K-FAC's could
not be checked against anything.

Sides in blocks have a basis in blocks; diagonals and sides of which nothing is kept are their own basis.
A matrix of which any part fails keeps both bases and ``S``. Where it has none yet, such a part counts as the
diagonal matrix that bounds it (:mod:`.attempts`).

Legend: L matrices of one shape, F equal blocks along the diagonal of a side, b their side.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import blocks
from ..blocks import Blocks
from ..layers import Layer
from ..passes.sides import Side
from .attempts import NOT_FINITE, bounds, by_matrix, ended, strength
from .batches import Job, in_batches
from .eigen import FLOPS_PER_CUBE, decompose
from .method import Damping, Method, Stack, Work, keep

DECAY = 0.95
"""Of the running average of second moments: about the last twenty steps count."""


class Eigenbasis(NamedTuple):
    """The eigenvectors of both sides of L matrices, and the second moments in that basis.

    Attributes:
        input: ``Q_A``: blocks (L, F, b, b), or ones (L, d) for a diagonal.
        output: ``Q_G``.
        moments: ``S``, one tensor (L, out, in).
    """

    input: Blocks
    output: Blocks
    moments: tuple[Tensor, ...]


def _init(count: int, sides: tuple[Side, Side], block_size: int | None, like: Tensor) -> Eigenbasis:
    input_, output = (blocks.zeros(count, side, block_size, like) for side in sides)
    nothing_kept = all(side.kind == "identity" for side in sides)  # there is nothing to wait for, then
    moments = like.new_full((count, sides[1].dim, sides[0].dim), float(nothing_kept))
    return Eigenbasis(input_, output, (moments,))


def _refresh(
    stacks: list[Stack], _damping: Damping, block_size: int | None
) -> tuple[list[Eigenbasis], list[Tensor]]:
    jobs: list[Job] = []
    for layer, pair, _before, failing in stacks:
        sides = zip(pair, (layer.input, layer.output), strict=True)
        cut = [part for f, side in sides if f is not None for part in blocks.cut(f, side, block_size)]
        own = blocks.by_part(failing, cut)
        jobs += [(_flat(part), flags.flatten()) for part, flags in zip(cut, own, strict=True)]
    results = iter(in_batches(jobs, _decompose))
    states, outcomes = [], []
    for stack in stacks:
        pieces = ([next(results) for _ in side] for side in (stack.before.input, stack.before.output))
        state, ended_so = _one_shape(stack, *pieces)
        states.append(state)
        outcomes.append(ended_so)
    return states, outcomes


def _flat(part: Tensor) -> Tensor:
    return part if part.dim() == 2 else part.flatten(0, 1)


def _decompose(parts: Tensor, failing: Tensor) -> Job:
    """Of blocks (N, b, b), or of diagonals (N, d): they are their own eigenvalues.

    What has no eigenvectors gets those of the diagonal matrix that bounds it.
    """
    shift = strength(parts, torch.zeros_like(parts.flatten(1)[:, 0]), failing)
    if parts.dim() == 3:
        eye = torch.eye(parts.shape[-1], dtype=parts.dtype, device=parts.device)
        parts = parts + shift[:, None, None] * eye
        values, vectors, good = decompose(parts)
        vectors = keep(good, vectors, eye)
    else:
        parts = parts + shift[:, None]
        good = (parts.isfinite() & (parts >= 0)).all(-1)
        values, vectors = parts, torch.ones_like(parts)
    above = bounds(parts)
    return keep(good, values, above), vectors, good, ended(good, above)


def _one_shape(stack: Stack, input_: list[Job], output: list[Job]) -> tuple[Eigenbasis, Tensor]:
    layer, before = stack.layer, stack.before
    (old,) = before.moments
    a, g = (_eigenvalues(*pieces, old) for pieces in ((input_, layer.in_), (output, layer.out)))
    moments = g[:, :, None] * a[:, None, :]  # (L, out, in)
    finite = moments.isfinite().all(dim=(-2, -1))
    whole = torch.ones_like(finite)
    for _, _, fine, _ in (*input_, *output):
        whole = whole & fine.reshape(len(old), -1).all(-1)
    good = finite & (whole | _nothing_yet(before))
    new_input, new_output = (
        tuple(keep(good, job[1].reshape(last.shape), last) for job, last in zip(pieces, kept, strict=True))
        for pieces, kept in ((input_, before.input), (output, before.output))
    )
    outcomes = by_matrix([job[-1] for job in (*input_, *output)], stack.failing)
    outcomes = torch.where((whole & ~finite)[:, None], NOT_FINITE, outcomes)
    return Eigenbasis(new_input, new_output, (keep(good, moments, old),)), outcomes


def _nothing_yet(before: Eigenbasis) -> Tensor:
    """Which matrices have no bases, (L,): no row of a basis is zero."""
    (moments,) = before.moments
    flags = [(part.flatten(1)[:, : part.shape[-1]] == 0).all(-1) for part in (*before.input, *before.output)]
    return torch.stack(flags).any(0) if flags else torch.zeros_like(moments[:, 0, 0], dtype=torch.bool)


def _eigenvalues(pieces: list[Job], dim: int, like: Tensor) -> Tensor:
    """(L, d), in the order of the blocks; those of the identity where nothing is kept."""
    if not pieces:
        return like.new_ones(len(like), dim)
    return torch.cat([values.reshape(len(like), -1) for values, *_ in pieces], 1)


def _apply(state: Eigenbasis, gradients: Tensor, terms: Tensor, lam: Tensor) -> tuple[Tensor, Eigenbasis]:
    (moments,) = state.moments
    rotated = _both(_turned(state.output), gradients, _turned(state.input))
    damped = moments + lam
    scaled = torch.where(damped > 0, rotated / damped, torch.zeros_like(rotated))  # 0/0 without damping
    measured = DECAY * moments + (1 - DECAY) * terms * rotated**2
    # NOTE: an infinite moment would stop its coordinate for good; so this step is none
    scaled = torch.where(measured.isfinite(), scaled, torch.nan)
    return _both(state.output, scaled, state.input), state._replace(moments=(measured.to(moments.dtype),))


def _both(output: Blocks, x: Tensor, input_: Blocks) -> Tensor:
    """``Q_G x Q_A^T``."""
    return blocks.multiply_right(blocks.multiply(output, x), input_)


def _turned(basis: Blocks) -> Blocks:
    return tuple(part if part.dim() == 2 else part.mT for part in basis)


def _work(layer: Layer, block_size: int | None) -> Work:
    sides = (layer.input, layer.out), (layer.output, layer.in_)
    cuts = [blocks.counts(side, block_size) for side, _ in sides]
    products = sum(blocks.multiply_flops(side, block_size, columns) for side, columns in sides)
    return Work(
        numbers=sum(blocks.numel(side, block_size) for side, _ in sides)
        + layer.groups * layer.out * layer.in_,
        refresh_flops=sum(count * FLOPS_PER_CUBE * b**3 for cut in cuts for count, b in cut),
        step_flops=2 * products,  # there and back
    )


EKFAC = Method(_init, _refresh, _apply, _work, blocks.units)
