"""What shows only in a process of its own: the time to compile, and memory.

    python benchmarks/apart.py --threads 1

AdamW and thor_fx run in two processes with one fresh cache directory of Inductor: the first compiles cold,
the second warm. The time to compile is that of getting ready and of two steps, which are of both kinds, less
what two such steps take later. The second process also counts what is kept from step to step, beyond
parameters, gradients and buffers, and says how much memory a step holds at most beyond what was held before
it. Peers run once, with what AdamW has compiled.
"""

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from contenders import BASELINE, FREQUENCY, OURS, Contender, Entrant
from from_study import classifier
from layer_cost import peak_megabytes, resident
from peers import FACTORS_ALONE, PEERS
from step_time import BACKENDS, GROUPS, NO_TIME, machine, say
from tables import Report, publish, sentence, table
from torch import Tensor, nn
from workloads import WORKLOADS, Batch

HERE = Path(__file__).parent
ENTRANTS = {entrant.label: entrant for entrant in (*OURS, *PEERS) if entrant.label != FACTORS_ALONE}
COMPILES = {"ours", "variants"}  # groups with graphs of their own

Numbers = dict[str, float]


# --- in a process of its own -------------------------------------------------------------------------


def alone(entrant: Entrant, name: str, device: torch.device, backend: str) -> Numbers:
    """Seconds to compile, bytes that are kept, and peak megabytes of steps without and with curvature."""
    torch.manual_seed(0)
    workload = WORKLOADS[name]
    model = classifier(workload.build()).to(device)
    x, y = (part.to(device) for part in workload.batch())
    start = time.perf_counter()
    contender = entrant.enter(model, workload, (x, y), backend)
    for _ in range(2):
        seconds(contender, (x, y))
    ready = time.perf_counter() - start
    later = [seconds(contender, (x, y)) for _ in range(FREQUENCY - contender.lead)]
    kept = bytes_kept(model, contender, (x, y))
    whole = torch.cuda.max_memory_allocated() / 2**20 if x.is_cuda else resident("VmHWM")
    plain, curvature = peaks(contender, (x, y))
    return {
        "compile_s": max(0.0, ready - median(later) - max(later)),
        "state_bytes": kept,
        "parameter_bytes": sum(p.nbytes for p in model.parameters()),
        "plain_mb": plain,
        "curvature_mb": curvature,
        "process_mb": whole,
    }


