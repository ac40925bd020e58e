"""Weights of which every rank has a part: tensor parallel layers.

Ranks that hold the rows of a weight ``W (out, in)`` make a part of the features of what the layer returns
each; ranks that hold columns read a part of the features of its input. The other side is whole on all of
them. A factor of the part would be a block of the diagonal of the layer's: products of features of different
ranks would be missing. So the rows of the side that is dealt out are gathered in the graph, in factor steps
only, and the factors are those of the whole layer, on all of these ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from .operands import Matrix, Operand, Reduction, Wrapped
from .outputs import Split
from .reindex import Path
from .walk import SWAP, NoSite, Site

NO_MATRIX = "ranks have a part of it each, and it is used as no plain matrix"


@dataclass(frozen=True)
class Gathered(Wrapped):
    """The rows of ``inner``, with the features of all ranks."""

    split: Split

    @property
    def features(self) -> int:
        """F, of all ranks together."""
        return self.split.length

    @property
    def batch_axes(self) -> tuple[int, ...]:
        """Those of ``inner``."""
        return self.inner.batch_axes

    def read(self, *values: Tensor) -> Tensor:
        """(R, F)."""
        return gathered(self.inner.read(*values), self.split)

    def count(self, *values: Tensor) -> Tensor:
        """That of ``inner``."""
        return self.inner.count(*values)

    def pool(self, reduction: Reduction, axis: int, *values: Tensor) -> Tensor:
        """(B, F)."""
        return gathered(self.inner.pool(reduction, axis, *values), self.split)


def part_of(operand: Operand) -> Operand:
    """The operand with the features of this rank."""
    return operand.inner if isinstance(operand, Gathered) else operand


def gathered(x: Tensor, split: Split) -> Tensor:
    """The columns of all ranks side by side: (R, F) of (R, this rank's).

    Chunks are of one length but for the last ones, which may be shorter, as those of ``torch.chunk``.
    """
    chunk = -(-split.length // split.size)
    columns = pad(x, (0, chunk - x.shape[-1])).mT.contiguous()
    started = torch.ops._c10d_functional.all_gather_into_tensor(columns, split.size, split.group)
    everybodys: Tensor = torch.ops._c10d_functional.wait_tensor(started)
    return everybodys[: split.length].mT


def whole(sites: Sequence[Site], split: Split | None) -> list[Site]:
    """The uses of a weight with the features of all ranks.

    Raises:
        NoSite: a use is not that of a plain matrix.
    """
    return list(sites) if split is None else [_whole(site, split) for site in sites]


def _whole(site: Site, split: Split) -> Site:
    rows = _axis(site.path, split) == 0
    if rows is not site.flipped:
        return replace(site, cotangent=_gathered(site.cotangent, split))
    return replace(site, activation=_gathered(site.activation, split))


def _gathered(operand: Operand, split: Split) -> Gathered:
    if not isinstance(operand, Matrix) or operand.grouped:
        raise NoSite(NO_MATRIX)
    return Gathered(operand.node, operand, split)


def _axis(path: Path, split: Split) -> int:
    """The axis of the layer's matrix that is dealt out: 0 for ``out``, 1 for ``in``."""
    if path not in ((), (SWAP,)):
        raise NoSite(NO_MATRIX)
    return split.axis if path == () else 1 - split.axis
