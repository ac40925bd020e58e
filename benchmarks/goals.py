"""The goals of the project, each beside what was measured.

    python benchmarks/goals.py

reads the reports under ``results/`` that ``step_time.py`` and ``apart.py`` have written; it measures nothing.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contenders import ADAMW, DROP_IN, EVA, EVERY_STEP, FUNCTIONAL, ROUNDED, ROUNDED_EVERY_STEP, SGD
from kfac_jax_rows import JAX_SGD, KFAC_JAX
from tables import Report, publish, table

HERE = Path(__file__).parent
Reports = Mapping[str, Report]
Doors = Mapping[str, str]
"""The row that speaks for each door."""

BOTH: Doors = {"drop-in": DROP_IN, "functional": FUNCTIONAL}
WITH_ROUNDED: Doors = {**BOTH, "functional, bfloat16": ROUNDED}
ALWAYS: Doors = {"functional": EVERY_STEP, "functional, bfloat16": ROUNDED_EVERY_STEP}
ALL = ("mlp", "cnn", "transformer", "resnet", "gpt", "vit", "resnet50", "gpt2")
SMALL = ("mlp", "cnn", "transformer")
REAL = ("resnet", "gpt", "vit", "resnet50", "gpt2")
LARGE = ("gpt", "vit", "resnet50", "gpt2")  # above 10M parameters
IN_JAX = ("mlp", "cnn", "transformer", "gpt")
HOOKED = ("kfac-pytorch", "ASDL, K-FAC")
"""K-FAC of others, by hooks."""

Measure = Callable[[Reports, str, str], float | None]
"""``(reports, workload, row)`` to a number; None where it has not been measured."""


@dataclass(frozen=True)
class Goal:
    """A number that is to be at most ``limits[workload]``, or at least."""

    title: str
    limits: Mapping[str, float]
    measure: Measure
    doors: Doors
    at_least: bool = False

    def met(self, workload: str, value: float) -> bool:
        return value >= self.limits[workload] if self.at_least else value <= self.limits[workload]


# --- numbers from reports ----------------------------------------------------------------------------


def number(report: Report | None, row: str, *keys: str) -> float | None:
    """One number of a row; None where any part of the way is missing."""
    found: Any = (report or {}).get("rows", {}).get(row)
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def quotient(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below


def over(rival: str, ours: tuple[str, ...], theirs: tuple[str, ...]) -> Measure:
    """One of our times over one of the times of ``rival``."""
    return lambda reports, workload, row: quotient(
        number(reports.get(workload), row, *ours), number(reports.get(workload), rival, *theirs)
    )


def within(above: tuple[str, ...], below: tuple[str, ...]) -> Measure:
    """One of our times over another one."""
    return lambda reports, workload, row: quotient(
        number(reports.get(workload), row, *above), number(reports.get(workload), row, *below)
    )


def share(work: str) -> Measure:
    """How much of the floor's rate some work reaches."""

    def measure(reports: Reports, workload: str, row: str) -> float | None:
        lines = reports.get(workload, {}).get("floors", [])
        found = [line["share"] for line in lines if (line["contender"], line["work"]) == (row, work)]
        return found[0] if found else None

    return measure


def faster_than(rival: str) -> Measure:
    """The mean step of ``rival`` over ours, both with inverses every ten steps."""
    return lambda reports, workload, row: quotient(
        number(reports.get(workload), rival, *MEAN), number(reports.get(workload), row, *MEAN)
    )


def cheaper_than(rival: str) -> Measure:
    """What a mean step of ``rival`` is over one of SGD in JAX, over what ours is over one of SGD in torch."""

    def measure(reports: Reports, workload: str, row: str) -> float | None:
        theirs, ours = over(JAX_SGD, MEAN, MEAN), over(SGD, MEAN, MEAN)
        return quotient(theirs(reports, workload, rival), ours(reports, workload, row))

    return measure


def state_beyond(reports: Reports, workload: str, row: str) -> float | None:
    """What we keep beyond AdamW's state, over AdamW's state."""
    report = reports.get(f"{workload}-apart")
    ratio = quotient(number(report, row, "state_bytes"), number(report, ADAMW, "state_bytes"))
    return None if ratio is None else ratio - 1


PLAIN, FACTOR, UPDATE = ("plain_step", "median"), ("factor_step", "median"), ("update_plain", "median")
MEAN, RARE = ("amortised", "10"), ("amortised", "100")


def alike(workloads: Sequence[str], limit: float) -> dict[str, float]:
    return dict.fromkeys(workloads, limit)


def both_schedules(
    rival: str, title: str, workloads: Sequence[str], limit: float, measure: Callable[[str], Measure]
) -> tuple[Goal, Goal]:
    """Goals beside a rival's two rows: with factors every ten steps, and with factors in every step."""
    limits, seldom, often = alike(workloads, limit), measure(rival), measure(f"{rival}, factors every step")
    every_step = f"{title}, mean step, factors every step and inverses every 10"
    return (
        Goal(
            f"{title}, mean step, factors and inverses every 10", limits, seldom, WITH_ROUNDED, at_least=True
        ),
        Goal(every_step, limits, often, ALWAYS, at_least=True),
    )


