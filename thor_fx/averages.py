"""Running averages of factors.

Of every layer, from zero::

    S = decay S + (1 - decay) F          F: the factor of one batch, A or G
    w = decay w + (1 - decay)            so w = 1 - decay^k after k batches

and ``S / w`` is the average (the correction of Kingma & Ba 2015, section 3): with one batch it is that
batch's factor. ``k`` counts the batches that the layer was in and whose factors were finite; others do
not enter. ``decay = 0`` keeps the last batch.

What is kept of a factor is what will be inverted: of one that is cut into blocks, the blocks.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from . import blocks
from .inverses import Pair
from .layers import Layer
from .passes.sides import Side


class FactorPair(NamedTuple):
    """``S`` of both sides of a layer, of the shapes of the sides it is kept in; () where nothing is kept."""

    input: tuple[Tensor, ...]
    output: tuple[Tensor, ...]


class Averages(NamedTuple):
    """Running averages of the factors of several layers.

    Attributes:
        factors: ``S``, by name of layer.
        weights: ``w`` of every layer, (layers,), in the order of ``factors``.
    """

    factors: dict[str, FactorPair]
    weights: Tensor


def as_kept(layer: Layer, block_size: int | None) -> Layer:
    """The layer with the sides that its averages are kept in."""
    input_, output = (_kept(side, block_size) for side in (layer.input, layer.output))
    return replace(layer, input=input_, output=output)


def _kept(side: Side, block_size: int | None) -> Side:
    if side.kind != "dense" or block_size is None or side.dim <= block_size:
        return side
    return replace(side, kind="blocks", block=block_size)


def nothing_yet(layers: Mapping[str, Layer], block_size: int | None, like: Mapping[str, Tensor]) -> Averages:
    """The averages before the first batch, each in the dtype of ``like`` and on its device."""
    factors = {}
    for name, layer in layers.items():
        kept = as_kept(layer, block_size)
        factors[name] = FactorPair(*(_zeros(side, like[name]) for side in (kept.input, kept.output)))
    return Averages(factors, next(iter(like.values())).new_zeros(len(layers)))


def _zeros(side: Side, like: Tensor) -> tuple[Tensor, ...]:
    return () if side.kind == "identity" else (like.new_zeros(side.shape),)


def enter(
    averages: Averages,
    layers: Mapping[str, Layer],
    present: Collection[str],
    measured: Callable[[Layer], Pair],
    decay: float,
    block_size: int | None,
) -> tuple[Averages, dict[str, Tensor]]:
    """Let the factors of one batch enter.

    Args:
        averages: those so far.
        layers: all layers, in the order of ``averages``.
        present: which of them have factors in this step.
        measured: the factor pair of a layer.
        decay: in [0, 1).
        block_size: side of the blocks that will be inverted.

    Returns:
        The averages, and for every layer present whether its factors were finite, 0-D: else they did
        not enter.
    """
    factors, weights, finite = dict(averages.factors), [], {}
    for i, (name, layer) in enumerate(layers.items()):
        weight = averages.weights[i]
        if name in present:
            old = averages.factors[name]
            new = _moved(old, _in_kept_form(measured(layer), layer, block_size), decay)
            sums = [*new.input, *new.output] or [weight]  # nothing may be kept of either side
            finite[name] = torch.stack([s.isfinite().all() for s in sums]).all()
            factors[name] = _map(_chosen(finite[name]), new, old)
            weight = torch.where(finite[name], decay * weight + (1 - decay), weight)
        weights.append(weight)
    return Averages(factors, torch.stack(weights)), finite


def _moved(old: FactorPair, batch: FactorPair, decay: float) -> FactorPair:
    # NOTE: in the functional door this becomes the end of the product: thor_fx.passes.accumulate
    return batch if decay == 0 else _map(lambda s, f: decay * s + (1 - decay) * f, old, batch)


def _map(function: Callable[[Tensor, Tensor], Tensor], one: FactorPair, other: FactorPair) -> FactorPair:
    sides = zip(one, other, strict=True)
    return FactorPair(*(tuple(function(*values) for values in zip(*side, strict=True)) for side in sides))


def _chosen(condition: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda new, old: torch.where(condition, new, old)


def _in_kept_form(pair: Pair, layer: Layer, block_size: int | None) -> FactorPair:
    kept = as_kept(layer, block_size)
    sides = zip(pair, (layer.input, layer.output), (kept.input, kept.output), strict=True)
    return FactorPair(*(() if v is None else (_cut(v, have, want),) for v, have, want in sides))


def _cut(factor: Tensor, have: Side, want: Side) -> Tensor:
    """The blocks of the diagonal, the last one padded with zeros."""
    if have.kind == want.kind:
        return factor
    parts = blocks.diagonal_blocks(factor.reshape(-1, have.dim, have.dim), want.block)
    padded = [torch.nn.functional.pad(p, (0, want.block - p.shape[-1]) * 2) for p in parts]
    return torch.cat(padded, dim=1).reshape(want.shape)


def average(averages: Averages, layer: Layer) -> Pair:
    """``S / w`` of both sides of a layer: NaN where nothing has entered, None where nothing is kept."""
    weight = averages.weights[list(averages.factors).index(layer.name)]
    input_, output = (side[0] / weight if side else None for side in averages.factors[layer.name])
    return input_, output
