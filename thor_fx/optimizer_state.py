"""The state of :class:`thor_fx.Thor` by parameter, as ``torch.optim`` keeps it.

The update works on stacks: the inverses of all layers of one shape are one tensor. State dicts speak
of single parameters. :func:`views` gives the stacks' slices by parameter: the same memory.
"""

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .adam import AdamState
from .inverses import State
from .layers import Coverage
from .precondition import PreconditionState
from .refresh import by_shape, spans
from .renewal import Memory
from .state_versions import SavedState
from .trace_rule import Watch
from .transform import SkipState

Entry = dict[str, Any]

MEASURED = ("inverses", "factors")
"""What the state of a parameter has of layers that had factors."""

OF_LAYERS = (*MEASURED, "failing")
"""What the state of a parameter has by layer."""


def views(
    state: SkipState,
    found: Coverage,
    params: Mapping[str, Tensor],
    labels: Mapping[str, str],
    held: Callable[[Coverage, Mapping[str, Tensor]], Coverage],
) -> dict[str, Entry]:
    """The state of every parameter: its moments, and of its layers inverses, failures in a row and factors.

    Args:
        state: of all groups.
        found: the coverage of all groups.
        params: by name.
        labels: the group of every parameter.
        held: of the coverage of a group, what this rank has inverses of.
    """
    entries: dict[str, Entry] = {name: {} for name in params}
    for name, key, value in moments(state):
        entries[name][key] = value
    for label, preconditioning in preconditioners(state).items():
        mine = held(found.restrict(frozenset(name for name in params if labels[name] == label)), params)
        for key, layers in by_shape(mine, params).items():
            for layer, place in zip(layers, spans(layers), strict=True):
                entry = entries[layer.param]
                entry.setdefault("inverses", {})[layer.name] = _part(preconditioning.inverses[key], place)
                entry.setdefault("failing", {})[layer.name] = preconditioning.failing[key][place]
        if isinstance(preconditioning.memory, Memory):
            for name, layer in mine.layers.items():
                factors = entries[layer.param].setdefault("factors", {})
                factors[name] = _remembered(preconditioning.memory, name)
    return entries


def _remembered(memory: Memory, layer: str) -> Entry:
    """The average of the factors of a layer, and what the trace rule remembers of it."""
    averages = memory.averages
    sides, place = averages.factors[layer], list(averages.factors).index(layer)
    entry = {"input": list(sides.input), "output": list(sides.output), "weight": averages.weights[place]}
    if isinstance(memory.watch, Watch):
        watched = ("seen", "used", "fresh", "frozen")
        entry |= {name: getattr(memory.watch, name)[place] for name in watched}
    return entry


def counters_of(state: SkipState) -> dict[str, Entry]:
    """What is kept once per group of parameters, by its label."""
    return {label: _counters(state, own) for label, own in preconditioners(state).items()}


def _counters(state: SkipState, preconditioning: PreconditionState) -> Entry:
    counters: Entry = {"terms": preconditioning.terms, "failed_inverses": preconditioning.failures}
    counters |= {"refreshes": preconditioning.refreshes, "skipped_steps": state.skipped}
    counters["recent_steps"] = state.recent
    memory = preconditioning.memory
    if isinstance(memory, Memory) and isinstance(memory.damping, Tensor):
        counters["measured_damping"] = memory.damping
    if isinstance(memory, Memory) and isinstance(memory.watch, Watch):
        watch = memory.watch
        counters |= {"interval": watch.interval, "refreshed": watch.refreshed, "kept": watch.kept}
    return counters


def moments(state: Any) -> Iterator[tuple[str, str, Tensor]]:
    """What is kept of single parameters: (parameter, what torch calls it, tensor)."""
    if isinstance(state, AdamState):
        for key, tensors in zip(AdamState._fields, state, strict=True):
            yield from ((name, key, value) for name, value in tensors.items())
    elif isinstance(state, tuple) and not isinstance(state, PreconditionState):
        for inner in state:
            yield from moments(inner)
    elif isinstance(state, dict):
        for name, inner in state.items():  # of groups by label, or the momentum of parameters
            yield from [(name, "momentum", inner)] if isinstance(inner, Tensor) else moments(inner)


