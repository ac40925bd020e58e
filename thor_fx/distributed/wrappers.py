"""Models inside of DistributedDataParallel, and models whose parameters are dealt out over ranks."""

import warnings
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

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
        warnings.warn(NOT_AVERAGED, stacklevel=4)
    return world_of(process_group)


def has_others() -> bool:
    """Whether this process is one of several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
