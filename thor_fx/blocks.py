"""THOR's layer-oriented blocks: a factor cut into diagonal blocks, inverted in one batched call.

A side of length ``d`` with block size ``b`` has ``d // b`` full blocks and at most one rest of
``d % b``. Off-diagonal blocks are dropped (Chen et al. 2021, section 4).

Legend: L layers of equal shape, F equal blocks along the diagonal, b their side.
"""

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .passes.sides import Side

BlockSize = int | Literal["auto"] | None
"""``b``; None: whole factors; ``"auto"``: to be chosen from the first factors (:mod:`thor_fx.block_size`)."""

Blocks = tuple[Tensor, ...]
"""What is kept of L matrices: blocks of their diagonals from top to bottom, by size, each (L, F, b, b);
or their diagonals alone, (L, d); or nothing."""


def split(side: int, block_size: int | None) -> list[tuple[int, int]]:
    """The ``(F, b)`` of a side; ``block_size=None`` keeps it whole.

    Example:
        >>> split(300, 128), split(10, 128), split(300, None)
        ([(2, 128), (1, 44)], [(1, 10)], [(1, 300)])
    """
    if block_size is None or side <= block_size:
        return [(1, side)]
    count, rest = divmod(side, block_size)
    return [(count, block_size), (1, rest)] if rest else [(count, block_size)]


def sizes(side: Side, block_size: int | None) -> list[tuple[int, int]]:
    """The ``(F, b)`` in which a dense side, or one in blocks, is inverted."""
    return split(side.dim, side.block if side.kind == "blocks" else block_size)


def counts(side: Side, block_size: int | None) -> list[tuple[int, int]]:
    """The ``(count, b)`` of the blocks that are inverted, in all groups."""
    if side.kind not in {"dense", "blocks"}:
        return []
    return [(side.groups * count, b) for count, b in sizes(side, block_size)]


def units(sides: tuple[Side, Side], block_size: int | None) -> int:
    """How many blocks, or diagonals, of both sides of one matrix are inverted; at least 1."""
    found = 0
    for side in sides:
        found += sum(count for count, _ in sizes(side, block_size)) if counts(side, block_size) else 0
        found += side.kind == "diagonal"
    return max(1, found)


def per_matrix(part: Tensor) -> int:
    """How many blocks (L, F, b, b) has of one matrix; a diagonal (L, d) is one."""
    return 1 if part.dim() == 2 else part.shape[1]


def by_part(flags: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
    """Of flags (L, U) for what :func:`units` counts, those of every part of both sides: (L, F)."""
    stops = itertools.accumulate(map(per_matrix, parts))
    return [flags[:, stop - per_matrix(part) : stop] for part, stop in zip(parts, stops, strict=True)]


def numel(side: Side, block_size: int | None) -> int:
    """How many numbers the blocks of a side hold, in all groups."""
    return sum(count * b**2 for count, b in counts(side, block_size)) or side.numel


def multiply_flops(side: Side, block_size: int | None, columns: int) -> int:
    """What :func:`multiply` takes for matrices of so many columns, in all groups. No diagonals."""
    return sum(2 * count * b**2 * columns for count, b in counts(side, block_size))


def zeros(layers: int, side: Side, block_size: int | None, like: Tensor) -> Blocks:
    """Zeros in the place of the inverses of ``layers`` factors of one side."""
    if side.kind == "identity":
        return ()
    if side.kind == "diagonal":
        return (like.new_zeros(layers, side.dim),)
    return tuple(like.new_zeros(layers, count, b, b) for count, b in sizes(side, block_size))


def cut(factors: Tensor, side: Side, block_size: int | None) -> Blocks:
    """The parts of L factors of a side, (L, *side.shape), that are inverted one by one."""
    if side.kind == "diagonal":
        return (factors,)
    if side.kind == "dense":
        return diagonal_blocks(factors, block_size)
    rest = side.dim % side.block
    if not rest:
        return (factors,)
    last = factors[:, -1:, :rest, :rest]  # the last block is padded
    return (factors[:, :-1], last) if side.dim > side.block else (last,)


def diagonal_blocks(matrices: Tensor, block_size: int | None) -> Blocks:
    """Cut the blocks out of (L, d, d) matrices."""
    parts, start = [], 0
    for count, b in split(matrices.shape[-1], block_size):
        starts = range(start, start + count * b, b)
        parts.append(torch.stack([matrices[:, i : i + b, i : i + b] for i in starts], dim=1))  # (L, F, b, b)
        start += count * b
    return tuple(parts)


def multiply(blocks: Blocks, x: Tensor) -> Tensor:
    """Block-diagonal times dense: sides (L, d, d) by (L, d, k)."""
    if not blocks:
        return x
    if blocks[0].dim() == 2:
        return blocks[0].unsqueeze(-1) * x
    products, start = [], 0
    for part in blocks:
        layers, count, b, _ = part.shape
        stop = start + count * b
        tiled = x[:, start:stop].reshape(layers, count, b, -1)  # (L, F, b, k)
        products.append((part @ tiled).reshape(layers, count * b, -1))
        start = stop
    return torch.cat(products, dim=1) if len(products) > 1 else products[0]


def multiply_right(x: Tensor, blocks: Blocks) -> Tensor:
    """Dense times the transpose of block-diagonal: (L, k, d) by (L, d, d). Rows stay rows in memory."""
    if not blocks:
        return x
    if blocks[0].dim() == 2:
        return x * blocks[0].unsqueeze(-2)
    products, start = [], 0
    for part in blocks:
        count, b = part.shape[1:3]
        stop = start + count * b
        tiled = x[..., start:stop].unflatten(-1, (count, b)).transpose(1, 2)  # (L, F, k, b)
        products.append((tiled @ part.mT).transpose(1, 2).flatten(-2))
        start = stop
    return torch.cat(products, dim=-1) if len(products) > 1 else products[0]


def precondition(output: Blocks, gradient: Tensor, input_: Blocks) -> Tensor:
    """``G^-1 gradient A^-1`` for (L, out, in) gradients, given the inverse blocks of both sides."""
    return multiply_right(multiply(output, gradient), input_)
