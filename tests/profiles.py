"""How much is drawn, by the profiles of :mod:`conftest`."""

from collections.abc import Callable
from typing import Any

from hypothesis import settings


def examples(ci: int, nightly: int) -> Callable[[Any], Any]:
    """How many examples a property gets, by profile: those that compile a model take a second each."""
    is_nightly = settings.get_current_profile_name() == "nightly"
    return settings(max_examples=nightly if is_nightly else ci)
