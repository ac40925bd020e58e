"""What happens between two steps, on the host: the hook ``between`` of a transform."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

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
        for old, value in zip(*map(pytree.tree_leaves, (state, new)), strict=True):
            if value is not old:
                old.copy_(value)
    return due
