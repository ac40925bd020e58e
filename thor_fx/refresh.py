"""Refresh: recompute the damped inverses of all factors, all blocks of one size in one batched call.

Damping, by the rules at the top of :mod:`thor_fx.precondition`; ``tr`` and ``dim`` of a side of which
nothing is kept are those of the identity.

Legend: L matrices of one shape, of one layer or of several.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import blocks
from .blocks import Blocks
from .layers import Coverage, Layer
from .linalg import damped_inverse, damped_reciprocal
from .passes.sides import Side, trace
from .transform import Params

DampingRule = Literal["factor", "sqrt", "pi", "relative"]
Pair = tuple[Tensor | None, Tensor | None]


class InversePair(NamedTuple):
    """The damped inverses of L matrices of one shape."""

    input: Blocks
    output: Blocks

    def select(self, places: list[slice], present: list[bool]) -> "InversePair":
        """The inverses of some layers only: not all have a gradient, or factors, in every step."""
        if all(present):
            return self
        wanted = [place for place, here in zip(places, present, strict=True) if here]
        return InversePair(*(tuple(torch.cat([part[p] for p in wanted]) for part in side) for side in self))

    def replace(self, places: list[slice], present: list[bool], new: "InversePair") -> "InversePair":
        """All inverses, with those of some layers replaced."""
        if all(present):
            return new

        def merge(old: Tensor, part: Tensor) -> Tensor:
            pieces, start = [], 0
            for place, here in zip(places, present, strict=True):
                stop = start + (place.stop - place.start) * here
                pieces.append(part[start:stop] if here else old[place])
                start = stop
            return torch.cat(pieces)

        sides = zip(self, new, strict=True)
        return InversePair(*(tuple(map(merge, old, side)) for old, side in sides))


def by_shape(coverage: Coverage, params: Params) -> dict[str, list[Layer]]:
    """Layers that can be handled in one batched call: same sides, same dtype."""
    groups: dict[str, list[Layer]] = {}
    for layer in coverage.layers.values():
        dtype = str(params[layer.param].dtype).removeprefix("torch.")
        groups.setdefault(f"{_key(layer.output)}x{_key(layer.input)} {dtype}", []).append(layer)
    return groups


def _key(side: Side) -> str:
    how = {"dense": "", "blocks": f" in {side.block}", "diagonal": " diagonal ", "identity": " identity "}
    return f"{side.dim}{how[side.kind]}"


def spans(layers: list[Layer]) -> list[slice]:
    """Where the matrices of every layer are among the L matrices of one shape."""
    ends = itertools.accumulate(layer.groups for layer in layers)
    return [slice(end - layer.groups, end) for end, layer in zip(ends, layers, strict=True)]


def per_side(
    rule: DampingRule, lam: Tensor | float, pair: Pair, layer: Layer
) -> tuple[Tensor | float, Tensor | float]:
    """The damping of (L, ...) factors ``A`` and ``G``: one value, or one per matrix."""
    if rule == "factor":
        return lam, lam
    strength = lam**0.5
    if rule == "sqrt":
        return strength, strength
    mean_a, mean_g = (_mean(v, side) for v, side in zip(pair, (layer.input, layer.output), strict=True))
    if rule == "relative":
        return lam * _or_one(mean_a), lam * _or_one(mean_g)
    if not isinstance(mean_a, Tensor) and not isinstance(mean_g, Tensor):
        return strength, strength  # nothing is kept of either side
    balanced = torch.as_tensor(mean_a / mean_g) ** 0.5
    usable = balanced.isfinite() & (balanced > 0)  # a dead side has no trace
    pi = torch.where(usable, balanced, torch.ones_like(balanced))
    return pi * strength, strength / pi


def _mean(factors: Tensor | None, side: Side) -> Tensor | float:
    """The mean of the diagonal."""
    return 1.0 if factors is None else trace(factors, side) / side.dim


def _or_one(mean: Tensor | float) -> Tensor | float:
    """The mean eigenvalue, or 1 for a matrix of zeros.

    A layer behind a head of zeros has gradients, and with them ``G``, of exactly zero in the first step.
    ``lambda`` times the identity is what every other rule damps it with.
    """
    return torch.where(mean > 0, mean, torch.ones_like(mean)) if isinstance(mean, Tensor) else mean


def root(rule: DampingRule, lam: Tensor | float) -> Tensor | float:
    """The damping of what has no factors."""
    return lam if rule in {"factor", "relative"} else lam**0.5


class _Job(NamedTuple):
    """What to invert: (L, F, b, b) or (L, d); with what damping, (L,); and the inverses there are."""

    part: Tensor
    strength: Tensor
    before: Tensor


def refresh(
    groups: Mapping[str, list[Layer]],
    present: Mapping[str, list[bool]],
    measured: Callable[[Layer], Pair],
    previous: Mapping[str, InversePair],
    damping: Callable[[Pair, Layer], tuple[Tensor | float, Tensor | float]],
    block_size: int | None,
) -> tuple[dict[str, InversePair], Tensor | int]:
    """Invert the factors of all layers that have some.

    Args:
        groups: layers by shape.
        present: which of them have factors in this step.
        measured: the factor pair of a layer.
        previous: the inverses there are, by shape.
        damping: of both sides, from the stacked factors and one of the layers.
        block_size: side of the blocks in which dense factors are inverted; None: whole.

    Returns:
        All inverses, by shape, and how many failed and were kept.
    """
    jobs: list[_Job] = []
    kept: dict[str, InversePair] = {}
    for key, layers in groups.items():
        here = [layer for layer, there in zip(layers, present[key], strict=True) if there]
        if not here:
            continue
        kept[key] = previous[key].select(spans(layers), present[key])
        pairs = [measured(layer) for layer in here]
        sides = here[0].input, here[0].output
        stacked = [_stack([pair[i] for pair in pairs], side) for i, side in enumerate(sides)]
        strengths = damping((stacked[0], stacked[1]), here[0])
        for factors, side, strength, before in zip(stacked, sides, strengths, kept[key], strict=True):
            if factors is not None:
                per_matrix = strength * torch.ones(len(factors), dtype=factors.dtype, device=factors.device)
                cut = blocks.cut(factors, side, block_size)
                jobs += [_Job(part, per_matrix, old) for part, old in zip(cut, before, strict=True)]
    inverses, failed = _invert(jobs)
    results = iter(inverses)
    new = dict(previous)
    for key, pair in kept.items():
        renewed = InversePair(*(tuple(next(results) for _ in side) for side in pair))
        new[key] = previous[key].replace(spans(groups[key]), present[key], renewed)
    return new, failed


def _stack(factors: list[Tensor | None], side: Side) -> Tensor | None:
    """The factors of several layers, (L, *shape of one group)."""
    one = side.shape[1:] if side.groups > 1 else side.shape
    known = [factor.reshape(-1, *one) for factor in factors if factor is not None]
    return torch.cat(known) if known else None


def _invert(jobs: list[_Job]) -> tuple[list[Tensor], Tensor | int]:
    alike: dict[tuple[int, int, torch.dtype], list[int]] = {}
    for index, job in enumerate(jobs):
        alike.setdefault((job.part.dim(), job.part.shape[-1], job.part.dtype), []).append(index)
    results = [job.before for job in jobs]
    failures = []
    for members in alike.values():
        flat = [_flat(jobs[i]) for i in members]
        stacked = [torch.cat([job[field] for job in flat]) for field in range(3)]
        invert = damped_inverse if stacked[0].dim() == 3 else damped_reciprocal
        inverse, failed = invert(*stacked)
        failures.append(failed)
        pieces = inverse.split([len(job.part) for job in flat])
        for i, piece in zip(members, pieces, strict=True):
            results[i] = piece.reshape(jobs[i].before.shape)
    return results, torch.stack(failures).sum() if failures else 0


def _flat(job: _Job) -> _Job:
    """All blocks of all matrices in one axis, with a damping for each."""
    if job.part.dim() == 2:
        return job._replace(strength=job.strength[:, None])
    _, count, b, _ = job.part.shape
    strength = job.strength.repeat_interleave(count)[:, None, None]
    return _Job(job.part.reshape(-1, b, b), strength, job.before.reshape(-1, b, b))
