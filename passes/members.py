"""Convolutions and lookups of an ensemble: weights with a further axis in front, one slice for every member.

``torch.func.vmap`` over stacked weights makes one operator of those of all members. Where all of them read
one input, that is a convolution with E times the outputs, or a lookup of rows E times as long; where every
member has indices of its own, it is a lookup in one table with E times the entries. No member's features
belong to another's layer: each has the factor pair that it has alone.

Legend: E members, R rows, F features of one member, V entries of one member's table.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from .lookups import OneHot
from .nodes import arguments, shape, target, upstream
from .operands import Reduction, Wrapped
from .reindex import Path, View, take
from .walk import SWAP_GROUPED, Site


@dataclass(frozen=True)
class Alike(Wrapped):
    """The rows of ``inner``, which all members read."""

    members: int

    @property
    def groups(self) -> int:
        """E."""
        return self.members

    @property
    def batch_axes(self) -> tuple[int, ...]:
        """Those of ``inner``."""
        return self.inner.batch_axes

    def read(self, *values: Tensor) -> Tensor:
        """(E, R, F)."""
        return self._each(self.inner.read(*values))

    def gram(self, *values: Tensor) -> Tensor:
        """(E, F, F)."""
        return self._each(self.inner.gram(*values))

    def squares(self, *values: Tensor) -> Tensor:
        """(E, F)."""
        return self._each(self.inner.squares(*values))

    def blocks(self, size: int, *values: Tensor) -> Tensor:
        """(E, blocks, size, size)."""
        return self._each(self.inner.blocks(size, *values))

    def total(self, *values: Tensor) -> Tensor:
        """(E, F)."""
        return self._each(self.inner.total(*values))

    def count(self, *values: Tensor) -> Tensor:
        """R."""
        return self.inner.count(*values)

    def pool(self, reduction: Reduction, axis: int, *values: Tensor) -> Tensor:
        """(E, B, F)."""
        return self._each(self.inner.pool(reduction, axis, *values))

    def _each(self, value: Tensor) -> Tensor:
        return value.repeat(self.members, *[1] * value.dim())


@dataclass(frozen=True)
class Apart(Wrapped):
    """The rows of ``inner``, whose features are those of one member behind those of the other."""

    members: int

    @property
    def groups(self) -> int:
        """E."""
        return self.members

    @property
    def features(self) -> int:
        """F."""
        return self.inner.features // self.members

    @property
    def batch_axes(self) -> tuple[int, ...]:
        """Those of ``inner``."""
        return self.inner.batch_axes

    def read(self, *values: Tensor) -> Tensor:
        """(E, R, F)."""
        return self._split(self.inner.read(*values))

    def pool(self, reduction: Reduction, axis: int, *values: Tensor) -> Tensor:
        """(E, B, F)."""
        return self._split(self.inner.pool(reduction, axis, *values))

    def _split(self, rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (self.members, -1)).movedim(-2, 0)


@dataclass(frozen=True)
class _Shelved(Wrapped):
    """Lookups in the tables of all members, one behind the other: a row is its entry's member's."""

    members: int
    entries: int

    @property
    def groups(self) -> int:
        """E."""
        return self.members

    @property
    def ragged(self) -> bool:
        """Yes."""
        return True

    @property
    def row_axes(self) -> tuple[int | None, ...]:
        """None: the first axis is that of members, not of rows."""
        return ()


@dataclass(frozen=True)
class OwnEntries(_Shelved):
    """The one-hot rows of ``inner``, in as many entries as one member has."""

    @property
    def features(self) -> int:
        """V."""
        return self.entries

    def read(self, *values: Tensor) -> Tensor:
        """(E, R, V); zero where a row is another member's."""
        return self.inner.read(*values).unflatten(-1, (self.members, -1)).movedim(-2, 0)

    def squares(self, *values: Tensor) -> Tensor:
        """(E, V)."""
        return self.inner.squares(*values).unflatten(0, (self.members, -1))

    def total(self, *values: Tensor) -> Tensor:
        """(E, V): a row and its square are the same."""
        return self.squares(*values)

    def count(self, *values: Tensor) -> Tensor:
        """(E,)."""
        return self.squares(*values).sum(-1)


@dataclass(frozen=True)
class OwnLooked(_Shelved):
    """The cotangents of ``inner``, of which every member reads its own."""

    def read(self, *values: Tensor) -> Tensor:
        """(E, R, F); zero where a row is another member's."""
        return torch.stack(self._shares(*values))

    def gram(self, *values: Tensor) -> Tensor:
        """(E, F, F)."""
        rows = self.inner.read(*values)
        return torch.stack([share.mT @ rows for share in self._shares(*values)])

    def _shares(self, *values: Tensor) -> list[Tensor]:
        rows, index = self.inner.read(*values), values[1].flatten()
        return [rows * (index // self.entries == member)[:, None] for member in range(self.members)]


def by_member(site: Site, sizes: tuple[int, ...]) -> Site:
    """The site with a factor pair for every member, where its weight is that of an ensemble in one operator.

    Args:
        site: a use of a weight.
        sizes: the shape of the parameter.
    """
    axes = _axes(site)
    further = () if axes is None or site.groups > 1 else sizes[: max(0, len(sizes) - axes)]
    members = math.prod(further)
    if members == 1:
        return site
    entries = torch.arange(math.prod(sizes)).view(sizes)
    layer = take(site.path, entries)  # (out, in)
    owner = layer // (entries.numel() // members)
    a, g = site.activation, site.cotangent
    if _one_behind_the_other(owner[:, 0], members):
        layer = layer.unflatten(0, (members, -1))
        a, g = Alike(a.node, a, members), Apart(g.node, g, members)
    elif isinstance(a, OneHot) and _counts(a.node, members) and _one_behind_the_other(owner[0], members):
        layer = layer.unflatten(1, (members, -1)).movedim(1, 0)
        entry_count = layer.shape[2]
        a, g = OwnEntries(a.node, a, members, entry_count), OwnLooked(g.node, g, members, entry_count)
    else:
        return site
    path = _path_to(layer, entries)
    return site if path is None else replace(site, path=path, activation=a, cotangent=g)


def _counts(index: fx.Node, members: int) -> bool:
    """Whether indices are those of each member in its own table, of which ``vmap`` counts the places."""
    ranges = [node for node in upstream([index]) if str(target(node)).startswith("aten.arange")]
    return any(node.meta["val"].numel() == members for node in ranges)


def _path_to(layer: Tensor, entries: Tensor) -> Path | None:
    """The path from the parameter to the matrices (E, out, in), or (E, in, out) where it stores those."""
    members, out, in_ = layer.shape
    straight: Path = (View((members, out, in_)),)
    turned: Path = (View((members, in_, out)), SWAP_GROUPED)
    return next((path for path in (straight, turned) if torch.equal(take(path, entries), layer)), None)


def _axes(site: Site) -> int | None:
    """How many axes the weight has for the operator that uses it; None where that tells nothing."""
    if site.kind == "convolution":
        return len(shape(arguments(site.gradient)[2]))
    return len(shape(site.gradient)) if site.kind == "embedding" else None


def _one_behind_the_other(owner: Tensor, members: int) -> bool:
    """Whether a side of the matrix is that of the first member, then the second's, and so on."""
    length, rest = divmod(len(owner), members)
    return not rest and torch.equal(owner, torch.arange(members).repeat_interleave(length))
