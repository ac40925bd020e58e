"""THOR's rule for the side of its blocks, from this device and this model (Chen et al. 2021).

Two curves over the candidates 1, 16, 32, ..., up to the longest side of the model, which keeps all whole:

* the performance curve falls: with ``p_b`` the time of inverting the model's factors in blocks of ``b``,
  it is ``p_1 / p_b``, the speed relative to that of the smallest blocks;
* the spectral curve rises: the share of the model's factors that lose less than 1% by being cut into blocks
  of ``b``, in the spectral norm (:mod:`thor_fx.spectral_loss`).

The block size is the first candidate at or behind their crossing. MindSpore's own account of the method
reports 106 for ResNet-50 and takes the candidate closest to it, 128; the next one never loses more than the
crossing allows.

The rule takes for granted that smaller blocks are inverted faster. Where many tiny blocks are slower than
fewer larger ones, which also lose less, nobody would want the tiny ones: ``p_b`` is therefore the time of the
fastest candidate of ``b`` or more. Where times grow with ``b``, that is the rule as it was published.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .arguments import check_number
from .block_size_picture import draw
from .inversion_time import Timer, inversion, milliseconds
from .passes.outputs import Factor
from .spectral_loss import spectral_losses

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CANDIDATES = (1, 16, 32, 64, 128, 256, 512, 1024, 2048)
THRESHOLD = 0.01  # what a factor may lose, as a share of its spectral norm

Whole = Mapping[Factor, Tensor]
"""Whole factors, each (E, d, d)."""


@dataclass(frozen=True)
class BlockSizeReport:
    """Both curves and what follows; ``print(report)`` shows them as a table.

    Attributes:
        candidates: block sizes; the last one keeps every factor whole.
        milliseconds: of one refresh, at every candidate.
        losses: of every factor, one row for each of its groups, one column for every candidate.
        performance: the falling curve.
        spectral: the rising curve.
        crossing: where they cross, interpolated on a logarithmic axis.
        chosen: the block size.
        threshold: the largest loss that counts as none.
        device: what the times were measured on.
    """

    candidates: tuple[int, ...]
    milliseconds: tuple[float, ...]
    losses: Mapping[Factor, tuple[tuple[float, ...], ...]]
    performance: tuple[float, ...]
    spectral: tuple[float, ...]
    crossing: float
    chosen: int
    threshold: float
    device: str

    def __str__(self) -> str:
        rows = [("block size", "refresh ms", "performance", self._kept)]
        columns = self.candidates, self.milliseconds, self.performance, self.spectral
        rows += [(str(b), f"{ms:.3g}", f"{p:.3f}", f"{s:.3f}") for b, ms, p, s in zip(*columns, strict=True)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([*lines, self.summary])

    @property
    def _kept(self) -> str:
        return f"factors that lose < {100 * self.threshold:.3g}%"

    @property
    def summary(self) -> str:
        """Where the curves cross, and which factors lose most at the block size chosen."""
        place = self.candidates.index(self.chosen)
        loss = {factor: max(row[place] for row in rows) for factor, rows in self.losses.items()}
        worst = sorted(loss, key=loss.__getitem__, reverse=True)[:3]
        texts = [f"{f.side} of {f.layer} {loss[f]:.1%}" for f in worst if loss[f] >= self.threshold]
        return (
            f"the curves cross at {self.crossing:.4g} on {self.device}: block_size={self.chosen}"
            f"{'' if self.chosen < self.candidates[-1] else ', all factors whole'}\n"
            f"largest losses there: {', '.join(texts) or f'none of {100 * self.threshold:.3g}% or more'}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON knows; factors are called ``"layer A"``."""
        losses = {f"{factor.layer} {factor.side}": rows for factor, rows in self.losses.items()}
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"losses": losses}

    def draw(self, path: str | Path | None = None) -> "Figure":
        """Draw both curves, where there is a ``path``, into that file: ``.svg``, ``.png``, ``.pdf``.

        Returns:
            The figure.

        Raises:
            ImportError: matplotlib is not installed.
        """
        return draw(
            path,
            candidates=self.candidates,
            performance=self.performance,
            spectral=self.spectral,
            crossing=self.crossing,
            chosen=self.chosen,
            labels=(f"speed of a refresh ({self.device})", self._kept),
        )


