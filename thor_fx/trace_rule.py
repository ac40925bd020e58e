"""THOR's trace rule (:class:`thor_fx.ByTrace`): what it remembers, and how it decides.

The trace of a layer's block is ``tr(F + lambda I) = tr(A) tr(G) + lambda dim``, with ``F = A (x) G`` as
published and ``dim`` the number of its weights: the same number under every damping rule, which only
spread ``lambda`` over the two factors. Of several groups the block is the sum. Both sides of a
comparison take the ``lambda`` of the present step: what is compared is curvature, not the schedule.
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .averages import Averages, as_kept, average
from .layers import Layer
from .passes.sides import Side, trace
from .refresh_rules import ByTrace, Verdict

NEVER = 2**62
"""A step that does not come."""


class Watch(NamedTuple):
    """What the rule remembers; per layer where the shape is (layers,).

    Attributes:
        seen: ``tr(A) tr(G)`` of the averaged factors, (layers,).
        used: that of the factors which the inverses were made of, (layers,).
        fresh: whether factors have entered since the last decision, bool (layers,).
        frozen: whether the inverses are kept for good, bool (layers,).
        interval: steps between factor steps, int64 0-D.
        refreshed: decisions to recompute a layer so far, int64 0-D.
        kept: decisions to keep one, int64 0-D.
    """

    seen: Tensor
    used: Tensor
    fresh: Tensor
    frozen: Tensor
    interval: Tensor
    refreshed: Tensor
    kept: Tensor


def nothing_seen(layers: int, frequency: int, like: Tensor) -> Watch:
    """Before the first factor step."""
    traces, flags = like.new_zeros(layers), like.new_zeros(layers, dtype=torch.bool)
    count = like.new_zeros((), dtype=torch.int64)
    interval = torch.full_like(count, frequency)
    return Watch(traces, traces.clone(), flags, flags.clone(), interval, count.clone(), count.clone())


def observe(
    watch: Watch,
    averages: Averages,
    layers: Mapping[str, Layer],
    finite: Mapping[str, Tensor],
    renewed: Collection[str],
    block_size: int | None,
) -> Watch:
    """Note the traces of the averaged factors.

    Args:
        watch: before.
        averages: with the factors of this step.
        layers: all layers, in the order of ``averages``.
        finite: for every layer that was measured, whether its factors have entered.
        renewed: the layers whose inverses are made of the factors of this step.
        block_size: side of the blocks that are kept.
    """
    seen, used, fresh = [], [], []
    for i, (name, layer) in enumerate(layers.items()):
        there = name in finite
        seen.append(block_trace(averages, layer, block_size) if there else watch.seen[i])
        used.append(seen[-1] if name in renewed else watch.used[i])
        entered = finite[name] | watch.fresh[i] if there else watch.fresh[i]
        fresh.append(torch.zeros_like(entered) if name in renewed else entered)
    return watch._replace(seen=torch.stack(seen), used=torch.stack(used), fresh=torch.stack(fresh))


def block_trace(averages: Averages, layer: Layer, block_size: int | None) -> Tensor:
    """``tr(A) tr(G)`` of the averaged factors of a layer, added up over its groups, 0-D."""
    kept = as_kept(layer, block_size)
    a, g = average(averages, layer)
    like = averages.weights
    return (_traces(a, kept.input, like) * _traces(g, kept.output, like)).sum()


def _traces(factor: Tensor | None, side: Side, like: Tensor) -> Tensor:
    """Of every group, (E,); of the identity where nothing is kept."""
    if factor is None:
        return like.new_full((side.groups,), side.dim)
    return trace(factor, side).reshape(-1).to(like.dtype)


class Decision(NamedTuple):
    """What the rule says after a factor step.

    Attributes:
        refresh: the layers to recompute.
        watch: what the rule remembers from then on.
        due: when factors are due next.
    """

    refresh: set[str]
    watch: Watch
    due: int


def decide(
    rule: ByTrace,
    watch: Watch,
    layers: Mapping[str, Layer],
    ready: Collection[str],
    lam: Tensor | float,
    failing: Tensor,
    step: int,
) -> Decision:
    """Apply the rule after a factor step. Waits for the device, once.

    Args:
        rule: the thresholds.
        watch: what was noted.
        layers: all layers, in the order of ``watch``.
        ready: the layers that have had inverses.
        lam: the damping ``lambda``.
        failing: of every layer, whether its inverses are not those of ``used``, bool (layers,): it is
            recomputed, whatever its trace.
        step: the step that was taken.
    """
    verdicts, frozen, interval = _verdicts(rule, watch, layers, ready, lam, failing)
    refresh = {name for name, verdict in verdicts.items() if verdict == "refresh"}
    frozen |= {name for name, verdict in verdicts.items() if verdict == "freeze"}
    if verdicts and not refresh:
        interval = rule.grown(interval)
    due = step + interval if rule.growth > 1 else step + interval - step % interval
    if frozen >= layers.keys():
        due = NEVER
    new = watch._replace(
        used=torch.where(_mask(layers, refresh, watch.used), watch.seen, watch.used),
        fresh=watch.fresh & ~_mask(layers, verdicts, watch.used),
        frozen=_mask(layers, frozen, watch.used),
        interval=torch.full_like(watch.interval, interval),
        refreshed=watch.refreshed + len(refresh),
        kept=watch.kept + sum(verdict == "keep" for verdict in verdicts.values()),
    )
    return Decision(refresh, new, due)


def _verdicts(
    rule: ByTrace,
    watch: Watch,
    layers: Mapping[str, Layer],
    ready: Collection[str],
    lam: Tensor | float,
    failing: Tensor,
) -> tuple[dict[str, Verdict], set[str], int]:
    """What to do with every layer that has new factors; which are frozen already; the interval."""
    damping = torch.as_tensor(lam, dtype=watch.seen.dtype, device=watch.seen.device)
    flags = watch.fresh, watch.frozen, failing
    numbers = [watch.seen, watch.used, *flags, damping.view(1), watch.interval.view(1)]
    read = torch.cat([part.to(watch.seen.dtype) for part in numbers]).tolist()
    strength, interval = read[-2:]
    columns = zip(*(read[i * len(layers) : (i + 1) * len(layers)] for i in range(5)), strict=True)
    verdicts: dict[str, Verdict] = {}
    frozen_before = set()
    for (name, layer), (seen, used, fresh, frozen, failed) in zip(layers.items(), columns, strict=True):
        identity = strength * layer.groups * layer.in_ * layer.out
        if frozen:
            frozen_before.add(name)
        elif fresh and name in ready:
            verdicts[name] = "refresh" if failed else rule.verdict(seen + identity, used + identity)
    return verdicts, frozen_before, int(interval)


def _mask(layers: Mapping[str, Layer], names: Collection[str], like: Tensor) -> Tensor:
    return torch.tensor([name in names for name in layers], device=like.device)
