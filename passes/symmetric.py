"""Which products ``x^T x`` a GPU computes by :mod:`thor_fx.passes.symmetric_kernel`.

The kernel leaves half of the product out. That pays where tensor cores do the work: on bfloat16 and float16,
and on float32 where torch's own products may round it to TF32. In plain float32 a product of Triton's does
not reach the speed of cuBLAS, and there is no kernel for float64: these stay one product.

NOTE: [Not timed yet] No GPU was at hand. The limits below are estimates, ``benchmarks/symmetric.py`` is what
measures them.
"""

from typing import Any

import torch
from torch import Tensor

try:
    from .symmetric_kernel import symmetric
except ImportError:  # Triton comes with torch's builds for CUDA only
    symmetric = None

KERNEL = None if symmetric is None else torch.ops.thor_fx.symmetric.default

FEATURES = 512  # four tiles to a side: five eighths of the work
MULTIPLE = 16  # of features: rows that begin elsewhere cannot be copied in large words
ROWS = 1024  # of fewer, the result takes longer to write than to compute
TENSOR_CORES = (8, 0)  # the first architecture with units for bfloat16 and TF32


def worth_it(rows: Any, features: int, dtype: torch.dtype, *, tf32: bool) -> bool:
    """Whether half of a product is faster than cuBLAS with all of it.

    Args:
        rows: R; a symbolic number counts as many, for a comparison would fix the batch size.
        features: F.
        dtype: what the rows are multiplied in.
        tf32: whether float32 may be rounded to TF32.
    """
    by_tensor_cores = dtype in {torch.bfloat16, torch.float16} or (dtype == torch.float32 and tf32)
    many = not isinstance(rows, int) or rows >= ROWS
    return by_tensor_cores and many and features >= FEATURES and features % MULTIPLE == 0


def by_kernel(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether ``x^T x`` of rows (..., R, F) multiplied in ``dtype`` is the kernel's, on the device of ``x``.

    The setting for TF32 is that of the time when the product is traced.
    """
    if symmetric is None or not x.is_cuda or torch.version.hip is not None or not _has_tensor_cores(x.device):
        return False
    features = x.shape[-1]
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return isinstance(features, int) and worth_it(x.shape[-2], features, dtype, tf32=tf32)


def _has_tensor_cores(device: torch.device) -> bool:
    """Where there is no device, what is traced on fake tensors is for one of today's."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= TENSOR_CORES


def result_of(x: Tensor) -> Tensor:
    """Memory for what the kernel makes of rows (B, R, F), not written to."""
    features = x.shape[-1]
    return x.new_empty((x.shape[0], features, features), dtype=torch.float32)


def gram_by_kernel(x: Tensor) -> Tensor:
    """``x^T x`` of rows (..., R, F) as they are, in float32: (..., F, F)."""
    assert symmetric is not None, "by_kernel was asked"
    if x.dim() == 2:
        return symmetric(x.unsqueeze(0)).squeeze(0)
    return symmetric(x.flatten(0, -3)).unflatten(0, x.shape[:-2])
