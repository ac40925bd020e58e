"""What is sent: of a symmetric factor one triangle, of several tensors one.

A ``(d, d)`` factor is sent as its ``d (d + 1) / 2`` numbers on and above the diagonal, row by row; every one
of ``F`` blocks likewise. Diagonals and means are sent as they are.
"""

import math
from collections.abc import Mapping, Sequence

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
    d = side.shape[-1]
    row, column = torch.triu_indices(d, d, device=factor.device)
    return factor.flatten(-2)[..., row * d + column].flatten()


def unpack(flat: Tensor, side: Side) -> Tensor:
    """The inverse of :func:`pack`, up to the triangle that was not sent."""
    if side.kind not in SYMMETRIC:
        return flat.reshape(side.shape)
    d = side.shape[-1]
    first = torch.arange(d, device=flat.device)
    low, high = torch.minimum(first[:, None], first), torch.maximum(first[:, None], first)
    places = (low * (2 * d - low - 1)).div(2, rounding_mode="floor") + high
    return flat.reshape(*side.shape[:-2], d * (d + 1) // 2)[..., places]


def joined(tensors: Sequence[Tensor]) -> dict[torch.dtype, Tensor]:
    """The numbers of all tensors, one flat tensor for each dtype."""
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault(tensor.dtype, []).append(tensor.flatten())
    return {dtype: torch.cat(flat) for dtype, flat in kinds.items()}


def parted(flats: Mapping[torch.dtype, Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of :func:`joined`: tensors of the shapes of ``like``."""
    sizes: dict[torch.dtype, list[int]] = {dtype: [] for dtype in flats}
    for tensor in like:
        sizes[tensor.dtype].append(tensor.numel())
    parts = {dtype: iter(flat.split(sizes[dtype])) for dtype, flat in flats.items()}
    return [next(parts[tensor.dtype]).reshape(tensor.shape) for tensor in like]
