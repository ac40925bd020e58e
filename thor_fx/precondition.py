"""The natural-gradient step of THOR: ``U = G_d^-1 (dL/dW) A_d^-1``.

Damping ``lambda`` enters in one of three ways (``damping_rule``):

* ``"factor"``: ``(A + lambda I)^-1`` and ``(G + lambda I)^-1``, THOR as it is documented;
* ``"sqrt"``: ``sqrt(lambda)`` on each, THOR as it is implemented in MindSpore;
* ``"pi"``: ``pi sqrt(lambda)`` on ``A``, ``sqrt(lambda) / pi`` on ``G``, where
  ``pi^2 = (tr A / dim A) / (tr G / dim G)`` (Martens & Grosse 2015, section 6.3).

Scales and shifts of normalisation layers take the elementwise rule ``g / (g^2 / n + d)`` with ``d``
equal to ``lambda`` under ``"factor"`` and ``sqrt(lambda)`` otherwise, from the gradient of every
step. Whatever has no factor keeps its gradient. All gradients are first divided by the loss scale.

Legend: L layers of one shape, updated in one batched product.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import blocks
from .blocks import Blocks
from .factors import Moments, factor_pair
from .layers import Coverage, Layer
from .linalg import damped_inverse, trace
from .passes.reindex import put, take
from .schedule import Schedule
from .transform import Params, Signals, Transform, Updates

DampingRule = Literal["factor", "sqrt", "pi"]
Damping = tuple[Tensor, Tensor]


class InversePair(NamedTuple):
    """The damped inverses of L layers of one shape."""

    input: Blocks
    output: Blocks


class PreconditionState(NamedTuple):
    """What is kept between steps.

    Attributes:
        inverses: by shape of layer.
        terms: ``n`` of the last factor step, 0-D.
        failures: blocks whose inverse failed and was kept, since the start, 0-D int64.
    """

    inverses: dict[str, InversePair]
    terms: Tensor
    failures: Tensor


def precondition(
    damping: Schedule,
    *,
    damping_rule: DampingRule = "factor",
    block_size: int | None = 128,
    loss_scale: float = 1.0,
    batch_size: int | None = None,
    frequency: int = 100,
) -> Transform:
    """Multiply the gradient of every layer by its damped inverse factors.

    Args:
        damping: ``lambda`` per step.
        damping_rule: see the top of this module.
        block_size: side of the diagonal blocks; None keeps factors whole.
        loss_scale: the caller multiplies the loss by it; gradients are divided by it.
        batch_size: terms ``n`` that the loss averages over; None: as read off the graph.
        frequency: the inverses are recomputed in step 0 and every ``frequency`` steps.
    """

    def init(params: Params, coverage: Coverage) -> PreconditionState:
        inverses = {}
        for key, layers in by_shape(coverage, params).items():
            like = _accumulator(params[layers[0].param])
            count, out, in_ = len(layers), layers[0].out, layers[0].in_
            # NOTE: zeros and not identities: a layer that never had a good inverse does not move
            inverses[key] = InversePair(
                blocks.zeros(count, in_, block_size, like), blocks.zeros(count, out, block_size, like)
            )
        any_param = _accumulator(next(iter(params.values())))
        terms = torch.full_like(any_param, batch_size or 1)
        return PreconditionState(inverses, terms, torch.zeros_like(terms, dtype=torch.int64))

    def update(
        updates: Updates, state: PreconditionState, params: Params, signals: Signals
    ) -> tuple[Updates, PreconditionState]:
        lam = signals.hyper["damping"]
        groups = by_shape(signals.coverage, params)
        if signals.moments and groups:
            terms = _terms(batch_size, signals.terms, state.terms)
            pairs, kept = {}, {}
            for key, layers in groups.items():
                rows = [i for i, layer in enumerate(layers) if layer.name in signals.moments]
                if rows:
                    present = [layers[i] for i in rows]
                    pairs[key] = _factors(present, signals.moments, terms, loss_scale)
                    kept[key] = _select(state.inverses[key], rows), rows
            previous = {key: pair for key, (pair, _) in kept.items()}
            renewed, failed = _refresh(pairs, previous, partial(_per_side, damping_rule, lam), block_size)
            inverses = dict(state.inverses)
            for key, pair in renewed.items():
                inverses[key] = _replace(state.inverses[key], kept[key][1], pair)
            state = PreconditionState(inverses, terms, state.failures + failed)
        new = {name: u / loss_scale for name, u in updates.items()}
        for name in set(signals.coverage.norms) & set(updates):
            new[name] = _elementwise(new[name], state.terms, _root(damping_rule, lam))
        for key, layers in groups.items():
            new |= _apply(layers, state.inverses[key], new)
        return new, state

    return Transform(init, update, {"damping": damping}, frequency)


def by_shape(coverage: Coverage, params: Params) -> dict[str, list[Layer]]:
    """Layers that can be handled in one batched call: same sides, same dtype."""
    groups: dict[str, list[Layer]] = {}
    for layer in coverage.layers.values():
        dtype = str(params[layer.param].dtype).removeprefix("torch.")
        groups.setdefault(f"{layer.out}x{layer.in_} {dtype}", []).append(layer)
    return groups


def _accumulator(tensor: Tensor) -> Tensor:
    """A 0-D tensor in the dtype that factors are kept in."""
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return torch.zeros((), dtype=dtype, device=tensor.device)


def _terms(batch_size: int | None, measured: Tensor | None, previous: Tensor) -> Tensor:
    if batch_size is not None or measured is None:
        return previous
    return measured.to(previous.dtype)


def _select(pair: InversePair, rows: list[int]) -> InversePair:
    """The inverses of some of the L layers: not all have a gradient in every step."""
    if len(rows) == len(pair.input[0]):
        return pair
    return InversePair(*(tuple(torch.stack([part[i] for i in rows]) for part in side) for side in pair))


def _replace(pair: InversePair, rows: list[int], new: InversePair) -> InversePair:
    """All inverses, with those of some layers replaced."""
    if len(rows) == len(pair.input[0]):
        return new
    at = {row: position for position, row in enumerate(rows)}

    def merge(old: Tensor, part: Tensor) -> Tensor:
        return torch.stack([part[at[i]] if i in at else old[i] for i in range(len(old))])

    sides = zip(pair, new, strict=True)
    return InversePair(*(tuple(map(merge, old, side)) for old, side in sides))


# --- refresh ---------------------------------------------------------------------------------------


def _factors(
    layers: list[Layer], moments: Mapping[str, Moments], terms: Tensor, loss_scale: float
) -> tuple[Tensor, Tensor]:
    """``A`` (L, in, in) and ``G`` (L, out, out) of layers of one shape."""
    pairs = [factor_pair(moments, layer.name, terms, loss_scale) for layer in layers]
    return torch.stack([a for a, _ in pairs]), torch.stack([g for _, g in pairs])


def _per_side(rule: DampingRule, lam: Tensor | float, a: Tensor, g: Tensor) -> Damping:
    """The damping of ``A`` and of ``G``, one value per layer each."""
    ones = torch.ones(a.shape[0], dtype=a.dtype, device=a.device)
    if rule == "factor":
        return lam * ones, lam * ones
    root = lam**0.5 * ones
    if rule == "sqrt":
        return root, root
    mean_a, mean_g = (trace(m) / m.shape[-1] for m in (a, g))
    balanced = (mean_a / mean_g) ** 0.5
    pi = torch.where(balanced.isfinite() & (balanced > 0), balanced, ones)  # a dead side has no trace
    return pi * root, root / pi


def _root(rule: DampingRule, lam: Tensor | float) -> Tensor | float:
    return lam if rule == "factor" else lam**0.5


def _refresh(
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    previous: Mapping[str, InversePair],
    damping: Callable[[Tensor, Tensor], Damping],
    block_size: int | None,
) -> tuple[dict[str, InversePair], Tensor]:
    """Invert all blocks of all layers, one call per block size."""
    jobs: list[Job] = []
    for key, sides in pairs.items():
        strengths = damping(*sides)
        for matrices, strength, before in zip(sides, strengths, previous[key], strict=True):
            cut = blocks.diagonal_blocks(matrices, block_size)
            jobs += [_job(part, strength, kept) for part, kept in zip(cut, before, strict=True)]
    inverses, failed = _invert(jobs)
    results = iter(inverses)
    new = {
        key: InversePair(*(tuple(next(results).reshape(part.shape) for part in side) for side in before))
        for key, before in previous.items()
    }
    return new, failed


Job = tuple[Tensor, Tensor, Tensor]
"""Matrices to invert (N, b, b), their damping (N, 1, 1), and their previous inverses (N, b, b)."""


def _job(part: Tensor, strength: Tensor, before: Tensor) -> Job:
    _, count, b, _ = part.shape
    return part.reshape(-1, b, b), strength.repeat_interleave(count)[:, None, None], before.reshape(-1, b, b)


def _invert(jobs: list[Job]) -> tuple[list[Tensor], Tensor]:
    sizes: dict[tuple[int, torch.dtype], list[int]] = {}
    for index, (matrices, _, _) in enumerate(jobs):
        sizes.setdefault((matrices.shape[-1], matrices.dtype), []).append(index)
    results = [before for _, _, before in jobs]
    failures = []
    for members in sizes.values():
        stacked = [torch.cat([jobs[i][part] for i in members]) for part in range(3)]
        inverse, failed = damped_inverse(*stacked)
        failures.append(failed)
        for i, part in zip(members, inverse.split([len(jobs[i][0]) for i in members]), strict=True):
            results[i] = part
    return results, torch.stack(failures).sum()


# --- apply -----------------------------------------------------------------------------------------


def _apply(layers: list[Layer], inverses: InversePair, gradients: Updates) -> dict[str, Tensor]:
    rows = [i for i, layer in enumerate(layers) if layer.param in gradients]
    if not rows:
        return {}
    present, inverses = [layers[i] for i in rows], _select(inverses, rows)
    matrices = torch.stack([take(layer.path, gradients[layer.param]) for layer in present])  # (L, out, in)
    working = matrices.to(inverses.input[0].dtype)
    preconditioned = blocks.precondition(inverses.output, working, inverses.input).to(matrices.dtype)
    new = dict(gradients)
    for layer, matrix in zip(present, preconditioned.unbind(), strict=True):
        new[layer.param] = put(layer.path, new[layer.param], matrix)
    return {layer.param: new[layer.param] for layer in present}


def _elementwise(gradient: Tensor, terms: Tensor, damping: Tensor | float) -> Tensor:
    scale = gradient**2 / terms + damping
    return torch.where(scale > 0, gradient / scale, torch.zeros_like(gradient))  # 0/0 without damping
