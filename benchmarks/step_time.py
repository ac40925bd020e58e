"""Time one training step of every contender, side by side in one run.

    python benchmarks/step_time.py

A round gives every contender ten steps in a row, in an order that changes from round to round, so that
whatever else the machine does hits all alike. The first step of the ten is not counted (caches are
another contender's); one of the rest is a factor step. Rounds end after ``--rounds`` or ``--seconds``.
"""

import argparse
import copy
import datetime
import math
import os
import platform
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import torch
from contenders import FREQUENCY, OURS, WITH_OPTIONS, Contender, Entrant
from floors import floors
from from_study import WithLoss, classifier
from kfac_jax_rows import Elsewhere
from kfac_jax_rows import rows as kfac_jax
from peers import PEERS
from tables import Report, Timing, publish, summarise
from workloads import WORKLOADS, Batch, Workload

from thor_fx.rates import measured_rates

HERE = Path(__file__).parent
DEFAULT = ("mlp", "cnn", "transformer")
FACTOR_STEP = FREQUENCY // 2  # its place in a round
FEWEST = 2  # rounds
COMPILING = 0.7  # of the budget: what is left is for rounds
NO_TIME = "no time left"
GROUPS = tuple(dict.fromkeys(entrant.group for entrant in (*OURS, *PEERS)))
BACKENDS = ("inductor", "aot_eager", "eager")


class Watch:
    """Marks in time: on the device's clock, where work is queued there."""

    def __init__(self, device: torch.device) -> None:
        self._on_device = device.type == "cuda"
        self._marks: list = []

    def mark(self) -> None:
        if self._on_device:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def laps(self) -> tuple[float, ...]:
        """The ms between marks; waits for the last."""
        if not self._on_device:
            return tuple(1e3 * (stop - start) for start, stop in pairwise(self._marks))
        self._marks[-1].synchronize()
        return tuple(start.elapsed_time(stop) for start, stop in pairwise(self._marks))


def main(arguments: Sequence[str] | None = None) -> None:
    settings = parse(arguments)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.set_float32_matmul_precision(settings.precision)
    names = settings.model or DEFAULT
    ending = "-options" if settings.options else ""
    reports: dict[str, Report] = {}
    for name in names:
        reports[f"{name}{ending}"] = report(name, settings)
        publish(reports, settings.results, settings.json)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument(
        "--model", action="append", choices=WORKLOADS, help=f"may be repeated; {', '.join(DEFAULT)}"
    )
    parser.add_argument("--group", action="append", choices=GROUPS, help="of rows; may be repeated; all")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="of torch; its own default")
    parser.add_argument("--rounds", type=int, default=30, help="of ten steps per contender")
    parser.add_argument("--seconds", type=float, default=60, help="after which no round begins, per model")
    parser.add_argument(
        "--budget",
        type=float,
        default=math.inf,
        help="seconds with compilation, per model",
    )
    parser.add_argument("--precision", default="highest", choices=("highest", "high"), help="of products")
    parser.add_argument("--quick", action="store_true", help="two rounds: to see that it works")
    parser.add_argument("--backend", default="inductor", choices=BACKENDS, help="for all that is compiled")
    parser.add_argument("--options", action="store_true", help="what every option of thor_fx.thor costs")
    parser.add_argument("--only", action="append", metavar="ROW", help="beside AdamW; may be repeated")
    parser.add_argument(
        "--kfac-jax-python", type=Path, help="the Python that has kfac-jax; without it, no rows of it"
    )
    parser.add_argument("--json", type=Path, help="write the numbers there, and nothing under results/")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="the folder of results")
    settings = parser.parse_args(arguments)
    if settings.quick:
        settings.rounds = FEWEST
    return settings


def report(name: str, settings: argparse.Namespace) -> Report:
    """Time all contenders on one workload."""
    torch.manual_seed(0)
    workload, device = WORKLOADS[name], torch.device(settings.device)
    before, beginning = os.getloadavg()[0], time.monotonic()
    x, y = (part.to(device) for part in workload.batch())
    speed = measured_rates(device, scale=16 if settings.quick else 1)
    last_start = beginning + COMPILING * settings.budget
    entered = started(chosen(settings), workload, (x, y), settings.backend, last_start)
    contenders = {label: entry for label, entry in entered.items() if not isinstance(entry, str)}
    left = beginning + settings.budget - time.monotonic()
    timings = measure(contenders, (x, y), settings.rounds, min(settings.seconds, left))
    for contender in contenders.values():
        if isinstance(contender, Elsewhere):
            contender.close()
    rows = summarise(timings, {label: why for label, why in entered.items() if isinstance(why, str)})
    rows = {label: rows[label] for label in entered}
    return {
        "title": f"{name}: {workload.title}",
        "machine": machine(device, before),
        "settings": {
            "device": settings.device,
            "backend": settings.backend,
            "precision": settings.precision,
            "rounds": len(next(iter(timings.values()))) // (FREQUENCY - 1),
        },
        "rates": asdict(speed),
        "rows": rows,
        "floors": floors(workload, (x, y), rows, speed),
    }


