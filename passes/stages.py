"""What a pass did to a graph, as a value: its code before and after, what was added, removed and moved.

``logging.getLogger("thor_fx.passes")`` says so of every pass: the operators at level INFO, at DEBUG its code.
"""

import logging
import re
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import fx

LOG = logging.getLogger("thor_fx.passes")


@dataclass(frozen=True)
class Stage:
    """One pass of a pipeline, as it ran.

    Attributes:
        name: of the pass.
        seconds: how long it took.
        before: the graph's code before it.
        after: and after it.
        added: by operator, how many nodes are new.
        removed: by operator, how many are gone.
        moved: how many nodes have another place among those that stayed.
    """

    name: str
    seconds: float
    before: str
    after: str
    added: Mapping[str, int]
    removed: Mapping[str, int]
    moved: int = 0

    def __str__(self) -> str:
        new, gone = sum(self.added.values()), sum(self.removed.values())
        head = f"{self.name}: +{new} -{gone} nodes, {self.moved} moved, {self.seconds * 1000:.1f} ms"
        counts = {name: (self.added.get(name, 0), self.removed.get(name, 0)) for name in self.added}
        counts |= {name: (0, count) for name, count in self.removed.items() if name not in counts}
        lines = [f"  {_signed(*both):>7}  {name}" for name, both in sorted(counts.items())]
        return "\n".join([head, *lines])


Watch = Callable[[Stage, fx.GraphModule], None]
"""Is told of every pass once it has run, with the graph as it is then: to read, not to keep."""


def run_watched(
    graph_pass: Callable[[fx.GraphModule], None], gm: fx.GraphModule, name: str, watch: Watch | None = None
) -> None:
    """Run one pass in place; tell ``watch`` and the log what it did. Costs nothing where nobody listens."""
    watches = [one for one in (watch, _log if LOG.isEnabledFor(logging.INFO) else None) if one is not None]
    if not watches:
        graph_pass(gm)
        return
    before, start = _Seen(gm), time.perf_counter()
    graph_pass(gm)
    stage = before.stage(name, time.perf_counter() - start, _Seen(gm))
    for one in watches:
        one(stage, gm)


def code_of(gm: fx.GraphModule) -> str:
    """The graph as Python, one line for every node, without what frees memory."""
    source = gm.graph.python_code("self").src
    return re.sub(r";  (\w+ = )+None.*$", "", source, flags=re.MULTILINE).strip()


class _Seen:
    """A graph at some time: its code, and the operators of its nodes in order."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.code = code_of(gm)
        # by name: a pass that builds the graph anew keeps the names of what it keeps
        self.nodes = {(node.name, operator_of(node)): i for i, node in enumerate(gm.graph.nodes)}

    def stage(self, name: str, seconds: float, after: "_Seen") -> Stage:
        added = Counter(operator for key, operator in after.nodes if (key, operator) not in self.nodes)
        removed = Counter(operator for key, operator in self.nodes if (key, operator) not in after.nodes)
        stayed = [self.nodes[key] for key in after.nodes if key in self.nodes]
        moved = len(stayed) - _longest_rise(stayed)
        return Stage(name, seconds, self.code, after.code, dict(added), dict(removed), moved)


def operator_of(node: fx.Node) -> str:
    """What a node computes: ``"aten.mm.default"``; of what computes nothing, its kind: ``"placeholder"``."""
    if node.op in {"placeholder", "get_attr", "output"}:
        return node.op
    return str(node.target) if isinstance(node.target, str) or "." in str(node.target) else _name(node.target)


def _name(target: object) -> str:
    return getattr(target, "__name__", str(target))


def _longest_rise(places: list[int]) -> int:
    """The length of the longest part, with gaps, that rises."""
    ends: list[int] = []
    for place in places:
        at = bisect_left(ends, place)
        ends[at : at + 1] = [place]
    return len(ends)


def _signed(added: int, removed: int) -> str:
    return " ".join([f"+{added}"] * bool(added) + [f"-{removed}"] * bool(removed))


def _log(stage: Stage, _gm: fx.GraphModule) -> None:
    LOG.info("%s", stage)
    LOG.debug("%s", stage.after)
