"""The matrix of a layer among tensors by parameter: its weight, and the column of its bias if it is joint."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .layers import Layer
from .passes.reindex import put, take


def matrices(layer: Layer, tensors: Mapping[str, Tensor]) -> Tensor:
    """The matrices of a layer as (E, out, in), with the column of its bias."""
    weight = take(layer.path, tensors[layer.param]).reshape(layer.groups, layer.out, -1)
    if layer.bias is None:
        return weight
    if layer.bias not in tensors:
        return torch.nn.functional.pad(weight, (0, 1))
    column = take(layer.bias_path, tensors[layer.bias]).reshape(layer.groups, layer.out, 1)
    return torch.cat([weight, column.to(weight.dtype)], -1)


def put_back(layer: Layer, new: Tensor, tensors: dict[str, Tensor]) -> None:
    """Write (E, out, in) back into the tensors of a layer."""
    if layer.bias is not None:
        if layer.bias in tensors:
            old = tensors[layer.bias]
            part = take(layer.bias_path, old)
            column = new[..., -1].reshape(part.shape).to(old.dtype)
            tensors[layer.bias] = put(layer.bias_path, old, column)
        new = new[..., :-1]
    old = tensors[layer.param]
    tensors[layer.param] = put(layer.path, old, new.reshape(take(layer.path, old).shape))


def unit(matrix: Tensor) -> Tensor:
    """Matrices of Frobenius norm 1, (E, out, in); zeros stay zeros."""
    peak = matrix.abs().amax((-2, -1), keepdim=True)
    scaled = matrix / torch.where(peak > 0, peak, torch.ones_like(peak))  # its squares do not overflow
    length = norm(scaled)
    return scaled / torch.where(length > 0, length, torch.ones_like(length))


def norm(matrix: Tensor) -> Tensor:
    """The Frobenius norms of (E, out, in), as (E, 1, 1)."""
    return torch.linalg.vector_norm(matrix, dim=(-2, -1), keepdim=True)
