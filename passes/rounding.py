"""Factors from rounded rows: products of bfloat16 numbers, summed in float32.

A processor with units for bfloat16 makes such products several times faster. Rows are rounded, not sums:
every number of a factor has a relative error of the order of 2^-9, but see the note in
:mod:`thor_fx.passes.products` on CPUs. What is no product of matrices is computed as without.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .operands import Wrapped
from .products import block_grams, gram


@dataclass(frozen=True)
class Rounded(Wrapped):
    """The rows of ``inner``, rounded to ``dtype`` in products."""

    dtype: torch.dtype

    def read(self, *values: Tensor) -> Tensor:
        """Those of ``inner``, not rounded."""
        return self.inner.read(*values)

    def gram(self, *values: Tensor) -> Tensor:
        """(F, F) or (E, F, F)."""
        return gram(self.inner.read(*values), self.dtype)

    def blocks(self, size: int, *values: Tensor) -> Tensor:
        """(..., blocks, size, size)."""
        return block_grams(self.inner.read(*values), size, self.dtype)

    def squares(self, *values: Tensor) -> Tensor:
        """Those of ``inner``."""
        return self.inner.squares(*values)

    def total(self, *values: Tensor) -> Tensor:
        """That of ``inner``."""
        return self.inner.total(*values)

    def count(self, *values: Tensor) -> Tensor:
        """That of ``inner``."""
        return self.inner.count(*values)
