"""What a training run says of itself: counters and numbers that live on the device until somebody asks."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .blocks import by_part
from .clips import KLState
from .layers import Layer
from .precondition import PreconditionState
from .renewal import Memory
from .trace_rule import Watch, block_trace
from .transform import SkipState

Metrics = dict[str, int | float]

COUNTERS = "skipped_steps", "failed_inverses", "boosted_blocks", "first_order_blocks", "refreshes"


def metrics(state: Any) -> Metrics:
    """What happened so far, as numbers for any logger.

    Reading them waits for the device: ask where you print, not in every step.

    Args:
        state: the state of a transform, or of a training step.

    Returns:
        ``skipped_steps``: steps with a NaN or infinite gradient, or after which a parameter would have been
        that; they changed nothing;
        ``failed_inverses``: attempts at a block that found no finite inverse, so that it kept the last;
        ``boosted_blocks``: blocks whose last attempt failed, so that the next takes more damping;
        ``first_order_blocks``: those of them that have never had an inverse, and step along the gradient;
        ``refreshes``: steps in which inverses were recomputed (with several groups of parameters: of the
        group that had most). With ``kl_clip`` also ``kl``: ``lr^2 <U, g>`` of the last step before the clip,
        twice the Kullback-Leibler divergence that it would have had. With :class:`thor_fx.ByTrace` also
        ``refreshed`` and ``kept``: decisions to recompute a layer, and to keep one; ``frozen``: layers that
        are kept for good.

    Example:
        >>> import torch, thor_fx
        >>> loss_fn = lambda params, x: (x @ params["w"]).square().mean()
        >>> step = thor_fx.compile_step(loss_fn, thor_fx.thor(0.1, 0.1, 0.9), backend="eager")
        >>> params = {"w": torch.ones(2, 1)}
        >>> state = step.init(params, torch.eye(2))
        >>> params, state, _ = step(params, state, torch.full((2, 2), torch.inf))
        >>> metrics(state)["skipped_steps"], params["w"].tolist()
        (1, [[1.0], [1.0]])
    """
    found: Metrics = dict.fromkeys(COUNTERS, 0)
    _walk(state, found)
    return found


def group_metrics(groups: Sequence[Mapping[str, Any]]) -> Metrics:
    """``step``, and ``lr`` and ``damping`` of an optimizer's groups: ``lr/1`` is that of the second."""
    found: Metrics = {"step": groups[0]["step"]}
    for i, group in enumerate(groups):
        found |= {f"{name}/{i}" if i else name: float(group[name]) for name in ("lr", "damping")}
    return found


def _first_order_blocks(state: PreconditionState) -> int:
    """Blocks that fail and have nothing off their diagonal; a diagonal side is always so."""
    count = 0
    for key, failing in state.failing.items():
        if not bool(failing.any()):
            continue
        parts = (*state.inverses[key].input, *state.inverses[key].output)
        for part, own in zip(parts, by_part(failing, parts), strict=True):
            count += int((_is_diagonal(part) & (own > 0)).sum())
    return count


def _is_diagonal(part: Tensor) -> Tensor:
    """Which blocks (L, F, b, b) have nothing off their diagonal, (L, F); or diagonals (L, d), (L, 1)."""
    if part.dim() == 2:
        return torch.ones_like(part[:, :1], dtype=torch.bool)
    rest = part - torch.diag_embed(part.diagonal(dim1=-2, dim2=-1))
    return (rest == 0).all(-1).all(-1)


def _walk(state: Any, found: Metrics) -> None:
    if isinstance(state, SkipState):
        found["skipped_steps"] += int(state.skipped)
    if isinstance(state, KLState):
        found["kl"] = float(state.kl)
    if isinstance(state, PreconditionState):
        found["failed_inverses"] += int(state.failures)
        found["boosted_blocks"] += sum(int((failing > 0).sum()) for failing in state.failing.values())
        found["first_order_blocks"] += _first_order_blocks(state)
        found["refreshes"] = max(found["refreshes"], int(state.refreshes))
    if isinstance(state, Watch):
        counts = {"refreshed": state.refreshed, "kept": state.kept, "frozen": state.frozen.sum()}
        found.update({name: found.get(name, 0) + int(count) for name, count in counts.items()})
    elif isinstance(state, tuple | dict):
        for inner in state.values() if isinstance(state, dict) else state:
            _walk(inner, found)


def trace(state: Any, layers: Mapping[str, Layer], block_size: int | None) -> dict[str, float]:
    """``trace``: that of the averaged curvature, ``sum over layers of tr(A) tr(G)``.

    Nothing where no factors are kept (without ``factor_decay`` and a refresh rule the inverses are all
    that is), or none have been measured yet.

    Args:
        state: the state of a transform.
        layers: all layers.
        block_size: side of the blocks that are kept.
    """
    known = [memory.averages for memory in _memories(state) if bool(memory.averages.weights.any())]
    traces = [
        float(block_trace(averages, layers[name], block_size))
        for averages in known
        for name, weight in zip(averages.factors, averages.weights, strict=True)
        if name in layers and weight > 0
    ]
    return {"trace": sum(traces)} if traces else {}


def failures(state: Any) -> list[Tensor]:
    """The counters of failed inverses of all groups of parameters."""
    if isinstance(state, PreconditionState):
        return [state.failures]
    inner = state.values() if isinstance(state, dict) else state if isinstance(state, tuple) else ()
    return [count for part in inner for count in failures(part)]


def _memories(state: Any) -> list[Memory]:
    if isinstance(state, Memory):
        return [state]
    inner = state.values() if isinstance(state, dict) else state if isinstance(state, tuple) else ()
    return [memory for part in inner for memory in _memories(part)]
