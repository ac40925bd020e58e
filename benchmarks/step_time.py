"""Time one training step of every contender, side by side in one run.

    python benchmarks/step_time.py

A round gives every contender ten steps in a row, in an order that changes from round to round, so that
whatever else the machine does hits all alike. The first step of the ten is not counted (caches are
another contender's); one of the rest is a factor step.
"""

import argparse
import datetime
import os
import platform
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from contenders import FREQUENCY, Contender, contenders, option_contenders
from tables import Report, Timing, as_json, markdown, save, summarise
from torch import Tensor
from workloads import WORKLOADS

HERE = Path(__file__).parent
FACTOR_STEP = FREQUENCY // 2  # its place in a round
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
    names = settings.model or ["mlp", "transformer"]
    ending = "-options" if settings.options else ""
    reports = {f"{name}{ending}": report(name, settings) for name in names}
    for each in reports.values():
        print(markdown(each))
    if settings.json:
        settings.json.write_text(as_json(reports))
    else:
        save(reports, HERE / "results", HERE / "README.md")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument(
        "--model", action="append", choices=WORKLOADS, help="may be repeated; mlp and transformer"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="of torch; its own default")
    parser.add_argument("--rounds", type=int, default=30, help="of ten steps per contender")
    parser.add_argument("--quick", action="store_true", help="three rounds: to see that it works")
    parser.add_argument("--backend", default="inductor", choices=BACKENDS, help="for all that is compiled")
    parser.add_argument("--options", action="store_true", help="what every option of thor_fx.thor costs")
    parser.add_argument("--json", type=Path, help="write the numbers there, and nothing under results/")
    settings = parser.parse_args(arguments)
    if settings.quick:
        settings.rounds = 3
    return settings


def report(name: str, settings: argparse.Namespace) -> Report:
    """Time all contenders on one workload."""
    torch.manual_seed(0)
    workload = WORKLOADS[name]
    before = os.getloadavg()[0]
    x, y = (part.to(settings.device) for part in workload.batch())
    enter = option_contenders if settings.options else contenders
    rows = summarise(measure(enter(workload, (x, y), settings.backend), (x, y), settings.rounds))
    return {
        "title": f"{name}: {workload.title}",
        "machine": machine(torch.device(settings.device), before),
        "settings": {"device": settings.device, "backend": settings.backend, "rounds": settings.rounds},
        "rows": rows,
    }


def measure(
    entered: Sequence[Contender], batch: tuple[Tensor, Tensor], rounds: int
) -> dict[str, list[Timing]]:
    """The counted steps of every contender."""
    timings: dict[str, list[Timing]] = {contender.label: [] for contender in entered}
    for contender in entered:
        warm_up(contender, batch)
    for number in range(rounds):
        for contender in rotated(entered, number):
            timings[contender.label] += run_round(contender, batch)
    return timings


def warm_up(contender: Contender, batch: tuple[Tensor, Tensor]) -> None:
    """Compile both kinds of step, and stop where a round starts."""
    say(f"compiling {contender.label}")
    for _ in range(FREQUENCY + FREQUENCY - FACTOR_STEP):
        contender.step(*batch, mark=lambda: None)


def run_round(contender: Contender, batch: tuple[Tensor, Tensor]) -> list[Timing]:
    watches = [timed_step(contender, batch) for _ in range(FREQUENCY)]
    return [
        Timing(contender.second_order and i == FACTOR_STEP, watch.laps())
        for i, watch in enumerate(watches)
        if i > 0
    ]


def timed_step(contender: Contender, batch: tuple[Tensor, Tensor]) -> Watch:
    watch = Watch(batch[0].device)
    watch.mark()
    contender.step(*batch, mark=watch.mark)
    return watch


def rotated(entered: Sequence[Contender], number: int) -> list[Contender]:
    start = number % len(entered)
    return [*entered[start:], *entered[:start]]


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
    return facts | ({"GPU": torch.cuda.get_device_name(device)} if device.type == "cuda" else {})


def cpu_name() -> str:
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