GOALS = (
    Goal("plain step over AdamW's", alike(ALL, 1.02), over(ADAMW, PLAIN, PLAIN), WITH_ROUNDED),
    Goal(
        "mean step at frequency 100 over AdamW's", alike(REAL, 1.05), over(ADAMW, RARE, PLAIN), WITH_ROUNDED
    ),
    Goal(
        "factor step, refresh included, over plain step",
        alike(ALL, 1.25),
        within(FACTOR, PLAIN),
        WITH_ROUNDED,
    ),
    Goal(
        "factors and refresh: share of the floor's rate",
        alike(ALL, 0.8),
        share("factors + refresh"),
        BOTH,
        at_least=True,
    ),
    Goal(
        "factors alone: share of the floor's rate",
        alike(ALL, 0.8),
        share("factors"),
        {"drop-in": DROP_IN, "functional": EVERY_STEP},
        at_least=True,
    ),
    Goal("update over fused AdamW's", alike(LARGE, 2.0), over(ADAMW, UPDATE, UPDATE), {"drop-in": DROP_IN}),
    *(
        goal
        for rival in HOOKED
        for goal in both_schedules(rival, f"{rival} over ours", ALL, 3.0, faster_than)
    ),
    *both_schedules(KFAC_JAX, "kfac-jax over ours", IN_JAX, 1.0, faster_than),
    *both_schedules(KFAC_JAX, "kfac-jax over ours, each over its framework's SGD", IN_JAX, 1.0, cheaper_than),
    Goal(
        "mean step, factors every step and inverses every 10, over SGD's",
        {"mlp": 2.5, "cnn": 3.0, "transformer": 1.3},
        over(SGD, MEAN, PLAIN),
        ALWAYS,
    ),
    Goal("mean step at frequency 10 over SGD's", alike(SMALL, 1.1), over(SGD, MEAN, PLAIN), WITH_ROUNDED),
    Goal(
        "mean step of Eva, vectors every step, over SGD's",
        {"mlp": 1.2, "cnn": 1.2, "transformer": 1.0},
        over(SGD, MEAN, PLAIN),
        {"functional": EVA},
    ),
    Goal("state beyond AdamW's over AdamW's", alike(ALL, 1.0), state_beyond, BOTH),
)


# --- the table ---------------------------------------------------------------------------------------


def compare(reports: Reports, device: str) -> Report:
    """Every goal of every workload that any report speaks of."""
    lines = [line(goal, workload, reports) for goal in GOALS for workload in goal.limits]
    measured = {line["workload"] for line in lines if line["measured"]}
    return {
        "title": "Goals",
        "settings": {"device": device},
        "machines": {name: report["machine"] for name, report in reports.items()},
        "rows": [line for line in lines if line["workload"] in measured],
    }


def line(goal: Goal, workload: str, reports: Reports) -> dict[str, Any]:
    values = {door: goal.measure(reports, workload, row) for door, row in goal.doors.items()}
    known = {door: value for door, value in values.items() if value is not None}
    return {
        "goal": goal.title,
        "workload": workload,
        "limit": goal.limits[workload],
        "at_least": goal.at_least,
        "doors": list(goal.doors),
        "measured": known,
        "met": {door: goal.met(workload, value) for door, value in known.items()},
    }


def markdown(report: Report) -> str:
    """The table, and when its numbers were measured."""
    head = ["goal", "model", "limit", *WITH_ROUNDED]
    lines = [_cells(row) for row in report["rows"]]
    met = [each for row in report["rows"] for each in row["met"].values()]
    dates = [
        f"{name} {facts['date']} (torch {facts['torch']}, threads {facts['threads']}, load "
        f"{facts['load before and after']})"
        for name, facts in report["machines"].items()
    ]
    return f"{sum(met)} of {len(met)} met. Measured: {'; '.join(dates)}.\n\n{table(head, lines, texts=2)}\n"


def _cells(row: Mapping[str, Any]) -> list[str]:
    sign = "at least" if row["at_least"] else "at most"
    return [
        row["goal"],
        row["workload"],
        f"{sign} {row['limit']:g}",
        *(_cell(row, door) for door in WITH_ROUNDED),
    ]


def _cell(row: Mapping[str, Any], door: str) -> str:
    if door not in row["doors"]:
        return "-"
    if door not in row["measured"]:
        return "not measured"
    return f"{row['measured'][door]:.2f} {'met' if row['met'][door] else '**not met**'}"


def read(folder: Path, device: str) -> dict[str, Report]:
    """All reports of one device, by workload."""
    found: dict[str, Report] = {}
    for path in sorted(folder.glob(f"*-{device}.json")):
        found |= json.loads(path.read_text())
    return {name: report for name, report in found.items() if name.removesuffix("-apart") in ALL}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--results", type=Path, default=HERE / "results", help="the folder of reports, and of the table"
    )
    parser.add_argument("--json", type=Path, help="write the numbers there, and nothing under results/")
    settings = parser.parse_args(arguments)
    report = compare(read(settings.results, settings.device), settings.device)
    publish({"goals": report}, settings.results, settings.json, markdown)


if __name__ == "__main__":
    main()
