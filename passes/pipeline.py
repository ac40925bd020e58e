"""Run passes in order: copy once, check between, name the culprit."""

import copy
from collections.abc import Callable, Sequence
from functools import partial

from torch import fx

from . import spec

Pass = Callable[[fx.GraphModule], None]
"""Rewrites a step graph in place. Options are bound with :func:`functools.partial`."""


class PassError(RuntimeError):
    """A pass failed, or left a graph behind that breaks :mod:`thor_fx.passes.spec`."""


def name_of(graph_pass: Pass) -> str:
    """The name that a pass goes by in errors and logs: that of its function."""
    while isinstance(graph_pass, partial):
        graph_pass = graph_pass.func
    return getattr(graph_pass, "__name__", type(graph_pass).__name__)


def run(gm: fx.GraphModule, passes: Sequence[Pass]) -> fx.GraphModule:
    """Apply ``passes`` in order to a copy of ``gm``.

    Args:
        gm: a step graph; it is left as it is.
        passes: functions that rewrite a step graph in place.

    Returns:
        The rewritten copy.

    Raises:
        SpecError: ``gm`` itself breaks the rules.
        PassError: a pass raised or broke the rules; names it and the passes before it.
    """
    spec.check(gm)
    result = copy.deepcopy(gm)
    done: list[str] = []
    for graph_pass in passes:
        name = name_of(graph_pass)
        try:
            graph_pass(result)
            spec.check(result)
        except Exception as error:
            before = ", ".join(done) or "no other pass"
            raise PassError(f"pass {name!r} failed (after {before}): {error}") from error
        done.append(name)
    result.recompile()
    return result
