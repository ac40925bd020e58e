"""What a pass did to a graph, as a value: its code before and after, what was added, removed and moved."""

from collections.abc import Mapping
from dataclasses import dataclass


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
