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
A matrix of which any part fails keeps both bases and ``S``.

Legend: L matrices of one shape, F equal blocks along the diagonal of a side, b their side.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import blocks
from ..blocks import Blocks
from ..layers import Layer
from ..passes.sides import Side
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
) -> tuple[list[Eigenbasis], Tensor | int]:
    jobs: list[Job] = []
    for layer, pair, _before in stacks:
        for factors, side in zip(pair, (layer.input, layer.output), strict=True):
            if factors is not None:
                jobs += [(_flat(part),) for part in blocks.cut(factors, side, block_size)]
    found, failed = in_batches(jobs, _decompose)
    results = iter(found)
    states = []
    for layer, _pair, before in stacks:
        pieces = ([next(results) for _ in side] for side in (before.input, before.output))
        states.append(_one_shape(layer, before, *pieces))
    return states, failed


def _flat(part: Tensor) -> Tensor:
    return part if part.dim() == 2 else part.flatten(0, 1)


def _decompose(parts: Tensor) -> tuple[Job, Tensor]:
    """Of blocks (N, b, b), or of diagonals (N, d): they are their own eigenvalues."""
    if parts.dim() == 3:
        values, vectors, good = decompose(parts)
    else:
        good = (parts.isfinite() & (parts >= 0)).all(-1)
        values, vectors = parts, torch.ones_like(parts)
    return (values, vectors, good), (~good).sum()


def _one_shape(layer: Layer, before: Eigenbasis, input_: list[Job], output: list[Job]) -> Eigenbasis:
    (old,) = before.moments
    a, g = (_eigenvalues(*pieces, old) for pieces in ((input_, layer.in_), (output, layer.out)))
    moments = g[:, :, None] * a[:, None, :]  # (L, out, in)
    good = moments.isfinite().all(dim=(-2, -1))
    for _, _, fine in (*input_, *output):
        good = good & fine.reshape(len(old), -1).all(-1)
    new_input, new_output = (
        tuple(keep(good, q.reshape(last.shape), last) for (_, q, _), last in zip(pieces, kept, strict=True))
        for pieces, kept in ((input_, before.input), (output, before.output))
    )
    return Eigenbasis(new_input, new_output, (keep(good, moments, old),))


def _eigenvalues(pieces: list[Job], dim: int, like: Tensor) -> Tensor:
    """(L, d), in the order of the blocks; those of the identity where nothing is kept."""
    if not pieces:
        return like.new_ones(len(like), dim)
    return torch.cat([values.reshape(len(like), -1) for values, _, _ in pieces], 1)


def _apply(state: Eigenbasis, gradients: Tensor, terms: Tensor, lam: Tensor) -> tuple[Tensor, Eigenbasis]:
    (moments,) = state.moments
    rotated = _both(_turned(state.output), gradients, _turned(state.input))
    damped = moments + lam
    scaled = torch.where(damped > 0, rotated / damped, torch.zeros_like(rotated))  # 0/0 without damping
    measured = DECAY * moments + (1 - DECAY) * terms * rotated**2
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


EKFAC = Method(_init, _refresh, _apply, _work)
