"""Finished runs become numbers: everything that the tables say, as JSON."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from levels import Curve, average, levels_of, seconds_to, smooth, spread, steps_to
from optimizers import OPTIMIZERS, Entry
from runs import TUNING_SEED, Plan, Record, Runs, Tuning, finals, reached, tuning
from tasks import Task

BASELINE = "adamw"
Row = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """What one optimizer did on one task.

    Attributes:
        search: all runs of the tuning seed.
        records: the runs of the best setting: of the fresh seeds, or of the tuning seed while there are none.
    """

    entry: Entry
    search: Tuning
    records: list[Record]


def results(runs: Runs, task: Task, plan: Plan) -> dict[str, Result]:
    """The results of one task by optimizer."""
    return {name: result(runs, task, name, entry, plan) for name, entry in OPTIMIZERS.items()}


def result(runs: Runs, task: Task, name: str, entry: Entry, plan: Plan) -> Result:
    search = tuning(runs, task, name, entry.space, plan)
    if search.best is None:
        return Result(entry, search, [])
    fresh = finals(runs, task, name, search.best, plan.seeds).values()
    finished = [record for record in fresh if record is not None and record["status"] != "failed"]
    return Result(entry, search, finished or [search.best])


def mean_curve(records: Sequence[Record], task: Task) -> Curve:
    """The smoothed training loss, averaged over the runs; infinite where one of them has ended."""
    return average([smooth(record["losses"], task.window) for record in records], task.steps)


def levels(found: Mapping[str, Result], task: Task) -> dict[str, float]:
    """The levels that AdamW's curve defines; none while it has no run."""
    records = found[BASELINE].records
    return levels_of(mean_curve(records, task)) if records else {}


def summarise(
    found: Mapping[str, Mapping[str, Result]], tasks: Sequence[Task], plan: Plan, clock: str
) -> Row:
    """Levels and rows of every task.

    Args:
        found: results by task and optimizer.
        tasks: in the order of the report.
        plan: says what belongs to the study.
        clock: ``"cpu"`` or ``"wall"``: what counts as seconds.
    """
    every = [record for by in found.values() for one in by.values() for record in one.records]
    return {
        "clock": clock,
        "seeds": list(plan.seeds),
        "budget": plan.budget,
        "where": sorted({record["where"] for record in every}),
        "tasks": {task.name: task_summary(task, found[task.name], clock) for task in tasks},
    }


def task_summary(task: Task, found: Mapping[str, Result], clock: str) -> Row:
    marks = levels(found, task)
    rows = {name: row(task, one, marks, clock) for name, one in found.items()}
    baseline = rows[BASELINE].get("ms_per_step")
    for numbers in rows.values():
        if baseline and "ms_per_step" in numbers:
            numbers["ratio"] = numbers["ms_per_step"] / baseline
    return {"title": task.title, "steps": task.steps, "batch": task.batch, "levels": marks, "rows": rows}


def row(task: Task, one: Result, marks: Mapping[str, float], clock: str) -> Row:
    told = ("setting", "status", "valid_loss")
    tried = [{part: record[part] for part in told} for record in one.search.tried]
    head = {"label": one.entry.label, "state": state(one), "tried": tried}
    return {**head, **numbers(task, one.records, marks, clock)} if one.records else head


def numbers(task: Task, records: Sequence[Record], marks: Mapping[str, float], clock: str) -> Row:
    curve, times = mean_curve(records, task), [record[f"{clock}_ms"] for record in records]
    steps = {name: steps_to(curve, loss) for name, loss in marks.items()}
    accuracies = [record["valid_accuracy"] for record in records if record["valid_accuracy"] is not None]
    return {
        "setting": records[0]["setting"],
        "valid_loss": finite(spread([reached(record) for record in records])),
        "valid_accuracy": finite(spread(accuracies)) if accuracies else None,
        "ms_per_step": sum(map(sum, times)) / sum(map(len, times)),  # renewals count with their share
        "compile_s": max(record["compile_s"] for record in records),
        "steps_to": steps,
        "seconds_to": {name: seconds_to(times, count) for name, count in steps.items()},
    }


def state(one: Result) -> str:
    """What a reader has to know of a row; empty where all is as planned."""
    if not one.search.tried:
        return "not run" if one.entry.installed else "not installed"
    if not one.records:
        return "no setting came to its end"
    bad = [record["status"] for record in one.records if record["status"] != "done"]
    parts = [f"{len(bad)} of {len(one.records)} runs: {bad[0]}"] if bad else []
    parts += ["tuning seed only"] if one.records[0]["seed"] == TUNING_SEED else []
    parts += [f"search not finished: {len(one.search.tried)} runs"] if one.search.following else []
    return "; ".join(parts)


def finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has no infinity."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
