"""The file of finished runs, and what is still to do."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search import BUDGET, Point, Space, next_point
from tasks import Task

FILE = "runs.jsonl"
TUNING_SEED = 0
SEEDS = (1, 2, 3)

Record = dict[str, Any]
Setting = dict[str, Any]
Key = tuple[str, str, str, int]


def key_of(protocol: str, optimizer: str, setting: Mapping[str, Any], seed: int) -> Key:
    """What tells runs apart; a setting counts as JSON would give it back."""
    return protocol, optimizer, json.dumps(setting, sort_keys=True), seed


class Runs:
    """Finished runs in a file, one line of JSON each, which any number of lines may still follow."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._records: dict[Key, Record] = {}
        text = path.read_text() if path.exists() else ""
        for line in text.splitlines():
            self._keep(line)
        self._torn = bool(text) and not text.endswith("\n")

    def __len__(self) -> int:
        return len(self._records)

    def get(self, task: Task, optimizer: str, setting: Setting, seed: int) -> Record | None:
        return self._records.get(key_of(task.protocol, optimizer, setting, seed))

    def add(self, record: Record) -> None:
        """Append a run at once; one that was cut short by a crash stays behind as a line of its own."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(record)
        with self._path.open("a") as file:
            file.write(("\n" if self._torn else "") + line + "\n")
        self._torn = False
        self._keep(line)

    def _keep(self, line: str) -> None:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            return  # its run was interrupted while it was written, and is repeated
        key = key_of(record["protocol"], record["optimizer"], record["setting"], record["seed"])
        self._records[key] = record


@dataclass(frozen=True)
class Plan:
    """How much is run for each optimizer on each task."""

    budget: int = BUDGET
    seeds: tuple[int, ...] = SEEDS


def reached(record: Record) -> float:
    """What the search minimises: the held-out loss at the end."""
    bad = record["status"] in {"diverged", "failed"} or record["valid_loss"] is None
    return math.inf if bad else record["valid_loss"]


@dataclass(frozen=True)
class Tuning:
    """A search so far: what was tried, and the setting to run next (None: the search is complete)."""

    tried: list[Record]
    following: Setting | None

    @property
    def best(self) -> Record | None:
        """The best run; None where nothing was tried or all diverged."""
        finite = [record for record in self.tried if math.isfinite(reached(record))]
        return min(finite, key=reached, default=None)


def tuning(runs: Runs, task: Task, optimizer: str, space: Space, plan: Plan) -> Tuning:
    """Follow the search through the finished runs."""
    found: dict[Point, float] = {}
    tried: list[Record] = []
    while (point := next_point(space, task.name, found, plan.budget)) is not None:
        setting = space.setting(task.name, point)
        record = runs.get(task, optimizer, setting, TUNING_SEED)
        if record is None:
            return Tuning(tried, setting)
        found[point] = reached(record)
        tried.append(record)
    return Tuning(tried, None)


def finals(
    runs: Runs, task: Task, optimizer: str, best: Record, seeds: Iterable[int]
) -> dict[int, Record | None]:
    """The runs of the best setting, by seed; None for those that are still to do."""
    return {seed: runs.get(task, optimizer, best["setting"], seed) for seed in seeds}
