"""Both doors side by side: what a step takes in time and in memory.

    python benchmarks/doors.py

Every door of every model runs in a process of its own. A plain step is forward, backward and update with the
inverses of an earlier step; a factor step also computes factors and inverses. Peak memory is what the
process holds at most beyond what it held before the step: parameters, state and the batch are there before,
so it is activations, gradients and what kernels need while they run, on either door, whoever allocates it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from contenders import DROP_IN, FREQUENCY, FUNCTIONAL, OURS
from from_study import classifier
from layer_cost import milliseconds, peak_megabytes
from step_time import BACKENDS, machine
from tables import record
from workloads import WORKLOADS

HERE = Path(__file__).parent
LABELS = {"drop-in": DROP_IN, "functional": FUNCTIONAL}
DOORS = {door: entrant for door, label in LABELS.items() for entrant in OURS if entrant.label == label}
Numbers = dict[str, float]


def measure(name: str, door: str, backend: str, rounds: int) -> Numbers:
    """Milliseconds and peak megabytes of both kinds of step; called in a process of its own."""
    torch.manual_seed(0)
    workload = WORKLOADS[name]
    batch = workload.batch()
    contender = DOORS[door].enter(classifier(workload.build()), workload, batch, backend)

    def step() -> None:
        contender.step(*batch, mark=lambda: None)

    for _ in range(FREQUENCY):  # compiles both kinds
        step()
    times = [[milliseconds(step) for _ in range(FREQUENCY)] for _ in range(rounds)]
    peaks = [[peak_megabytes(step) for _ in range(FREQUENCY)] for _ in range(min(rounds, 3))]
    numbers: Numbers = {}
    for unit, measured in (("ms", times), ("MB", peaks)):
        plain = [value for row in measured for value in row[1:]]
        numbers |= {f"plain {unit}": statistics.median(plain), f"plain {unit}, least": min(plain)}
        numbers |= {f"factor {unit}": statistics.median(row[0] for row in measured)}
    return numbers


def measure_apart(name: str, door: str, settings: argparse.Namespace) -> Numbers:
    command = [sys.executable, __file__, "--model", name, "--one", door, "--backend", settings.backend]
    command += ["--rounds", str(settings.rounds), "--threads", str(settings.threads)]
    ran = subprocess.run(command, capture_output=True, check=True, text=True)
    numbers: Numbers = json.loads(ran.stdout)
    return numbers


def table(report: Mapping[str, Any]) -> str:
    """The report in Markdown."""
    facts = "; ".join(f"{key} {value}" for key, value in {**report["machine"], **report["settings"]}.items())
    lines = [
        f"{facts}.",
        "",
        "| model | door | plain step ms | (least) | factor step ms | plain step MB | factor step MB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    columns = ("plain ms", "plain ms, least", "factor ms", "plain MB", "factor MB")
    for name, doors in report["models"].items():
        for door, numbers in doors.items():
            cells = " | ".join(f"{numbers[column]:.1f}" for column in columns)
            lines.append(f"| {name} | {door} | {cells} |")
    return "\n".join(lines) + "\n"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument(
        "--model", action="append", choices=WORKLOADS, help="may be repeated; cnn and transformer"
    )
    parser.add_argument("--backend", default="inductor", choices=BACKENDS)
    parser.add_argument("--rounds", type=int, default=10, help="of ten steps, one of them a factor step")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the numbers there, and nothing under results/")
    parser.add_argument("--one", choices=DOORS, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    settings = parse(arguments)
    torch.set_num_threads(settings.threads)
    names = settings.model or ["cnn", "transformer"]
    if settings.one:
        print(json.dumps(measure(names[0], settings.one, settings.backend, settings.rounds)))
        return
    load = os.getloadavg()[0]
    models = {name: {door: measure_apart(name, door, settings) for door in DOORS} for name in names}
    report = {
        "machine": machine(torch.device("cpu"), load),
        "settings": {"backend": settings.backend, "rounds": settings.rounds},
        "models": models,
    }
    print(table(report))
    if settings.json:
        settings.json.write_text(json.dumps(report, indent=2) + "\n")
    else:
        save(report)


def save(report: Mapping[str, Any]) -> None:
    record(HERE / "results", "doors-cpu", table(report), json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
