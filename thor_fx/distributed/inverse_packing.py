"""What is sent of inverses: one triangle of each, where a method says that they are symmetric.

What arrives is exactly symmetric, on the rank that has sent it, too.
"""

from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from .. import blocks
from ..inverses import Method
from ..layers import Layer
from .packing import mirrored, triangles


def packed_numbers(method: Method, layer: Layer, block_size: int | None) -> int:
    """How many numbers are sent of the inverses of a layer."""
    numbers = method.work(layer, block_size).numbers
    if not method.symmetric:
        return numbers
    cuts = [blocks.counts(side, block_size) for side in (layer.input, layer.output)]
    return numbers - sum(count * (b * (b - 1) // 2) for cut in cuts for count, b in cut)


def packed(method: Method, states: Any) -> Any:
    """A nest of states as it is sent."""
    return pytree.tree_map(_triangles, states) if method.symmetric else states


def unpacked(method: Method, sent: Any, like: Any) -> Any:
    """The inverse of :func:`packed`; ``like`` tells the shapes."""
    return pytree.tree_map(_restored, sent, like) if method.symmetric else sent


def _triangles(part: Tensor) -> Tensor:
    """Of blocks (L, F, b, b) the triangles; diagonals (L, d) as they are."""
    return part if part.dim() == 2 else triangles(part)


def _restored(numbers: Tensor, like: Tensor) -> Tensor:
    return numbers if like.dim() == 2 else mirrored(numbers, like.shape[-1])