def preconditioners(state: Any) -> dict[str, PreconditionState]:
    """The preconditioner of every group of parameters that has layers, by label."""
    if isinstance(state, dict):
        return {label: inner for label, inner in state.items() if isinstance(inner, PreconditionState)} | {
            label: found for inner in state.values() for label, found in preconditioners(inner).items()
        }
    inside = state if isinstance(state, tuple) and not isinstance(state, PreconditionState) else ()
    return {label: found for inner in inside for label, found in preconditioners(inner).items()}


def restore(target: Any, saved: Any, name: str, differs: str = "") -> None:
    """Copy what was saved of one parameter into its views; what was not saved stays as it is.

    Args:
        target: the views.
        saved: of the same form.
        name: of the parameter.
        differs: the options that are known to be others than those that it was saved with.

    Raises:
        ValueError: a saved tensor has another shape, or the state is that of another kind of inverse.
    """
    if isinstance(target, Tensor):
        if target.shape != saved.shape:
            raise ValueError(
                f"the saved state of {name!r} has shape {tuple(saved.shape)}, this optimizer needs "
                f"{tuple(target.shape)}: use the block_size and the model that it was saved with"
                f"{differs and f' ({differs})'}"
            )
        target.copy_(saved)
        return
    if isinstance(target, dict) and target.keys() >= {"input", "output"} and target.keys() != saved.keys():
        raise ValueError(
            f"the saved state of {name!r} holds {sorted(saved)}, this optimizer needs {sorted(target)}: use "
            "the inverse= that it was saved with"
        )
    if not isinstance(target, dict) and len(target) != len(saved):
        raise ValueError(
            f"the saved state of {name!r} has {len(saved)} tensors, this optimizer needs {len(target)}: use "
            f"the block_size and the model that it was saved with{differs and f' ({differs})'}"
        )
    pairs = target.items() if isinstance(target, dict) else enumerate(target)
    for key, inner in pairs:
        if isinstance(saved, dict) and key not in saved:
            continue
        restore(inner, saved[key], f"{name}.{key}", differs)


@contextmanager
def loading(optimizer: torch.optim.Optimizer, accept: Callable[[SavedState], SavedState]) -> Iterator[None]:
    """While it lasts, ``optimizer`` loads what ``accept`` makes of a state dict, in the dtypes that it has.

    ``accept`` sees what the hooks of users have made of it. torch would give all of a parameter's state the
    dtype of the parameter, and round inverses that are kept in float32 to bfloat16.
    """
    loaded: list[SavedState] = []

    def before(_: torch.optim.Optimizer, saved: SavedState) -> SavedState:
        loaded.append(accept(saved))
        return loaded[-1]

    def after(_: torch.optim.Optimizer) -> None:
        groups = zip(loaded[-1]["param_groups"], optimizer.param_groups, strict=True)
        params = itertools.chain.from_iterable(zip(s["params"], o["params"], strict=True) for s, o in groups)
        for number, param in params:
            if number in loaded[-1]["state"]:
                optimizer.state[param] = _on(param.device, loaded[-1]["state"][number])

    hooks = [
        optimizer.register_load_state_dict_pre_hook(before),
        optimizer.register_load_state_dict_post_hook(after, prepend=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _on(device: torch.device, entry: Entry) -> Entry:
    moved: Entry = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), entry)
    return moved


def layers_of(entries: Iterable[Mapping[str, Any]]) -> set[str]:
    """The layers that a state has inverses or factors of."""
    return {layer for entry in entries for kept in MEASURED for layer in entry.get(kept, {})}


def with_unfound(entry: Entry, saved: Entry, unfound: Collection[str]) -> Entry:
    """The state of a parameter, with what was saved of layers that no graph has shown yet."""
    for kept in OF_LAYERS:
        more = {layer: value for layer, value in saved.get(kept, {}).items() if layer in unfound}
        if more:
            entry[kept] = {**entry.get(kept, {}), **more}
    return entry


def _part(state: State, place: slice) -> Entry:
    return {name: [part[place] for part in field] for name, field in state._asdict().items()}


def layers_with_inverses(entries: Iterable[Mapping[str, Any]], marks: Sequence[str]) -> set[str]:
    """The layers that have had a good inverse: the fields ``marks`` are not zero. Waits for the device."""
    return {
        layer
        for entry in entries
        for layer, fields in entry.get("inverses", {}).items()
        if all(part.any() for mark in marks for part in fields[mark])
    }
