"""The two sides of a contraction ``sum_r g_r a_r^T``: rows of activations, or of cotangents.

An operand is a recipe: nodes of the graph, and a function from their values to rows. Values come from
the graph; whatever is computed from them is spliced into it.

Legend: R rows, F features; in a grouped layer E groups in front of both. B is the batch, where the
other rows of one datum are its positions.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from .nodes import PERMUTES, RESHAPES, permutation, shape, source, target
from .products import block_grams, gram

Reduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class Operand(ABC):
    """Rows of features, read from ``node`` (and further nodes).

    Attributes:
        node: where the rows are.
    """

    node: fx.Node

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """What the functions below take the values of."""
        return (self.node,)

    @property
    @abstractmethod
    def features(self) -> int:
        """F, the length of the side: what ``A`` or ``G`` is square in."""

    @property
    def groups(self) -> int:
        """E."""
        return 1

    @property
    def rows(self) -> Any:
        """R of every group: symbolic where the batch size is; at most that many where data decides."""
        return self.node.meta["val"].numel() // (self.features * self.groups)

    @property
    def ragged(self) -> bool:
        """Whether groups have different numbers of rows, as the data decide."""
        return False

    @abstractmethod
    def read(self, *values: Tensor) -> Tensor:
        """The rows: (R, F) or (E, R, F), in the dtype that factors are summed in."""

    def gram(self, *values: Tensor) -> Tensor:
        """``sum_r x_r x_r^T``: (F, F) or (E, F, F)."""
        return gram(self.read(*values))

    def squares(self, *values: Tensor) -> Tensor:
        """``sum_r x_r^2``: (F,) or (E, F)."""
        return self.read(*values).square().sum(-2)

    def blocks(self, size: int, *values: Tensor) -> Tensor:
        """Blocks of the diagonal of :meth:`gram`, the last one padded: (..., blocks, size, size)."""
        return block_grams(self.read(*values), size)

    def total(self, *values: Tensor) -> Tensor:
        """``sum_r x_r``: (F,) or (E, F)."""
        return self.read(*values).sum(-2)

    def count(self, *values: Tensor) -> Tensor:
        """R: 0-D, or (E,) where groups have different numbers of rows."""
        x = self.read(*values)
        return torch.full((), x.shape[-2], dtype=x.dtype, device=x.device)

    @property
    def batch_axes(self) -> tuple[int, ...]:
        """The axes of ``node`` that may be the batch, if its other rows are positions; () if none are."""
        return ()

    @property
    def row_axes(self) -> tuple[int | None, ...]:
        """For every one of ``nodes``, the axis whose slices are rows; None: it has none.

        Of several such axes it is the first, where the batch is. () where rows cannot be left out.
        """
        return ()

    def pool(self, reduction: Reduction, axis: int, *values: Tensor) -> Tensor:
        """The rows of every datum reduced to one: (B, F) or (E, B, F)."""
        raise NotImplementedError


@dataclass(frozen=True)
class Matrix(Operand):
    """Rows x features, or features x rows where ``transposed``.

    Further axes in front of these two are rows as well; of three axes the first is the groups where
    ``grouped``.
    """

    transposed: bool = False
    grouped: bool = False

    @property
    def features(self) -> int:
        """F."""
        return int(shape(self.node)[-2 if self.transposed else -1])

    @property
    def groups(self) -> int:
        """E."""
        return int(shape(self.node)[0]) if self.grouped else 1

    def read(self, *values: Tensor) -> Tensor:
        """(R, F) or (E, R, F)."""
        (x,) = values
        x = x.unsqueeze(0) if x.dim() == 1 else x
        x = x.mT if self.transposed else x
        return widened(x if self.grouped else x.flatten(0, -2))

    @property
    def batch_axes(self) -> tuple[int, ...]:
        """Any axis but that of features."""
        dims = len(shape(self.node))
        return () if self.transposed or self.grouped else tuple(range(dims - 1))

    @property
    def row_axes(self) -> tuple[int | None, ...]:
        """The first axis that is neither features nor groups."""
        dims = len(shape(self.node))
        features = dims - 2 if self.transposed else dims - 1
        return tuple(axis for axis in range(self.grouped, dims) if axis != features)[:1]

    def pool(self, reduction: Reduction, axis: int, *values: Tensor) -> Tensor:
        """(B, F)."""
        x = widened(values[0]).movedim(axis, 0)
        rows = x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)  # (B, positions, F)
        return rows.mean(1) if reduction == "mean" else rows.sum(1)


@dataclass(frozen=True)
class Wrapped(Operand):
    """An operand that reads what ``inner`` reads, and makes something else of it."""

    inner: Operand

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


@dataclass(frozen=True)
class Multiplied(Wrapped):
    """The rows of ``inner`` times ``by``, a number or a node."""

    by: Any

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """Those of ``inner``, then ``by``, where it is a node."""
        return (*self.inner.nodes, self.by) if isinstance(self.by, fx.Node) else self.inner.nodes

    @property
    def row_axes(self) -> tuple[int | None, ...]:
        """Those of ``inner``; ``by`` has no rows."""
        inner = self.inner.row_axes
        return (*inner, None) if inner and isinstance(self.by, fx.Node) else inner

    def _factors(self, values: tuple[Tensor, ...]) -> tuple[Tensor, Any]:
        """The rows and what they are multiplied by."""
        if not isinstance(self.by, fx.Node):
            return self.inner.read(*values), self.by
        x = self.inner.read(*values[:-1])
        return x, values[-1].to(x.dtype)


@dataclass(frozen=True)
class Mapped(Multiplied):
    """By a matrix: ``x_r P``, or ``x_r P^T`` where ``transposed``."""

    transposed: bool

    @property
    def features(self) -> int:
        """F."""
        return int(shape(self.by)[0 if self.transposed else 1])

    def read(self, *values: Tensor) -> Tensor:
        """(R, F)."""
        x, p = self._factors(values)
        return x @ (p.mT if self.transposed else p)


@dataclass(frozen=True)
class Scaled(Multiplied):
    """By a number, or feature by feature by a vector; or divided by it."""

    divide: bool = False

    def read(self, *values: Tensor) -> Tensor:
        """(R, F) or (E, R, F)."""
        x, by = self._factors(values)
        by = by.flatten() if isinstance(by, Tensor) else by
        return x / by if self.divide else x * by


@dataclass(frozen=True)
class Pooled(Operand):
    """One row per datum: its positions, and all ``parts`` (uses of one weight), are reduced to one.

    The *reduce* setting of Eschenhagen et al. 2023, eq. 13: activations are averaged, cotangents summed.
    """

    parts: tuple[Operand, ...]
    reduction: Reduction
    axis: int

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """Those of all parts."""
        return tuple(node for part in self.parts for node in part.nodes)

    @property
    def features(self) -> int:
        """F."""
        return self.parts[0].features

    @property
    def groups(self) -> int:
        """E."""
        return self.parts[0].groups

    @property
    def rows(self) -> Any:
        """B."""
        return shape(self.node)[self.axis]

    @property
    def row_axes(self) -> tuple[int | None, ...]:
        """The axis of the batch, in all parts that have one node."""
        return (self.axis,) * len(self.parts) if len(self.nodes) == len(self.parts) else ()

    def read(self, *values: Tensor) -> Tensor:
        """(B, F) or (E, B, F)."""
        given = iter(values)
        owned = [(part, [next(given) for _ in part.nodes]) for part in self.parts]
        rows = [part.pool(self.reduction, self.axis, *own) for part, own in owned]
        total = sum(rows[1:], start=rows[0])
        return total / len(rows) if self.reduction == "mean" else total


def widened(value: Tensor) -> Tensor:
    """The value in the dtype that factors are summed in: float64 for float64, else float32."""
    return value if value.dtype == torch.float64 else value.float()


def matrix(node: fx.Node, transposed: bool) -> Matrix:
    """The operand, read from the tensor that exists, through plain transpositions and flattenings."""
    operator, dims = target(node), len(shape(node))
    if operator in PERMUTES and dims == 2 and permutation(node) == (1, 0):
        return matrix(source(node), not transposed)
    if operator in RESHAPES and dims == 2 and not transposed and _only_flattens(node):
        return matrix(source(node), transposed)
    return Matrix(node, transposed)


def _only_flattens(node: fx.Node) -> bool:
    before = shape(source(node))
    return len(before) > 2 and bool(before[-1] == shape(node)[-1])
