"""Counters that live on the device and are read when somebody asks."""

from typing import Any

from .precondition import PreconditionState
from .trace_rule import Watch
from .transform import SkipState


def metrics(state: Any) -> dict[str, int]:
    """What went wrong so far, and was caught.

    Reading the counters waits for the device.

    Args:
        state: the state of a transform, or of a training step.

    Returns:
        ``skipped_steps``: steps with a NaN or infinite gradient, which changed nothing;
        ``failed_inverses``: blocks whose factor had no finite inverse, so that they kept the last.
        With :class:`thor_fx.ByTrace` also ``refreshed`` and ``kept``: decisions to recompute a layer, and
        to keep one; ``frozen``: layers that are kept for good.

    Example:
        >>> import torch, thor_fx
        >>> loss_fn = lambda params, x: (x @ params["w"]).square().mean()
        >>> step = thor_fx.compile_step(loss_fn, thor_fx.thor(0.1, 0.1, 0.9), backend="eager")
        >>> params = {"w": torch.ones(2, 1)}
        >>> state = step.init(params, torch.eye(2))
        >>> params, state, _ = step(params, state, torch.full((2, 2), torch.inf))
        >>> metrics(state), params["w"].tolist()
        ({'skipped_steps': 1, 'failed_inverses': 0}, [[1.0], [1.0]])
    """
    found = {"skipped_steps": 0, "failed_inverses": 0}
    _walk(state, found)
    return found


def _walk(state: Any, found: dict[str, int]) -> None:
    if isinstance(state, SkipState):
        found["skipped_steps"] += int(state.skipped)
    if isinstance(state, PreconditionState):
        found["failed_inverses"] += int(state.failures)
    if isinstance(state, Watch):
        counts = {"refreshed": state.refreshed, "kept": state.kept, "frozen": state.frozen.sum()}
        found.update({name: found.get(name, 0) + int(count) for name, count in counts.items()})
    elif isinstance(state, tuple | dict):
        for inner in state.values() if isinstance(state, dict) else state:
            _walk(inner, found)
