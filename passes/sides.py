"""The two sides of a layer, and how much of each side's factor is kept.

A side of length ``d`` has a factor of one of five kinds, from the whole to nothing::

    dense      (d, d)        the factor
    blocks     (F, b, b)     F = ceil(d / b) blocks of its diagonal; the last one is padded with zeros
    diagonal   (d,)          its diagonal; the whole of it where rows are one-hot (an embedding)
    mean       (d,)          the rows' mean, whose outer product stands for the factor
    identity   nothing       the side is left alone

A layer with E groups has one factor per group: (E, d, d), (E, F, b, b), (E, d), (E, d).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

Kind = Literal["dense", "blocks", "diagonal", "mean", "identity"]


@dataclass(frozen=True)
class Side:
    """One side of a layer.

    Attributes:
        dim: its length ``d``.
        kind: what is kept of the factor.
        block: ``b``, for ``kind="blocks"``.
        groups: E; 1 where a layer is not grouped.
        joint: the last coordinate is the bias's, and ``dim`` counts it.
    """

    dim: int
    kind: Kind = "dense"
    block: int = 0
    groups: int = 1
    joint: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the factor; without the axis of groups where there is one group."""
        d, b = self.dim, self.block
        blocks = (-(-d // max(1, b)), b, b)
        one = {"dense": (d, d), "blocks": blocks, "diagonal": (d,), "mean": (d,), "identity": ()}
        return (self.groups, *one[self.kind]) if self.groups > 1 else one[self.kind]

    @property
    def numel(self) -> int:
        """How many numbers the factor has, in all groups."""
        return 0 if self.kind == "identity" else math.prod(self.shape)

    def __str__(self) -> str:
        times = f"{self.groups} x " if self.groups > 1 else ""
        text = {
            "dense": f"{self.dim}x{self.dim}",
            "blocks": f"{self.dim} in blocks of {self.block}",
            "diagonal": f"diagonal of {self.dim}",
            "mean": f"mean of {self.dim}",
            "identity": f"none of {self.dim}",
        }
        return times + text[self.kind]


def join(sides: Iterable[Side]) -> Side:
    """What is kept of a side when the factors of several uses are added up."""
    order: list[Kind] = ["identity", "mean", "dense", "blocks", "diagonal"]
    return min(sides, key=lambda side: order.index(side.kind))


def widen(value: Tensor, have: Side, want: Side) -> Tensor:
    """The factor of kind ``have`` in the form of kind ``want``, which keeps at least as much."""
    if have.kind == want.kind:
        return value
    assert have.kind == "diagonal", f"{have} cannot become {want}"
    if want.kind == "blocks":
        padded = pad(value, (0, -have.dim % want.block))
        value = padded.unflatten(-1, (-1, want.block))
    return value.unsqueeze(-1) * torch.eye(value.shape[-1], dtype=value.dtype, device=value.device)


def trace(value: Tensor, side: Side) -> Tensor:
    """The trace of a factor, group by group: (...,)."""
    if side.kind == "diagonal":
        return value.sum(-1)
    if side.kind == "mean":
        return value.square().sum(-1)
    diagonal = value.flatten(-2)[..., :: value.shape[-1] + 1]
    return diagonal.sum(-1) if side.kind == "dense" else diagonal.sum((-2, -1))


def without_bias(value: Tensor, side: Side) -> Tensor:
    """The factor without the coordinate of the bias, where ``side`` has one."""
    if not side.joint:
        return value
    if side.kind == "blocks":
        place = (side.dim - 1) % side.block
        inner, rest = value[..., -1:, :place, :place], side.block - place
        return torch.cat([value[..., :-1, :, :], pad(inner, (0, rest, 0, rest))][: 2 if place else 1], -3)
    return value[..., :-1] if side.kind == "mean" else value[..., :-1, :-1]
