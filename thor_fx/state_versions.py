"""Versions of what is saved, and the way from each to the next.

Three things carry the number: every group of parameters in ``Thor.state_dict()``, as ``format["version"]``;
a :class:`~thor_fx.StepState`, as ``version``; and a folder of :func:`thor_fx.distributed.checkpoint.save`.
What was saved before there were versions is of version 0.

A change of what is saved raises :data:`VERSION` by one. For every kind of thing that it changes there is a
pure function that makes a new one of an old one, entered below under the version that it starts from. A
version without an entry changed nothing of that kind.
"""

from collections.abc import Callable, Mapping
from typing import Any

VERSION = 1

SavedState = dict[str, Any]
"""What ``Thor.state_dict()`` returns: ``state`` by the number of the parameter, and ``param_groups``."""


def _groups_with_format(saved: SavedState) -> SavedState:
    """Version 0 said nothing of itself, so nothing is known of the options that it was saved with."""
    return {**saved, "param_groups": [{**group, "format": {}} for group in saved["param_groups"]]}


Migrations = Mapping[int, Callable[[Any], Any]]

OPTIMIZER: Migrations = {0: _groups_with_format}
"""Of state dicts."""

STEP: Migrations = {}
"""Of the states of functional steps. Version 1 has its number more than version 0, and nothing else."""

CHECKPOINT: Migrations = {}
"""Of the nests that checkpoints hold."""


def migrated(saved: Any, version: int, migrations: Migrations, what: str) -> Any:
    """What was saved, as this version would have saved it.

    Args:
        saved: is not changed.
        version: its own.
        migrations: of its kind.
        what: it is, for the error.

    Raises:
        ValueError: it is of a later version.
    """
    if version > VERSION:
        raise ValueError(
            f"{what} is of version {version} of what thor_fx saves, and this thor_fx reads versions up to "
            f"{VERSION}: install the thor_fx that saved it, or a later one (pip install --upgrade thor-fx)"
        )
    for start in range(version, VERSION):
        if start in migrations:
            saved = migrations[start](saved)
    return saved


def version_of(saved: Mapping[str, Any]) -> int:
    """The version of a state dict: the highest of its groups."""
    return max((group.get("format", {}).get("version", 0) for group in saved["param_groups"]), default=0)