def seconds(contender: Contender, batch: Batch) -> float:
    start = time.perf_counter()
    contender.step(*batch, mark=lambda: None)
    if batch[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def bytes_kept(model: nn.Module, contender: Contender, batch: Batch) -> int:
    """The bytes of all tensors that are alive, but parameters, buffers and the batch: the optimizer's state.

    Packages keep it in many places, so all objects of the process are looked through.
    """
    params = getattr(contender, "params", {}).values()
    known = storages([*model.parameters(), *model.buffers(), *batch, *params])
    gc.collect()
    alive = (thing for thing in gc.get_objects() if type(thing) in {Tensor, nn.Parameter})
    on_device = [tensor for tensor in alive if tensor.device == batch[0].device]
    return sum(size for place, size in storages(on_device).items() if place not in known)


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Sizes in bytes by address; views of one tensor count once."""
    found = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def peaks(contender: Contender, batch: Batch) -> tuple[float, float]:
    """Megabytes of a plain step (the median) and of one with curvature, of the ten that come next."""
    # NOTE: FREQUENCY + 2 - lead steps have been taken
    peak = peak_on_device if batch[0].is_cuda else peak_megabytes
    found = [peak(contender.step, *batch, lambda: None) for _ in range(FREQUENCY)]
    return median(found[:-2]), found[-2] if contender.second_order else median(found)


def peak_on_device(function: Callable[..., object], *args: object) -> float:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function(*args)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


# --- here ------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    settings = parse(arguments)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if settings.one:
        (name,) = settings.model
        device = torch.device(settings.device)
        print(json.dumps(alone(ENTRANTS[settings.one], name, device, settings.backend)))
        return
    names = settings.model or ["transformer"]
    reports: dict[str, Report] = {}
    for name in names:
        reports[f"{name}-apart"] = report(name, settings)
        publish(reports, settings.results, settings.json, markdown)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--model", action="append", choices=WORKLOADS, help="may be repeated; transformer")
    parser.add_argument("--group", action="append", choices=GROUPS, help="of rows; may be repeated")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="of torch; its own default")
    parser.add_argument("--backend", default="inductor", choices=BACKENDS, help="for all that is compiled")
    parser.add_argument("--once", action="store_true", help="no second process: nothing about warm compiling")
    parser.add_argument(
        "--budget", type=float, default=math.inf, help="seconds, per model; then rows are left"
    )
    parser.add_argument("--json", type=Path, help="write the numbers there, and nothing under results/")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="the folder of results")
    parser.add_argument("--one", choices=ENTRANTS, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def report(name: str, settings: argparse.Namespace) -> Report:
    before = os.getloadavg()[0]
    groups = {"baseline", *(settings.group or ("ours", "peers"))}
    chosen = [entrant for entrant in ENTRANTS.values() if entrant.group in groups]
    deadline = time.monotonic() + settings.budget
    with tempfile.TemporaryDirectory() as folder:
        rows = {e.label: row(e, name, settings, Path(folder), deadline) for e in chosen}
    return {
        "title": f"{name}: {WORKLOADS[name].title}",
        "machine": machine(torch.device(settings.device), before),
        "settings": {"device": settings.device, "backend": settings.backend},
        "rows": rows,
    }


def row(
    entrant: Entrant, name: str, settings: argparse.Namespace, folder: Path, deadline: float
) -> dict[str, Any]:
    """The numbers of one contender, or ``absent``."""
    if why := entrant.absent(WORKLOADS[name]):
        return {"absent": why}
    say(f"{name}: {entrant.label}")
    try:
        return row_of_processes(entrant, name, settings, folder, deadline)
    except subprocess.TimeoutExpired:
        return {"absent": NO_TIME}
    except subprocess.CalledProcessError:  # its error output has been shown
        if entrant.group != "peers":
            raise
        return {"absent": "failed"}


def row_of_processes(
    entrant: Entrant, name: str, settings: argparse.Namespace, folder: Path, deadline: float
) -> dict[str, Any]:
    own = entrant.group in COMPILES
    cache = folder / (entrant.label.replace(" ", "-") if own else "shared")
    first = process(entrant.label, name, settings, cache, deadline)
    if not (own or entrant is BASELINE):
        return {**first, "cold_s": None, "warm_s": None}
    second = first if settings.once else process(entrant.label, name, settings, cache, deadline)
    return {
        **second,
        "cold_s": first["compile_s"],
        "warm_s": None if settings.once else second["compile_s"],
    }


def process(label: str, name: str, settings: argparse.Namespace, cache: Path, deadline: float) -> Numbers:
    command = [sys.executable, __file__, "--one", label, "--model", name, "--device", settings.device]
    command += ["--backend", settings.backend]
    command += ["--threads", str(settings.threads)] if settings.threads else []
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
    left = None if deadline == math.inf else max(0.0, deadline - time.monotonic())
    ran = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, check=True, text=True, timeout=left
    )
    return json.loads(ran.stdout.splitlines()[-1])


def markdown(report: Report) -> str:
    """The table of one report."""
    head = [
        "", "state MB", "over the parameters", "plain step, peak MB", "with curvature, peak MB",
        "process, peak MB", "compile cold s", "compile warm s",
    ]  # fmt: skip
    lines = [[label, *_cells(row)] for label, row in report["rows"].items()]
    return "\n\n".join([f"**{report['title']}**", sentence(report), table(head, lines)]) + "\n"


def _cells(row: dict[str, Any]) -> list[str]:
    if "absent" in row:
        return [row["absent"], *["-"] * 6]
    sizes = [f"{row['state_bytes'] / 2**20:.2f}", f"{row['state_bytes'] / row['parameter_bytes']:.2f}"]
    peaks_mb = [f"{row[key]:.1f}" for key in ("plain_mb", "curvature_mb", "process_mb")]
    return [
        *sizes,
        *peaks_mb,
        *("-" if row[key] is None else f"{row[key]:.1f}" for key in ("cold_s", "warm_s")),
    ]


if __name__ == "__main__":
    main()
