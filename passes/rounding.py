"""Factors from rounded rows: products of bfloat16 numbers, summed in float32.

A processor with units for bfloat16 makes such products several times faster. Rows are rounded, not sums:
every number of a factor has a relative error of the order of 2^-9, but see the note in
:mod:`thor_fx.passes.products` on CPUs. What is no product of matrices is computed as without.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .operands import Operand
from .products import block_grams, gram


@dataclass(frozen=True)
class Rounded(Operand):
    """The rows of ``inner``, rounded to ``dtype`` in products."""

    inner: Operand
    dtype: torch.dtype

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """Those of ``inner``."""
        return self.inner.nodes

    @property
    def features(self) -> int:
        """F."""
        return self.inner.features

    @property
    def groups(self) -> int:
        """E."""
        return self.inner.groups

    @property
    def rows(self) -> Any:
        """R."""
        return self.inner.rows

    @property
    def row_axes(self) -> tuple[int | None, ...]:
        """Those of ``inner``."""
        return self.inner.row_axes

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
