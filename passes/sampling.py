"""Factors from a share of the rows.

Every k-th row along the first axis of rows, where the batch is, stands for all of them: its sums are scaled
to the number of rows there are, so ``R`` and ``n`` stay what they are. The estimate is unbiased where the
order of the rows means nothing, as it is with batches that were shuffled. In a flat list of sequences it is
every k-th position.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from .nodes import shape
from .operands import Wrapped


@dataclass(frozen=True)
class EveryKth(Wrapped):
    """Every ``k``-th row of ``inner``, for all of them."""

    k: int

    @property
    def rows(self) -> Any:
        """Those that are read."""
        node, axis = self._first
        size = shape(node)[axis]
        return self.inner.rows // size * ((size + self.k - 1) // self.k)

    def read(self, *values: Tensor) -> Tensor:
        """The rows that are read, scaled so that their products stand for all rows."""
        return self.inner.read(*self._kept(values)) * self._weight(values) ** 0.5

    def gram(self, *values: Tensor) -> Tensor:
        """An estimate of that of ``inner``."""
        return self.inner.gram(*self._kept(values)) * self._weight(values)

    def squares(self, *values: Tensor) -> Tensor:
        """An estimate of those of ``inner``."""
        return self.inner.squares(*self._kept(values)) * self._weight(values)

    def blocks(self, size: int, *values: Tensor) -> Tensor:
        """An estimate of those of ``inner``."""
        return self.inner.blocks(size, *self._kept(values)) * self._weight(values)

    def total(self, *values: Tensor) -> Tensor:
        """An estimate of that of ``inner``."""
        return self.inner.total(*self._kept(values)) * self._weight(values)

    def count(self, *values: Tensor) -> Tensor:
        """All rows of ``inner``."""
        return self.inner.count(*values)

    @property
    def _first(self) -> tuple[fx.Node, int]:
        """A node that has rows, and their axis."""
        axes = zip(self.nodes, self.inner.row_axes, strict=True)
        return next((node, axis) for node, axis in axes if axis is not None)

    def _kept(self, values: tuple[Tensor, ...]) -> list[Tensor]:
        axes = zip(values, self.inner.row_axes, strict=True)
        return [v if axis is None else v.movedim(axis, 0)[:: self.k].movedim(0, axis) for v, axis in axes]

    def _weight(self, values: tuple[Tensor, ...]) -> Any:
        """How many rows one stands for."""
        axes = zip(values, self.inner.row_axes, strict=True)
        size = next(v.shape[axis] for v, axis in axes if axis is not None)
        return size / ((size + self.k - 1) // self.k)
