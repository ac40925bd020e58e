"""Run passes in order: copy once, check between, name the culprit."""

import copy
from collections.abc import Callable, Sequence
from functools import partial

from torch import fx

from . import spec
from .stages import Stage, Watch, run_watched

Pass = Callable[[fx.GraphModule], None]
"""Rewrites a step graph in place. Options are bound with :func:`functools.partial`."""


class PassError(RuntimeError):
    """A pass failed, or left a graph behind that breaks :mod:`thor_fx.passes.spec`."""


def name_of(graph_pass: Pass) -> str:
    """The name that a pass goes by in errors and logs: that of its function."""
    while isinstance(graph_pass, partial):
        graph_pass = graph_pass.func
    return getattr(graph_pass, "__name__", type(graph_pass).__name__)


def run(gm: fx.GraphModule, passes: Sequence[Pass], *, watch: Watch | None = None) -> fx.GraphModule:
    """Apply ``passes`` in order to a copy of ``gm``.

    Args:
        gm: a step graph; it is left as it is.
        passes: functions that rewrite a step graph in place.
        watch: is told of every pass once it has run, ``watch(stage, graph)``.

    Returns:
        The rewritten copy.

    Raises:
        SpecError: ``gm`` itself breaks the rules.
        PassError: a pass raised or broke the rules; names it and the passes before it.
    """
    spec.check(gm)
    result = copy.deepcopy(gm)
    apply(result, passes, watch=watch)
    result.recompile()
    return result


def apply(
    gm: fx.GraphModule, passes: Sequence[Pass], *, after: Sequence[str] = (), watch: Watch | None = None
) -> None:
    """Apply ``passes`` in order, in place.

    Args:
        gm: a step graph.
        passes: functions that rewrite a step graph in place.
        after: the names of passes that have been applied before.
        watch: as in :func:`run`.

    Raises:
        PassError: a pass raised or broke the rules; names it and the passes before it.
    """
    done = list(after)
    for graph_pass in passes:
        name = name_of(graph_pass)
        try:
            run_watched(graph_pass, gm, name, watch)
            spec.check(gm)
        except Exception as error:
            before = ", ".join(done) or "no other pass"
            raise PassError(f"pass {name!r} failed (after {before}): {error}") from error
        done.append(name)


def observe(gm: fx.GraphModule, passes: Sequence[Pass]) -> tuple[fx.GraphModule, list[Stage]]:
    """What :func:`run` returns, and what every pass did.

    Args:
        gm: a step graph; it is left as it is.
        passes: functions that rewrite a step graph in place.

    Returns:
        The rewritten copy, and one stage for every pass; ``print(stage)`` shows the operators that it added
        and removed.
    """
    stages: list[Stage] = []
    result = run(gm, passes, watch=lambda stage, _: stages.append(stage))
    return result, stages
