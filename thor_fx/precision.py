"""The dtype in which sums over many numbers are kept, and what is computed in dtypes of its own."""

import contextlib

import torch
from torch import Tensor


def wide(tensor: Tensor) -> torch.dtype:
    """float64 for a float64 tensor, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def as_written(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Where operators take the dtypes of their operands: autocast is for models, and not for an update.

    Loops call optimizers, and whole steps, inside of theirs.
    """
    if not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
