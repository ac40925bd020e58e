"""Adapter to DTensor: parameters of which every rank has a part (FSDP2, tensor parallel).

The only module that knows ``torch.distributed.tensor``, which takes a while to import: nobody has a DTensor
who has not imported it. Written for torch 2.11, 2.13 and 2.15.
"""

from typing import TYPE_CHECKING, Any, TypeGuard

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..passes.outputs import Split
from .boxes import Box

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_part(value: Any) -> "TypeGuard[DTensor]":
    """Whether a tensor is the part that this rank has of one."""
    if not (is_traceable_wrapper_subclass(value) and dist.is_available()):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def split_of(name: str, value: Tensor) -> Split | None:
    """How a tensor that a graph reads is dealt out; None where all of it is here.

    Raises:
        TypeError: it is dealt out along several axes of a mesh, or is a sum over ranks.
    """
    if not is_part(value):
        return None
    from torch.distributed.tensor import Replicate, Shard

    dealt = [(axis, p) for axis, p in enumerate(value.placements) if not isinstance(p, Replicate)]
    if not dealt:
        return None
    (mesh_axis, placement), *others = dealt
    if others or not isinstance(placement, Shard):
        raise TypeError(
            f"the forward pass reads {name!r} as {value.placements}: thor_fx needs parameters that are "
            "split along one axis of the mesh, as tensor parallel plans do"
        )
    axis = placement.dim
    group = value.device_mesh.get_group(mesh_axis)
    return Split(axis, value.shape[axis], value.device_mesh.size(mesh_axis), group.group_name)


def here(value: Tensor) -> Tensor:
    """The part that this rank has: the same memory. A plain tensor is all here."""
    return value.to_local() if is_part(value) else value


def here_as(value: Tensor, like: Tensor) -> Tensor:
    """The part of a gradient that belongs to the part of its parameter ``like`` on this rank."""
    if is_part(value) and is_part(like) and value.placements != like.placements:
        value = value.redistribute(placements=like.placements)
    return here(value)


def is_partial(gradient: Tensor | None) -> bool:
    """Whether a gradient is a sum over ranks that has not been taken: each of them had other rows."""
    return is_part(gradient) and any(placement.is_partial() for placement in gradient.placements)


def box_of(value: Tensor) -> Box:
    """Where the part of this rank lies in the whole tensor."""
    if not is_part(value):
        return Box((0,) * value.dim(), tuple(value.shape))
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
    return Box(tuple(offset), tuple(shape))