def rule(factors: Whole, threshold: float = THRESHOLD, timer: Timer | None = None) -> BlockSizeReport:
    """Apply the rule at the top of this module to whole factors.

    Raises:
        TypeError: ``threshold`` is no number.
        ValueError: ``threshold`` is not positive, there is no factor, or one is not finite.
    """
    check_number("threshold", threshold, positive=True)
    if not factors:
        raise ValueError("no layer has a whole factor, so there is nothing to cut: see thor_fx.explain")
    if not all_finite(factors):
        names = [f"{f.side} of {f.layer!r}" for f, m in factors.items() if not m.isfinite().all()]
        raise ValueError(
            f"the factor {names[0]} is not finite on this batch, so that no block size can be chosen: give "
            "another batch, or block_size=128"
        )
    candidates = candidates_for(max(matrices.shape[-1] for matrices in factors.values()))
    timer = milliseconds if timer is None else timer
    with torch.no_grad():
        times = [timer(inversion(factors.values(), block_size)) for block_size in candidates]
        table = {factor: spectral_losses(m, candidates).tolist() for factor, m in factors.items()}
    losses = {factor: tuple(map(tuple, rows)) for factor, rows in table.items()}
    performance = performance_curve(times)
    spectral = spectral_curve([row for rows in losses.values() for row in rows], threshold)
    crossing, place = cross(candidates, performance, spectral)
    return BlockSizeReport(
        candidates,
        tuple(times),
        losses,
        performance,
        spectral,
        crossing,
        chosen=candidates[min(range(place, len(times)), key=times.__getitem__)],
        threshold=threshold,
        device=_name(next(iter(factors.values())).device),
    )


def all_finite(factors: Whole) -> bool:
    """Whether a choice can be made from these factors; waits for the device."""
    return bool(torch.stack([matrices.isfinite().all() for matrices in factors.values()]).all())


def candidates_for(longest: int) -> tuple[int, ...]:
    """The block sizes to try where the longest side has length ``longest``.

    Example:
        >>> candidates_for(100), candidates_for(64)
        ((1, 16, 32, 64, 100), (1, 16, 32, 64))
    """
    return (*(b for b in CANDIDATES if b < longest), longest)


def performance_curve(times: Sequence[float]) -> tuple[float, ...]:
    """``p_1 / p_b``; a time counts as that of the fastest block size that is at least as large.

    Raises:
        ValueError: a time is not positive.

    Example:
        >>> performance_curve([1.0, 2.0, 4.0]), performance_curve([5.0, 1.0, 2.0])
        ((1.0, 0.5, 0.25), (1.0, 1.0, 0.5))
    """
    if min(times) <= 0:
        raise ValueError(f"timer must return milliseconds > 0, got {min(times)}")
    effective = list(accumulate(reversed(times), min))[::-1]
    return tuple(effective[0] / time for time in effective)


def spectral_curve(losses: Sequence[Sequence[float]], threshold: float) -> tuple[float, ...]:
    """The share of matrices (rows) whose loss is below the threshold, for every candidate (column).

    Example:
        >>> spectral_curve([(0.5, 0.001), (0.2, 0.05)], threshold=0.01)
        (0.0, 0.5)
    """
    columns = zip(*losses, strict=True)
    return tuple(sum(loss < threshold for loss in column) / len(column) for column in columns)


def cross(
    candidates: Sequence[int], performance: Sequence[float], spectral: Sequence[float]
) -> tuple[float, int]:
    """Where the curves cross, and the first candidate at or behind that place.

    Between candidates both are lines over the logarithm of the block size.

    Example:
        >>> cross([64, 128], performance=[0.9, 0.5], spectral=[0.1, 0.7])
        (111.4..., 1)
    """
    # ends at or below 0: whole factors lose nothing
    lead = [p - s for p, s in zip(performance, spectral, strict=True)]
    place = next(i for i, difference in enumerate(lead) if difference <= 0)
    if place == 0:
        return float(candidates[0]), 0
    before, after = lead[place - 1], lead[place]
    ratio = candidates[place] / candidates[place - 1]
    return candidates[place - 1] * ratio ** (before / (before - after)), place


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
