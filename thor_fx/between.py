"""What happens between two steps, on the host: the hook ``between`` of a transform."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .layers import Coverage
from .transform import Params, Signals, State, Taken, Transform


def run_between(
    tx: Transform, state: State, params: Params, found: Coverage, rates: Sequence[Tensor], taken: Taken
) -> int | None:
    """Let a transform renew its state after a step, in place: all tensors stay the objects they are.

    Args:
        tx: the transform.
        state: its state; what the hook changes is written into its tensors.
        params: the parameters that the state is about.
        found: their coverage.
        rates: the hyper-parameters of the step, in the order of their names.
        taken: the step.

    Returns:
        The next step that it wants factors in; None: no change.
    """
    if tx.between is None or not taken.ready:
        return None
    signals = Signals(found, dict(zip(sorted(tx.schedules), rates, strict=True)))
    with torch.no_grad():
        new, due = tx.between(state, params, signals, taken)
        for old, value in _changed(state, new):
            old.copy_(value)
    return due


def _changed(old: State, new: State) -> Iterator[tuple[Tensor, Tensor]]:
    """The tensors that are others now; what is the same object is not looked into, as in most steps."""
    if new is old:
        return
    if isinstance(old, Tensor):
        yield old, new
        return
    pairs = ((old[key], new[key]) for key in old) if isinstance(old, dict) else zip(old, new, strict=True)
    for before, after in pairs:
        yield from _changed(before, after)