def chosen(settings: argparse.Namespace) -> list[Entrant]:
    """Who takes part; AdamW always does."""
    if settings.options:
        return [e for e in WITH_OPTIONS if e.group == "baseline" or wanted(e, settings)]
    groups = settings.group or GROUPS
    everybody = (*OURS, *PEERS, *kfac_jax(settings.kfac_jax_python, settings.device))
    return [e for e in everybody if e.group == "baseline" or (e.group in groups and wanted(e, settings))]


def wanted(entrant: Entrant, settings: argparse.Namespace) -> bool:
    return settings.only is None or entrant.label in settings.only


def started(
    entrants: Sequence[Entrant], workload: Workload, batch: Batch, backend: str, last_start: float
) -> dict[str, Contender | str]:
    """All that run, compiled, each with its own copy of one model; or why they do not.

    After ``last_start`` none but the first is compiled.
    """
    model = classifier(workload.build()).to(batch[0].device)
    found: dict[str, Contender | str] = {}
    for entrant in entrants:
        late = found and time.monotonic() > last_start
        own = copy.deepcopy(model)
        found[entrant.label] = NO_TIME if late else start(entrant, own, workload, batch, backend)
    return found


def start(
    entrant: Entrant, model: WithLoss, workload: Workload, batch: Batch, backend: str
) -> Contender | str:
    """One contender, or why there is none; an error of ours is raised, one of a peer's is its row."""
    if why := entrant.absent(workload):
        return why
    say(f"compiling {entrant.label}")
    try:
        contender = entrant.enter(model, workload, batch, backend)
        warm_up(contender, batch)
    except torch.OutOfMemoryError:
        return "out of memory"
    except Exception as error:
        if entrant.group != "peers":
            raise
        traceback.print_exc()
        return f"failed: {type(error).__name__}"
    return contender


def warm_up(contender: Contender, batch: Batch) -> None:
    """Compile both kinds of step, and stop where a round starts."""
    for _ in range(FREQUENCY + FREQUENCY - FACTOR_STEP - contender.lead):
        contender.step(*batch, mark=lambda: None)


def measure(
    contenders: Mapping[str, Contender], batch: Batch, rounds: int, limit: float
) -> dict[str, list[Timing]]:
    """The counted steps of every contender."""
    timings: dict[str, list[Timing]] = {label: [] for label in contenders}
    start = time.perf_counter()
    for number in range(rounds):
        if number >= FEWEST and time.perf_counter() - start > limit:
            break
        say(f"round {number + 1} of {rounds}")
        for label in rotated(list(contenders), number):
            timings[label] += run_round(contenders[label], batch)
    return timings


def run_round(contender: Contender, batch: Batch) -> list[Timing]:
    if isinstance(contender, Elsewhere):
        laps = [(ms,) for ms in contender.steps(FREQUENCY)]
    else:
        watches = [timed_step(contender, batch) for _ in range(FREQUENCY)]
        laps = [watch.laps() for watch in watches]
    return [Timing(contender.second_order and i == FACTOR_STEP, each) for i, each in enumerate(laps) if i > 0]


def timed_step(contender: Contender, batch: Batch) -> Watch:
    watch = Watch(batch[0].device)
    watch.mark()
    contender.step(*batch, mark=watch.mark)
    return watch


def rotated(labels: Sequence[str], number: int) -> list[str]:
    start = number % len(labels)
    return [*labels[start:], *labels[:start]]


def machine(device: torch.device, load: float) -> dict[str, str]:
    """What the numbers depend on."""
    facts = {
        "CPU": cpu_name(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "load before and after": f"{load:.1f} and {os.getloadavg()[0]:.1f}",
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if device.type == "cuda":
        facts |= {"GPU": torch.cuda.get_device_name(device), "CUDA": str(torch.version.cuda)}
    return facts


def cpu_name() -> str:
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
