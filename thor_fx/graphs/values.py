"""How large a node's value is."""

import math
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


def known(size: Any) -> int:
    """A size as a number: that of the traced batch where it is symbolic, 0 where the data decide."""
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else 0


def shape_of(value: Any) -> tuple[int, ...] | None:
    """The shape of a tensor; None for other values."""
    return tuple(known(size) for size in value.shape) if isinstance(value, Tensor) else None


def bytes_of(value: Any) -> int:
    """The bytes of a tensor, or of all tensors in a nest."""
    tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    return sum(math.prod(map(known, tensor.shape)) * tensor.dtype.itemsize for tensor in tensors)
