"""What a pass did to the code of a graph, as the page shows it."""

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any

from ..passes.stages import Stage

Line = tuple[str, int | None, int | None, str]
"""``" "``, ``"-"`` or ``"+"``; the number before and after; the text."""

CONTEXT = 3


def stage_facts(stage: Stage) -> dict[str, Any]:
    """One pass: its time, what it added and removed, and its diff in pieces."""
    added, removed = dict(stage.added), dict(stage.removed)
    return {
        "name": stage.name,
        "seconds": stage.seconds,
        "added": sorted(added.items(), key=lambda item: (-item[1], item[0])),
        "removed": sorted(removed.items(), key=lambda item: (-item[1], item[0])),
        "moved": stage.moved,
        "difference": sum(added.values()) - sum(removed.values()),
        "pieces": pieces(stage.before.splitlines(), stage.after.splitlines()),
    }


def pieces(before: Sequence[str], after: Sequence[str]) -> list[list[Line]]:
    """The places where two texts differ, with the lines around them.

    Example:
        >>> [[line[0] + line[3] for line in piece] for piece in pieces(["a", "b"], ["a", "c"])]
        [[' a', '-b', '+c']]
    """
    groups = SequenceMatcher(None, before, after, autojunk=False).get_grouped_opcodes(CONTEXT)
    return [[line for opcode in group for line in _lines(before, after, *opcode)] for group in groups]


def _lines(
    old: Sequence[str], new: Sequence[str], tag: str, start: int, end: int, new_start: int, new_end: int
) -> list[Line]:
    if tag == "equal":
        return [(" ", n + 1, n + 1 + new_start - start, old[n]) for n in range(start, end)]
    gone: list[Line] = [("-", n + 1, None, old[n]) for n in range(start, end)]
    return gone + [("+", None, n + 1, new[n]) for n in range(new_start, new_end)]
