"""A fresh state of an update goes on where the one before left off, or the one that was loaded."""

from collections.abc import MutableMapping, Sequence
from typing import Any

from torch import Tensor

from .built import Built
from .distributed.owned import moved
from .inverses import METHODS
from .optimizer_state import counters_of, layers_with_inverses, restore, views, with_unfound
from .readiness import Readiness


def start(
    built: Built,
    state: MutableMapping[Tensor, Any],
    groups: Sequence[dict[str, Any]],
    known: Readiness,
    differs: str,
) -> None:
    """Make a fresh state, copy what is known into it, and let ``state`` show it.

    All ranks call this together.

    Args:
        built: gets the state.
        state: that of the optimizer, by parameter; holds views of the fresh one then.
        groups: of parameters; their counters are views then.
        known: which layers have had factors; learns what the state says of it.
        differs: how the options differ from those that the state was saved with, in words.

    Raises:
        ValueError: what is known has another shape, or is of another kind of inverse.
    """
    built.ahead.forget()
    built.update.begin()
    continues = any(state.values())
    _restore_entries(built, state, known, differs)
    if continues and (built.shares or not known.recorded):
        known.ready |= layers_with_inverses(state.values(), METHODS[built.options.inverse].marks)
    if built.world is not None and built.shares:
        known.ready = set().union(*built.world.everybodys(known.ready))
    for label, counters in counters_of(built.state).items():
        group = groups[int(label)]
        restore(counters, {name: group[name] for name in counters if name in group}, f"group {label}")
        group |= counters


def _restore_entries(
    built: Built, state: MutableMapping[Tensor, Any], known: Readiness, differs: str
) -> None:
    labels = built.groups.labels
    assert labels is not None, "groups have labels"
    saved = {name: state.get(parameter, {}) for name, parameter in built.params.items()}
    if built.owners is not None:
        saved |= moved(built.owners.parts, saved)
    for name, entry in views(built.state, built.found, built.params, labels, built.held()).items():
        restore(entry, saved[name], name, differs)
        state[built.params[name]] = with_unfound(entry, saved[name], known.unfound)
