"""Batches as nests of tensors, of which the first axis of the first tensor holds the examples."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Batch = tuple[Any, ...]


def converted(values: Any, dtype: torch.dtype | None) -> Any:
    """A nest of tensors with its floating-point tensors in another dtype; None: as they are."""

    def convert(tensor: Tensor) -> Tensor:
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        if isinstance(tensor, nn.Parameter):  # only of these is it known whether they are frozen
            return nn.Parameter(tensor.detach().to(wanted), requires_grad=tensor.requires_grad)
        return tensor.detach().to(wanted).requires_grad_(tensor.requires_grad)

    return pytree.tree_map_only(Tensor, convert, values)


def examples_of(batch: Batch) -> int:
    """How many examples a batch has.

    Raises:
        ValueError: less than two.
    """
    tensors = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim() > 0]
    if not tensors or len(tensors[0]) < 2:
        raise ValueError("batch needs a tensor whose first axis holds two examples or more")
    return len(tensors[0])


def map_examples(batch: Batch, count: int, change: Callable[[Tensor], Tensor]) -> Batch:
    """The batch with its tensors of ``count`` examples changed."""

    def apply(tensor: Tensor) -> Tensor:
        return change(tensor) if tensor.dim() > 0 and len(tensor) == count else tensor

    changed: Batch = pytree.tree_map_only(Tensor, apply, batch)
    return changed
