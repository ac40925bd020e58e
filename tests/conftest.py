"""Settings of the whole suite: a busy machine is no failure, and what is drawn is the same in every run.

``pytest -m fuzz --hypothesis-profile=nightly`` draws many more, and others every time.
"""

from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings

UNHURRIED: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("thor_fx", derandomize=True, **UNHURRIED)
settings.register_profile("nightly", print_blob=True, **UNHURRIED)
settings.load_profile("thor_fx")


def examples(ci: int, nightly: int) -> Callable[[Any], Any]:
    """How many examples a property gets, by profile: those that compile a model take a second each."""
    is_nightly = settings.get_current_profile_name() == "nightly"
    return settings(max_examples=nightly if is_nightly else ci)
