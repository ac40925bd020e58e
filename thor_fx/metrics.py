"""What a training run says of itself: counters and numbers that live on the device until somebody asks."""

from collections.abc import Mapping
from typing import Any

from .clips import KLState
from .layers import Layer
from .precondition import PreconditionState
from .renewal import Memory
from .trace_rule import Watch, block_trace
from .transform import SkipState

Metrics = dict[str, int | float]


def metrics(state: Any) -> Metrics:
    """What happened so far, as numbers for any logger.

    Reading them waits for the device: ask where you print, not in every step.

    Args:
        state: the state of a transform, or of a training step.

    Returns:
        ``skipped_steps``: steps with a NaN or infinite gradient, which changed nothing;
        ``failed_inverses``: blocks whose factor had no finite inverse, so that they kept the last;
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
        >>> metrics(state), params["w"].tolist()
        ({'skipped_steps': 1, 'failed_inverses': 0, 'refreshes': 0}, [[1.0], [1.0]])
    """
    found: Metrics = {"skipped_steps": 0, "failed_inverses": 0, "refreshes": 0}
    _walk(state, found)
    return found


def _walk(state: Any, found: Metrics) -> None:
    if isinstance(state, SkipState):
        found["skipped_steps"] += int(state.skipped)
    if isinstance(state, KLState):
        found["kl"] = float(state.kl)
    if isinstance(state, PreconditionState):
        found["failed_inverses"] += int(state.failures)
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


def _memories(state: Any) -> list[Memory]:
    if isinstance(state, Memory):
        return [state]
    inner = state.values() if isinstance(state, dict) else state if isinstance(state, tuple) else ()
    return [memory for part in inner for memory in _memories(part)]
