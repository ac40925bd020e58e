"""Passes of the user's own: functions of the graph of a factor step, which may measure more in it.

A pass is ``f(gm) -> None``. It finds the graph with factors and without an update, and may rewrite it in
place: what the graph returns stays first, :class:`~thor_fx.passes.Statistic` outputs may follow. It may run
several times for one graph, so it must depend on nothing but the graph.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .arguments import shown
from .passes import PassError, Statistic, outputs, pipeline
from .passes.pipeline import Pass, name_of
from .passes.stages import Watch

Statistics = Mapping[tuple[str, str], Tensor]
"""By the name of the statistic and that of the parameter."""


def checked_passes(passes: Any) -> tuple[Pass, ...]:
    """The value of the argument ``passes``.

    Raises:
        TypeError: it is no list of callables.
    """
    if isinstance(passes, str) or not isinstance(passes, Sequence):
        raise TypeError(f"passes must be a list of callables gm -> None, got {shown(passes)}")
    for one in passes:
        if not callable(one):
            raise TypeError(f"passes must be callables gm -> None, got {shown(one)}")
    return tuple(passes)


def apply_own(gm: fx.GraphModule, passes: Sequence[Pass], *, watch: Watch | None = None) -> None:
    """Run the user's passes on a graph with factors, in place.

    Raises:
        PassError: one of them raised, broke the rules of graphs, or returns what cannot be delivered; names
            it and the passes before it.
    """
    done = ["emit_factors"]
    for one in passes:
        before = outputs.output_node(gm.graph).meta[outputs.KEY]
        pipeline.apply(gm, [one], after=done, watch=watch)
        _check_returned(gm, before, f"pass {name_of(one)!r} failed (after {', '.join(done)})")
        done.append(name_of(one))


def _check_returned(gm: fx.GraphModule, before: Sequence[Any], failed: str) -> None:
    returned = outputs.output_nodes(gm)
    kept, new = tuple(returned)[: len(before)], tuple(returned)[len(before) :]
    if kept != tuple(before):
        raise PassError(f"{failed}: what the graph returned before must stay first; append outputs behind it")
    for descriptor in new:
        if not isinstance(descriptor, Statistic):
            raise PassError(
                f"{failed}: it returns {descriptor}; append Statistic(name, param) to be delivered"
            )
        node = returned[descriptor]
        value = None if node is None else node.meta.get("val")
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise PassError(f"{failed}: {descriptor} must be a floating-point tensor, got {kind}")
        if node is not None and node.op == "placeholder":
            raise PassError(f"{failed}: {descriptor} is an input of the graph; return a computed value")


def statistics_of(gm: fx.GraphModule) -> dict[Statistic, fx.Node]:
    """What the user's passes have made a graph return."""
    return {d: n for d, n in outputs.output_nodes(gm).items() if isinstance(d, Statistic) and n is not None}


def fixed_shape(descriptor: Statistic, value: Tensor) -> tuple[int, ...]:
    """The shape of a statistic.

    Raises:
        PassError: it depends on the batch.
    """
    if any(isinstance(size, torch.SymInt) for size in value.shape):
        raise PassError(
            f"{descriptor} has the shape {tuple(value.shape)}, which depends on the batch: sum over it"
        )
    return tuple(value.shape)


def key_of(passes: Sequence[Pass]) -> tuple[str, ...] | None:
    """The ``uuid`` of every pass, a text or a method that returns one; None where one has none."""
    found = [getattr(one, "uuid", None) for one in passes]
    names = [one() if callable(one) else one for one in found]
    return None if None in names else tuple(map(str, names))
