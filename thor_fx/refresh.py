"""Refresh: renew the inverses of all layers that have factors, layers of one shape in one stack.

Damping, by the rules at the top of :mod:`thor_fx.precondition`; ``tr`` and ``dim`` of a side of which
nothing is kept are those of the identity.

Legend: L matrices of one shape, of one layer or of several.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from .inverses import Damping, Method, Pair, Stack, State, pick, put, replace, select
from .layers import Coverage, Layer
from .passes.sides import Side, trace
from .transform import Params

DampingRule = Literal["factor", "sqrt", "pi", "relative"]


def by_shape(coverage: Coverage, params: Params) -> dict[str, list[Layer]]:
    """Layers that can be handled in one batched call: same sides, same dtype."""
    groups: dict[str, list[Layer]] = {}
    for layer in coverage.layers.values():
        dtype = str(params[layer.param].dtype).removeprefix("torch.")
        groups.setdefault(f"{_key(layer.output)}x{_key(layer.input)} {dtype}", []).append(layer)
    return groups


def _key(side: Side) -> str:
    how = {"dense": "", "blocks": f" in {side.block}", "diagonal": " diagonal ", "mean": " mean "}
    how["identity"] = " identity "
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


def refresh(
    method: Method,
    groups: Mapping[str, list[Layer]],
    present: Mapping[str, list[bool]],
    measured: Callable[[Layer], Pair],
    previous: Mapping[str, State],
    failing: Mapping[str, Tensor],
    damping: Damping,
    block_size: int | None,
) -> tuple[dict[str, State], dict[str, Tensor]]:
    """Renew the inverses of all layers that have factors.

    Args:
        method: of inversion.
        groups: layers by shape.
        present: which of them have factors in this step.
        measured: the factor pair of a layer.
        previous: the states of the method there are, by shape.
        failing: how often every block has failed in a row, (L, U), by shape.
        damping: of both sides, from the stacked factors and one of the layers.
        block_size: side of the blocks in which dense factors are inverted; None: whole.

    Returns:
        All states, by shape; and how attempts have ended (:mod:`thor_fx.inverses.attempts`), (L, U) by shape,
        where there were any.
    """
    stacks: dict[str, Stack] = {}
    for key, layers in groups.items():
        here = [layer for layer, there in zip(layers, present[key], strict=True) if there]
        if here:
            pairs = [measured(layer) for layer in here]
            sides = here[0].input, here[0].output
            a, g = (_stack([pair[i] for pair in pairs], side) for i, side in enumerate(sides))
            chosen = spans(layers), present[key]
            stacks[key] = Stack(here[0], (a, g), select(previous[key], *chosen), pick(failing[key], *chosen))
    renewed, ended = method.refresh(list(stacks.values()), damping, block_size)
    new, outcomes = dict(previous), {}
    for key, state, outcome in zip(stacks, renewed, ended, strict=True):
        chosen = spans(groups[key]), present[key]
        new[key] = replace(previous[key], *chosen, state)
        outcomes[key] = put(torch.zeros_like(failing[key]), *chosen, outcome)
    return new, outcomes


def _stack(factors: list[Tensor | None], side: Side) -> Tensor | None:
    """The factors of several layers, (L, *shape of one group)."""
    one = side.shape[1:] if side.groups > 1 else side.shape
    known = [factor.reshape(-1, *one) for factor in factors if factor is not None]
    return torch.cat(known) if known else None
