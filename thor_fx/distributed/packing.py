"""What is sent of a factor: of a symmetric matrix one triangle.

A ``(d, d)`` factor is sent as its ``d (d + 1) / 2`` numbers on and above the diagonal, row by row; every one
of ``F`` blocks likewise. Diagonals and means are sent as they are.
"""

import math

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
