"""A step that would break a parameter changes nothing; the state remembers it, for the host to hear of."""

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .layers import Coverage
from .transform import (
    Params,
    Signals,
    SkipState,
    Transform,
    Updates,
    all_finite,
    apply_updates,
    between_of_inner,
    resolving,
)

if TYPE_CHECKING:
    from .distributed.collectives import World

LATE = 4
"""So many steps later a host hears of a step of a GPU, which it does not wait for."""

RECENT = LATE + 1
"""So many steps a state remembers: what a host has not heard of yet, and the one that it hears of next."""

SKIPPED, FACTORS = 1, 2
"""What a word says of a step, bit by bit: it was skipped; it had factors. 0: a plain step was taken."""


def skip_nonfinite(inner: Transform, world: "World | None" = None) -> Transform:
    """Let a step after which a parameter would not be finite change nothing, and count it.

    A NaN or infinite gradient makes its update NaN or infinite, whatever the transform; a finite update may
    still be too much for a parameter, or for its dtype; what a gradient scaler has found counts too. The
    decision is taken on the device (``torch.where``), without a synchronisation.

    Args:
        inner: what is guarded.
        world: the ranks that see a part of the updates each, and decide together; None: all are seen here.
    """

    def init(params: Params, coverage: Coverage) -> SkipState:
        device = next(iter(params.values())).device
        skipped = torch.zeros((), dtype=torch.int64, device=device)
        return SkipState(inner.init(params, coverage), skipped, nothing_skipped(device))

    def update(
        updates: Updates, state: SkipState, params: Params, signals: Signals
    ) -> tuple[Updates, SkipState]:
        new, new_inner = inner.update(updates, state.inner, params, signals)
        finite = all_finite(apply_updates({name: params[name] for name in new}, new).values())
        if signals.found_inf is not None:
            finite = finite & (signals.found_inf == 0)
        if world is not None:
            finite = world.total((~finite).to(torch.int64)) == 0
        new = {name: torch.where(finite, u, torch.zeros_like(u)) for name, u in new.items()}

        def kept(new: Tensor, old: Tensor) -> Tensor:
            return old if new is old else torch.where(finite, new, old)

        skipped = ~finite
        word = skipped.to(torch.int32)  # SKIPPED or 0
        word = word + FACTORS if signals.moments else word
        recent = torch.cat([state.recent[1:], word.reshape(1)])
        return new, SkipState(pytree.tree_map(kept, new_inner, state.inner), state.skipped + skipped, recent)

    resolve = resolving(partial(skip_nonfinite, world=world), [inner])
    return inner._replace(init=init, update=update, between=between_of_inner(inner), resolve=resolve)


def nothing_skipped(device: torch.device) -> Tensor:
    """The words of steps before the first."""
    return torch.zeros(RECENT, dtype=torch.int32, device=device)
