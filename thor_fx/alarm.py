"""Says once that numbers go wrong and are caught, where the host knows it without waiting for a device."""

from typing import Any

from torch import Tensor

from .metrics import failures
from .transform import SkipState
from .warn import warn


class NumericsWarning(RuntimeWarning):
    """Steps were skipped, or factors had no inverse: training went on without them."""


SKIPPED = (
    "thor_fx: {count} step(s) so far changed nothing, because a gradient or a new parameter was NaN or "
    "infinite. If the loss is NaN, look for the operator in the model; if it is finite, the step is too "
    "long: lower lr, raise damping, or clip. Said once; metrics()['skipped_steps'] counts on. See "
    "docs/reliability.md."
)
FAILED = (
    "thor_fx: {count} factor block(s) so far had no finite inverse: they keep the last one, or step along "
    "the gradient, and are damped by more in the next attempt. Usual causes are damping that is tiny beside "
    "the factors (raise it, or take damping_rule='relative') and activations whose squares overflow. Said "
    "once; metrics()['failed_inverses'] counts on. See docs/reliability.md."
)


def at_hand(counter: Tensor) -> int | None:
    """The value of a 0-D tensor of integers; None where reading it would wait for a device.

    Example:
        >>> import torch
        >>> at_hand(torch.tensor(3))
        3
    """
    return int(counter) if counter.device.type == "cpu" else None


class Alarm:
    """Warns of each kind of trouble once.

    Attributes:
        scaled: whether a gradient scaler is in use, whose overflows are no news.
    """

    def __init__(self) -> None:
        self.scaled = False
        self._told: set[str] = set()

    def look(self, state: Any, heard: int) -> None:
        """Warn of what went wrong so far, where the host knows.

        Args:
            state: of a transform.
            heard: how many skipped steps the host has heard of, where that is no CPU.
        """
        skipped = at_hand(state.skipped) if isinstance(state, SkipState) else 0
        failed = sum(at_hand(count) or 0 for count in failures(state))
        self.tell(skipped=heard if skipped is None else skipped, failed=failed)

    def tell(self, *, skipped: int, failed: int) -> None:
        """Warn of what has happened so far, unless that was said."""
        for text, count in ((SKIPPED, 0 if self.scaled else skipped), (FAILED, failed)):
            if count and text not in self._told:
                self._told.add(text)
                warn(text.format(count=count), NumericsWarning)
