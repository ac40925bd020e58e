"""Models inside of DistributedDataParallel."""

import warnings
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .collectives import World, world_of

NOT_AVERAGED = (
    "torch.distributed is initialised, and Thor averages nothing over its ranks: pass the model as it is "
    "wrapped in DistributedDataParallel, or process_group=. Ranks with models of their own need neither."
)


def unwrapped(model: Any) -> Any:
    """The module that DistributedDataParallel trains, or ``model`` itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def averages_gradients(model: Any) -> bool:
    """Whether gradients are averaged before an optimizer sees them."""
    return isinstance(model, DistributedDataParallel)


def world_of_model(model: nn.Module, process_group: Any) -> World | None:
    """The ranks that train a model together.

    Args:
        model: as it is called, in its wrapper.
        process_group: as the user says; None: that of the wrapper.

    Raises:
        TypeError: ``process_group`` is none.
        ValueError: ``process_group`` does not contain this process.
    """
    if process_group is None and averages_gradients(model):
        process_group = model.process_group
    if process_group is None and _has_others():
        warnings.warn(NOT_AVERAGED, stacklevel=4)
    return world_of(process_group)


def _has_others() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
