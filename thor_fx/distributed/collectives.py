"""Adapter to functional collectives: operators that a graph can hold, and what they are sent over.

The only module that knows ``torch.ops._c10d_functional``. Written for torch 2.11, 2.13 and 2.15. An operator
starts and returns at once; :func:`wait` waits for it. Started together, they run together.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, fx

from ..arguments import shown

Value = TypeVar("Value")

# Private, but what torch.distributed's functional collectives are: those wrap them for eager use.
_OPERATORS = torch.ops._c10d_functional


@dataclass(frozen=True)
class World:
    """The processes that train one model together.

    Attributes:
        group: the name of their process group.
        size: how many they are.
        rank: which one this is, from 0.
        process_group: the group itself.
    """

    group: str
    size: int
    rank: int
    process_group: Any = field(compare=False, repr=False)

    def sum(self, tensor: Tensor) -> Tensor:
        """Start the sum of a contiguous tensor over all ranks."""
        result: Tensor = _OPERATORS.all_reduce(tensor, "sum", self.group)
        return result

    def scattered_sum(self, tensor: Tensor) -> Tensor:
        """Start the sum of a contiguous tensor over all ranks, of which every rank gets an equal piece."""
        result: Tensor = _OPERATORS.reduce_scatter_tensor(tensor, "sum", self.size, self.group)
        return result

    def exchange(self, tensor: Tensor, gives: Sequence[int], gets: Sequence[int]) -> Tensor:
        """Start to send every rank a part of a flat tensor; the parts that are got lie in the order of ranks.

        Args:
            tensor: what this rank has.
            gives: how many numbers go to each rank, from the first one on.
            gets: how many come from each rank.
        """
        result: Tensor = _OPERATORS.all_to_all_single(tensor, list(gets), list(gives), self.group)
        return result

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """Start to send the tensor of rank ``source``; those of others tell its shape."""
        result: Tensor = _OPERATORS.broadcast(tensor, source, self.group)
        return result

    def total(self, number: Tensor) -> Tensor:
        """The sum of a 0-D tensor over all ranks."""
        return wait(self.sum(number.detach().clone()))

    def mean_number(self, number: Tensor) -> Tensor:
        """The mean of a 0-D tensor, now."""
        return self.total(number) / self.size

    def everybodys(self, value: Value) -> list[Value]:
        """What every rank has here, in the order of ranks; any object that can be pickled."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.process_group)
        return found


def wait(started: Tensor) -> Tensor:
    """The result of a collective."""
    result: Tensor = _OPERATORS.wait_tensor(started)
    return result


def wait_all(started: Sequence[Tensor]) -> list[Tensor]:
    """The results of several, that run together."""
    return [wait(one) for one in started]


def own_group(world: World) -> World:
    """The same ranks in a process group of its own, whose collectives keep an order of their own.

    All ranks call this together. The group has the backends and the timeout of the known one, and ends with
    ``destroy_process_group()``.
    """
    known = world.process_group
    group = dist.new_group(
        dist.get_process_group_ranks(known),
        timeout=_timeout(known),
        backend=dist.get_backend_config(known),
        use_local_synchronization=True,
    )
    return World(group.group_name, world.size, dist.get_rank(group), group)


def _timeout(group: Any) -> timedelta | None:
    """How long a collective waits for others; a group that is made anew has torch's default otherwise."""
    device, *_ = group._device_types
    timeout: timedelta | None = getattr(group._get_backend(device).options, "_timeout", None)
    return timeout


def is_collective(node: fx.Node) -> bool:
    """Whether a node of a graph starts a collective, or waits for one."""
    return node.op == "call_function" and str(node.target).startswith(f"{_OPERATORS.name}.")


def is_sum(node: fx.Node) -> bool:
    """Whether a node of a graph starts a collective to which every rank adds something."""
    return is_collective(node) and str(node.target).split(".")[1] in {"all_reduce", "reduce_scatter_tensor"}


def world_of(process_group: Any) -> World | None:
    """The ranks of a process group; None where there is none, or one rank is all there is.

    Raises:
        TypeError: it is no process group.
        ValueError: this process is not one of its ranks.
    """
    if process_group is None:
        return None
    if not (dist.is_available() and isinstance(process_group, dist.ProcessGroup)):
        raise TypeError(
            "process_group must be a process group of torch.distributed, e.g. torch.distributed.group.WORLD "
            f"after init_process_group(), got {shown(process_group)}"
        )
    rank, size = dist.get_rank(process_group), dist.get_world_size(process_group)
    if rank < 0:
        raise ValueError("process_group must contain this process: it is not one of its ranks")
    return None if size == 1 else World(process_group.group_name, size, rank, process_group)
