"""The dtype in which sums over many numbers are kept."""

import torch
from torch import Tensor


def wide(tensor: Tensor) -> torch.dtype:
    """float64 for a float64 tensor, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
