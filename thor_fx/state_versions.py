"""Versions of what is saved, and the way from each to the next.

Three things carry the number: every group of parameters in ``Thor.state_dict()``, as ``format["version"]``;
a :class:`~thor_fx.StepState`, as ``version``; and a folder of :func:`thor_fx.distributed.checkpoint.save`.
What was saved before there were versions is of version 0.

A change of what is saved raises :data:`VERSION` by one. For every kind of thing that it changes there is a
pure function that makes a new one of an old one, entered below under the version that it starts from. A
version without an entry changed nothing of that kind.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .blocks import per_matrix
from .precondition import PreconditionState
from .skipping import nothing_skipped
from .transform import SkipState

VERSION = 3

SavedState = dict[str, Any]
"""What ``Thor.state_dict()`` returns: ``state`` by the number of the parameter, and ``param_groups``."""


def _groups_with_format(saved: SavedState) -> SavedState:
    """Version 0 said nothing of itself, so nothing is known of the options that it was saved with."""
    return {**saved, "param_groups": [{**group, "format": {}} for group in saved["param_groups"]]}


def _never_failed(inverses: Mapping[str, Any]) -> Tensor:
    """Up to version 1 nobody counted how often a block had failed in a row: (L, U)."""
    parts = [part for side in ("input", "output") for part in inverses[side]]
    units = 1 if "known" in inverses else sum(map(per_matrix, parts))  # Kronecker vectors fail together
    return torch.zeros(len(parts[0]), units, dtype=torch.int64, device=parts[0].device)


def _entries_that_count_failures(saved: SavedState) -> SavedState:
    def counting(entry: dict[str, Any]) -> dict[str, Any]:
        kept = entry.get("inverses", {})
        failing = {layer: _never_failed(of) for layer, of in kept.items() if of["input"] or of["output"]}
        return {**entry, "failing": failing} if failing else entry

    return {**saved, "state": {number: counting(entry) for number, entry in saved["state"].items()}}


def _states_that_count_failures(state: Any) -> Any:
    def counting(part: PreconditionState) -> PreconditionState:
        kept = {shape: inverses._asdict() for shape, inverses in part.inverses.items()}
        return part._replace(failing={shape: _never_failed(of) for shape, of in kept.items()})

    return _with(state, PreconditionState, counting)


def _states_that_remember_steps(state: Any) -> Any:
    """Up to version 2 nobody remembered which of the last steps were skipped."""

    def remembering(part: SkipState) -> SkipState:
        inner = _with(part.inner, SkipState, remembering)
        return part._replace(inner=inner, recent=nothing_skipped(part.skipped.device))

    return _with(state, SkipState, remembering)


Part = TypeVar("Part")


def _with(state: Any, kind: type[Part], change: Callable[[Part], Part]) -> Any:
    """A state, its parts of one kind changed; of those in another of them, that one is told."""

    def is_part(part: Any) -> bool:
        return isinstance(part, kind)

    return pytree.tree_map(lambda part: change(part) if is_part(part) else part, state, is_leaf=is_part)


Migrations = Mapping[int, Callable[[Any], Any]]

OPTIMIZER: Migrations = {0: _groups_with_format, 1: _entries_that_count_failures}
"""Of state dicts."""

STEP: Migrations = {1: _states_that_count_failures, 2: _states_that_remember_steps}
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
