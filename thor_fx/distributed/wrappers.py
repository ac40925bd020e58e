"""Models inside of DistributedDataParallel, and models whose parameters are dealt out over ranks."""

from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..warn import warn
from .collectives import World, world_of
from .dtensors import is_part

NOT_AVERAGED = (
    "torch.distributed is initialised, and Thor averages nothing over its ranks: pass the model as it is "
    "wrapped in DistributedDataParallel, or process_group=. Ranks with models of their own need neither."
)
LATE = "Thor was created before torch.distributed was initialised: create it after that. " + NOT_AVERAGED


def unwrapped(model: Any) -> Any:
    """The module that DistributedDataParallel trains, or ``model`` itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def is_dealt_out(model: nn.Module) -> bool:
    """Whether ranks have parts of parameters."""
    return any(map(is_part, model.parameters()))


def averages_gradients(model: Any) -> bool:
    """Whether gradients are averaged before an optimizer sees them."""
    return isinstance(model, DistributedDataParallel) or is_dealt_out(model)


def averager(model: Any, world: World | None) -> DistributedDataParallel | None:
    """The wrapper beside whose backward factors can travel: NOTE: [Rounds] in :mod:`.beside`.

    None where it does not say in which passes it averages every gradient, once: with parameters that it
    expects to be unused, or reentrant checkpoints (``static_graph``). And where backward runs on several
    devices at a time, the ranks of the factors are others or in no order that a new group would have, or the
    backend (MPI) makes no group without ranks outside of it.
    """
    if world is None or not isinstance(model, DistributedDataParallel):
        return None
    ranks = dist.get_process_group_ranks(world.process_group)
    told = not (model.find_unused_parameters or model.static_graph)
    alike = model.process_group == world.process_group and ranks == sorted(ranks)
    one_device = len({p.device for p in model.parameters()}) == 1
    has_groups = dist.get_backend(world.process_group) != dist.Backend.MPI
    return model if told and alike and one_device and has_groups else None


def world_of_model(model: nn.Module, process_group: Any) -> World | None:
    """The ranks that train a model together.

    Args:
        model: as it is called, in its wrapper.
        process_group: as the user says; None: that of the wrapper, or all ranks where parameters are dealt
            out over some.

    Raises:
        TypeError: ``process_group`` is none.
        ValueError: ``process_group`` does not contain this process.
    """
    if process_group is None and isinstance(model, DistributedDataParallel):
        process_group = model.process_group
    if process_group is None and is_dealt_out(model):
        process_group = dist.group.WORLD
    if process_group is None and has_others():
        warn(NOT_AVERAGED)
    return world_of(process_group)


def has_others() -> bool:
    """Whether this process is one of several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
