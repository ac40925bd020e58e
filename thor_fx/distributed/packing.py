"""What is sent: of a symmetric factor one triangle, of several tensors one.

A ``(d, d)`` factor is sent as its ``d (d + 1) / 2`` numbers on and above the diagonal, row by row; every one
of ``F`` blocks likewise. Diagonals and means are sent as they are.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..passes.sides import Side

SYMMETRIC = ("dense", "blocks")


def packed_numel(side: Side) -> int:
    """How many numbers are sent of the factor of a side."""
    if side.kind not in SYMMETRIC:
        return side.numel
    d = side.shape[-1]
    return math.prod(side.shape[:-2]) * (d * (d + 1) // 2)


def pack(factor: Tensor, side: Side) -> Tensor:
    """A factor in the shape of its side, as one flat tensor."""
    if side.kind not in SYMMETRIC:
        return factor.flatten()
    return triangles(factor).flatten()


def unpack(flat: Tensor, side: Side) -> Tensor:
    """The inverse of :func:`pack`, up to the triangle that was not sent."""
    if side.kind not in SYMMETRIC:
        return flat.reshape(side.shape)
    d = side.shape[-1]
    return mirrored(flat.reshape(*side.shape[:-2], d * (d + 1) // 2), d)


def triangles(matrices: Tensor) -> Tensor:
    """The numbers on and above the diagonals of (..., d, d), row by row: (..., d (d + 1) / 2)."""
    d = matrices.shape[-1]
    row, column = torch.triu_indices(d, d, device=matrices.device)
    return matrices.flatten(-2)[..., row * d + column]


def mirrored(numbers: Tensor, d: int) -> Tensor:
    """The symmetric matrices with these triangles: (..., d, d)."""
    first = torch.arange(d, device=numbers.device)
    low, high = torch.minimum(first[:, None], first), torch.maximum(first[:, None], first)
    places = (low * (2 * d - low - 1)).div(2, rounding_mode="floor") + high
    return numbers[..., places]


def joined(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """The numbers of all tensors as one flat tensor, rounded to ``dtype`` where one is given."""
    return torch.cat([tensor.flatten().to(dtype or tensor.dtype) for tensor in tensors])


def parted(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of :func:`joined`: tensors of the shapes and dtypes of ``like``."""
    parts = flat.split([tensor.numel() for tensor in like])
    return [part.reshape(t.shape).to(t.dtype) for part, t in zip(parts, like, strict=True)]


def by_dtype(tensors: Sequence[Tensor]) -> dict[torch.dtype, list[Tensor]]:
    """The tensors that can be joined without rounding, in their order."""
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault(tensor.dtype, []).append(tensor)
    return kinds
