"""A CPU as if it were a GPU: the host hears of a step when ``LATE`` others have followed, not before."""

import ctypes

import pytest
from torch import Tensor

from thor_fx.skipping import LATE


def late_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is counted cannot be read without waiting for the device, and words of steps arrive late."""
    sent = 0

    class Word:
        def __init__(self, word: Tensor, *, factors: bool) -> None:
            nonlocal sent
            sent += 1
            self.factors = factors
            self._word, self._place = word.clone(), sent

        def read(self) -> int:
            assert sent - self._place == LATE
            return ctypes.c_int32.from_address(self._word.data_ptr()).value  # no operator of torch

    for module in ("alarm", "hearing"):
        monkeypatch.setattr(f"thor_fx.{module}.at_hand", lambda _: None)
    monkeypatch.setattr("thor_fx.hearing.can_hear", lambda _: True)
    monkeypatch.setattr("thor_fx.hearing.Word", Word)
