"""Settings of the whole suite: a busy machine is no failure, and what is drawn is the same in every run.

``pytest -m fuzz --hypothesis-profile=nightly`` draws many more, and others every time.
"""

import gc
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

UNHURRIED: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("thor_fx", derandomize=True, **UNHURRIED)
settings.register_profile("nightly", print_blob=True, **UNHURRIED)
settings.load_profile("thor_fx")

gc.set_threshold(50_000, 20, 20)  # compilers make many objects and few cycles: 5 % of the time of the suite


@pytest.fixture(autouse=True, scope="module")
def left_behind() -> Iterator[None]:
    """What a module leaves, compiled graphs above all, is not looked through again by every collection."""
    yield
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """At the end everything is let go: some libraries complain of what is not."""
    gc.unfreeze()
