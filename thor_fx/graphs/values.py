"""How large a node's value is, and whether it has memory of its own."""

import math
from operator import getitem
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..passes.nodes import target


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


def is_view(node: fx.Node) -> bool:
    """Whether a node's value lies in the memory of its first argument."""
    if target(node) is getitem:
        return True
    schema: Any = getattr(target(node), "_schema", None)
    if schema is None or not schema.returns:
        return False
    aliased = [result.alias_info for result in schema.returns]
    return all(alias is not None and not alias.is_write for alias in aliased)
