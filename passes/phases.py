"""Which part of a training step every node of its graph belongs to.

============  ==============================================================================================
``factors``   what only sums for second-order training need: ``Factor``, ``Rows`` and ``Terms`` outputs
``backward``  of the rest, what depends on where backward starts, or is computed again for what does
              (:mod:`.stitch`)
``forward``   the rest of a step graph: its inputs, too
``refresh``   of an appended update, what depends on those sums and on no gradient, and what only this needs:
              averages of factors, and their inverses
``update``    the rest of an appended update: preconditioning, momentum, and everything that is written
============  ==============================================================================================

Descriptors and edges decide, not names. A step that is skipped where a gradient is not finite keeps its old
inverses; the choice between old and new is a part of the update.
"""

from collections.abc import Collection, Iterable
from typing import Literal, get_args

from torch import fx

from .nodes import downstream, upstream
from .outputs import Factor, Grad, OutputDescriptor, Rows, Terms, output_nodes
from .sites import seeds
from .stitch import BACKWARD, SIDE

Phase = Literal["forward", "backward", "factors", "refresh", "update"]

PHASES: tuple[Phase, ...] = get_args(Phase)
"""In the order of a step."""

PHASE = "thor_fx phase"
"""Where a node says its phase: in ``node.meta``."""

CARRIED = "custom"
"""A part of ``node.meta`` that other tracers carry on; a node says its phase there, too."""


def mark(gm: fx.GraphModule) -> None:
    """Write the phase of every node of a step graph without an update, in place.

    Afterwards all nodes but the output have a phase, which goes wherever they are copied or traced again.
    """
    returned = output_nodes(gm)
    needed = upstream(node for d, node in returned.items() if node is not None and not _is_measured(d))
    measured = upstream(node for d, node in returned.items() if node is not None and _is_measured(d))
    backward = downstream(seeds(gm))
    for node in gm.graph.nodes:
        if node.op == "output":
            continue
        if node in measured and node not in needed:
            set_phase(node, "factors")
        elif node in backward or node.meta.get(SIDE) == BACKWARD:
            set_phase(node, "backward")
        else:
            set_phase(node, "forward")


def mark_update(gm: fx.GraphModule, appended: Collection[fx.Node]) -> None:
    """Write the phase of the nodes of an update, in place.

    Args:
        gm: a graph that still returns what the update was made of.
        appended: the inputs and the operations of the update.
    """
    new, returned = set(appended), output_nodes(gm)
    measured = {node for d, node in returned.items() if node is not None and _is_measured(d)}
    gradients = {node for d, node in returned.items() if node is not None and isinstance(d, Grad)} - measured
    refresh = _reached(gm, measured, new) - _reached(gm, gradients, new)
    for node in reversed(gm.graph.nodes):
        if node in new and node.users and all(user in refresh for user in node.users):
            refresh.add(node)
    for node in new:
        set_phase(node, "refresh" if node in refresh else "update")


def _reached(gm: fx.GraphModule, starts: set[fx.Node], new: set[fx.Node]) -> set[fx.Node]:
    """Those of the new nodes that depend on ``starts``."""
    found: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if node in new and any(source in found or source in starts for source in node.all_input_nodes):
            found.add(node)
    return found


def set_phase(node: fx.Node, phase: Phase) -> None:
    """Write the phase of one node."""
    node.meta[PHASE] = phase
    node.meta[CARRIED] = {**(node.meta.get(CARRIED) or {}), PHASE: phase}


def phase_of(node: fx.Node) -> Phase | None:
    """The phase of a node, or of the one that it was traced from; None where nothing is known."""
    return node.meta.get(PHASE) or (node.meta.get(CARRIED) or {}).get(PHASE)


def phases_of(gm: fx.GraphModule) -> dict[str, Phase]:
    """The phases of all nodes that have one, by name, in the order of the graph."""
    return {node.name: phase for node in gm.graph.nodes if (phase := phase_of(node)) is not None}


def in_order(phases: Iterable[Phase | None]) -> tuple[Phase, ...]:
    """Each of the phases once, in the order of a step."""
    found = set(phases)
    return tuple(phase for phase in PHASES if phase in found)


def _is_measured(descriptor: OutputDescriptor) -> bool:
    return isinstance(descriptor, Factor | Rows | Terms)
