"""Operands of experts: every row belongs to one of E groups, as the data decide.

Legend: S rows of all groups together, F features.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from .nodes import shape
from .operands import Operand, widened


@dataclass(frozen=True)
class Routed(Operand):
    """Rows (S, F) with the number of the expert of each.

    Attributes:
        expert: (S,) numbers of experts, or (E,) offsets: expert ``e`` has the rows from
            ``offset[e - 1]`` to ``offset[e]``, where ``sorted_rows``.
        experts: E.
        sorted_rows: whether ``expert`` holds offsets.
        transposed: whether ``node`` is (F, S).
        grouped_mm: the operator that multiplies sorted rows group by group, where the graph uses one.
    """

    expert: fx.Node
    experts: int
    sorted_rows: bool
    transposed: bool = False
    grouped_mm: Any = field(default=None)

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """Rows, then experts or offsets."""
        return self.node, self.expert

    @property
    def features(self) -> int:
        """F."""
        sizes = shape(self.node)
        return int(sizes[0] if self.transposed else sizes[-1])

    @property
    def groups(self) -> int:
        """E."""
        return self.experts

    @property
    def ragged(self) -> bool:
        """Yes."""
        return True

    @property
    def rows(self) -> Any:
        """S, of all groups together."""
        return self.node.meta["val"].numel() // self.features

    def read(self, *values: Tensor) -> Tensor:
        """(E, S, F), written down: a row is zero in every group but its own."""
        x = self._matrix(values[0])
        return x * self._mask(*values)[:, :, None]

    def gram(self, *values: Tensor) -> Tensor:
        """(E, F, F)."""
        x = values[0].mT if self.transposed else values[0]
        if self.grouped_mm is not None:
            return widened(self.grouped_mm(x.mT, x, values[1]))
        x = self._matrix(values[0])
        return torch.stack([(x * mask[:, None]).mT @ x for mask in self._mask(*values).unbind()])

    def squares(self, *values: Tensor) -> Tensor:
        """(E, F)."""
        return self._mask(*values) @ self._matrix(values[0]).square()

    def blocks(self, size: int, *values: Tensor) -> Tensor:
        """(E, blocks, size, size)."""
        x = torch.nn.functional.pad(self._matrix(values[0]), (0, -self.features % size))
        tiles = x.unflatten(1, (-1, size)).movedim(1, 0)  # (blocks, S, size)
        return torch.stack([(tiles * mask[:, None]).mT @ tiles for mask in self._mask(*values).unbind()])

    def total(self, *values: Tensor) -> Tensor:
        """(E, F)."""
        return self._mask(*values) @ self._matrix(values[0])

    def count(self, *values: Tensor) -> Tensor:
        """(E,)."""
        return self._mask(*values).sum(1)

    def _matrix(self, x: Tensor) -> Tensor:
        x = widened(x)
        return x.mT if self.transposed else x.reshape(-1, self.features)

    def _mask(self, x: Tensor, expert: Tensor) -> Tensor:
        """1 where a row belongs to an expert: (E, S)."""
        if self.sorted_rows:
            count = x.shape[1] if self.transposed else x.shape[0]
            places = torch.arange(count, device=x.device, dtype=expert.dtype)
            expert = torch.searchsorted(expert, places, right=True)
        numbers = torch.arange(self.experts, device=x.device)
        return (expert.flatten() == numbers[:, None]).to(widened(x).dtype)
