"""Operands of embeddings: rows are one-hot, so they stay indices and their factor is a diagonal.

Legend: V entries of the table, R lookups; B bags, each with some of the R lookups.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .nodes import shape
from .operands import Operand, widened


@dataclass(frozen=True)
class OneHot(Operand):
    """Row ``r`` is the unit vector of ``index[r]``; ``node`` holds the indices, of any shape.

    Attributes:
        size: V.
        padding: the index whose lookups do not count, or -1.
        like: a node in the dtype of the weight.
    """

    size: int
    padding: int
    like: fx.Node

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The indices and ``like``."""
        return self.node, self.like

    @property
    def features(self) -> int:
        """V."""
        return self.size

    @property
    def rows(self) -> Any:
        """R, lookups of the padding included."""
        return self.node.meta["val"].numel()

    def read(self, *values: Tensor) -> Tensor:
        """(R, V), written down."""
        rows = torch.nn.functional.one_hot(_positive(values[0], self.size).flatten(), self.size)
        return rows * self._weights(*values)[:, None]

    def squares(self, *values: Tensor) -> Tensor:
        """How often every entry is looked up: (V,)."""
        weights = self._weights(*values)
        return weights.new_zeros(self.size).index_add(0, _positive(values[0], self.size).flatten(), weights)

    def total(self, *values: Tensor) -> Tensor:
        """(V,): a row and its square are the same."""
        return self.squares(*values)

    def count(self, *values: Tensor) -> Tensor:
        """R, without lookups of the padding."""
        return self._weights(*values).sum()

    def _weights(self, index: Tensor, like: Tensor) -> Tensor:
        """1 for every lookup, 0 for the padding: (R,)."""
        kept = torch.ones(index.numel(), dtype=widened(like).dtype, device=index.device)
        return kept if self.padding < 0 else kept * (index.flatten() != self.padding)


@dataclass(frozen=True)
class Looked(Operand):
    """The cotangents of lookups: ``node`` is (*index, F); rows of the padding are zero."""

    index: fx.Node
    padding: int

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The cotangents, then the indices."""
        return self.node, self.index

    @property
    def rows(self) -> Any:
        """R, lookups of the padding included."""
        return self.index.meta["val"].numel()

    @property
    def features(self) -> int:
        """F."""
        size = 1
        for length in shape(self.node)[len(shape(self.index)) :]:
            size *= int(length)
        return size

    @property
    def row_axes(self) -> tuple[int | None, ...]:
        """The first axis of both."""
        return (0, 0) if shape(self.index) else ()

    def read(self, *values: Tensor) -> Tensor:
        """(R, F)."""
        g, index = values
        rows = widened(g).reshape(index.numel(), -1)
        return rows if self.padding < 0 else rows * (index.flatten() != self.padding)[:, None]


@dataclass(frozen=True)
class Bag(Operand):
    """Row ``b`` is the weighted sum of the unit vectors of the entries in bag ``b``.

    Attributes:
        size: V.
        offsets: where every bag starts in ``node``, the flat list of indices.
        bags: a node whose first axis is B (its cotangent).
        weights: a weight for every lookup, or None.
        mean: whether a bag is averaged.
        padding: the index whose lookups do not count, or -1.
    """

    size: int
    offsets: fx.Node
    bags: fx.Node
    weights: fx.Node | None
    mean: bool
    padding: int

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """Indices, offsets, cotangents, and weights where there are any."""
        return (self.node, self.offsets, self.bags, *([] if self.weights is None else [self.weights]))

    @property
    def features(self) -> int:
        """V."""
        return self.size

    @property
    def rows(self) -> Any:
        """B."""
        return shape(self.bags)[0]

    def read(self, *values: Tensor) -> Tensor:
        """(B, V), written down."""
        bag, weights = self._lookups(*values)
        place = bag * self.size + values[0]
        rows = weights.new_zeros(values[2].shape[0] * self.size).index_add(0, place, weights)
        return rows.unflatten(0, (-1, self.size))

    def squares(self, *values: Tensor) -> Tensor:
        """(V,): lookups of one entry in one bag add up before they are squared."""
        bag, weights = self._lookups(*values)
        place, order = (bag * self.size + values[0]).sort()
        first = torch.searchsorted(place, place)  # of the same entry in the same bag, for every lookup
        sums = weights.new_zeros(place.shape[0]).index_add(0, first, weights[order])
        return weights.new_zeros(self.size).index_add(0, values[0][order], weights[order] * sums[first])

    def total(self, *values: Tensor) -> Tensor:
        """(V,)."""
        _, weights = self._lookups(*values)
        return weights.new_zeros(self.size).index_add(0, values[0], weights)

    def count(self, *values: Tensor) -> Tensor:
        """B."""
        g = widened(values[2])
        return torch.full((), g.shape[0], dtype=g.dtype, device=g.device)

    def _lookups(self, index: Tensor, offsets: Tensor, g: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
        """The bag and the weight of every lookup."""
        count = g.shape[0]
        places = torch.arange(index.shape[0], device=index.device, dtype=offsets.dtype)
        bag = torch.searchsorted(offsets[:count].contiguous(), places, right=True) - 1
        weights = widened(given[0]) if given else widened(g).new_ones(index.shape[0])
        if self.padding >= 0:
            weights = weights * (index != self.padding)
        if self.mean:
            kept = weights.new_zeros(count).index_add(0, bag, weights)
            weights = weights / kept[bag].clamp(min=1)
        return bag, weights


def _positive(index: Tensor, size: int) -> Tensor:
    """Indices from the end (``w[-1]``) as indices from the start."""
    return torch.where(index < 0, index + size, index)
