"""What the host hears of steps that were skipped, without waiting for the device.

A CPU says so at once. Of a GPU's steps the host hears ``LATE`` steps later: every word is copied into memory
of the host behind the step, and read when that many steps have followed. A fixed number, so that all runs and
all ranks hear of a step in the same place; what they have not heard yet is in the state, also in a saved one.
"""

from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .alarm import at_hand
from .skipping import FACTORS, LATE, SKIPPED
from .transform import SkipState


class Heard(NamedTuple):
    """What the host knows after a step.

    Attributes:
        counts: whether the number of the step goes up: once less for every step that was skipped.
        moved: False: this very step has changed nothing; it is taken again, under the same number.
        missed: factors are to be measured once more: a step that did was skipped, and none has since.
    """

    counts: bool = True
    moved: bool = True
    missed: bool = False


class Word:
    """What became of one step, on its way to the host.

    Attributes:
        factors: whether the step had any.
    """

    def __init__(self, word: Tensor, *, factors: bool) -> None:
        self.factors = factors
        self._memory = torch.empty((), dtype=word.dtype, pin_memory=True)  # torch keeps such memory at hand
        self._memory.copy_(word, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record(torch.cuda.current_stream(word.device))

    def read(self) -> int:
        """The word; waits where the device is so far behind."""
        self._arrived.synchronize()
        return int(self._memory)


class Hearing:
    """Listens to the steps of one training.

    Attributes:
        skipped: steps that it has heard of.
    """

    def __init__(self) -> None:
        self.skipped = 0
        self._followed: Tensor | None = None
        self._words: deque[Word | int] = deque()

    def __reduce__(self) -> Any:  # a copy has heard of nothing
        return Hearing, ()

    def after(self, state: Any, before: Any, *, factors: bool) -> Heard:
        """What is known after a step.

        Args:
            state: of the transform, after it.
            before: the state that it was given; the same object where that is written in place.
            factors: whether it had any.
        """
        if not isinstance(state, SkipState):
            return Heard()
        latest = state.recent[-1]
        word = at_hand(latest)
        if word is not None:
            taken = not word & SKIPPED
            self.skipped += not taken
            return Heard(counts=taken, moved=taken)
        if not can_hear(latest.device):
            return Heard()
        if before.skipped is self._followed:
            self._words.append(Word(latest, factors=factors))
        else:  # a state that it does not know: the first step waits for the device
            self._words = deque(state.recent.tolist())
        self._followed = state.skipped
        return self._next()

    def _next(self) -> Heard:
        word = _read(self._words.popleft())
        assert len(self._words) == LATE
        if not word & SKIPPED:
            return Heard()
        self.skipped += 1
        return Heard(counts=False, missed=bool(word & FACTORS) and not any(map(_had_factors, self._words)))


def can_hear(device: torch.device) -> bool:
    """Whether the host hears of the steps of this kind of device, sooner or later."""
    return device.type in {"cpu", "cuda"}


def was_taken(state: Any) -> bool:
    """Whether the last step was; waits for the device."""
    return not (isinstance(state, SkipState) and int(state.recent[-1]) & SKIPPED)


def _read(word: Word | int) -> int:
    return word if isinstance(word, int) else word.read()


def _had_factors(word: Word | int) -> bool:
    return bool(word & FACTORS) if isinstance(word, int) else word.factors
