"""One run: one optimizer, one setting, one seed. Prints its record as one line of JSON.

``python benchmarks/convergence/run.py --task gpt --optimizer adamw --setting '{"lr": 0.003}' --seed 0``
"""

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from data import folder_of
from networks import WithLoss, outputs_and_loss
from optimizers import OPTIMIZERS
from tasks import TASKS, Batch, Data, Task
from torch import Tensor

WARM_UP = 0.05  # of all steps
LIMIT_S = 600.0  # of steps, on the CPU
DIVERGED = 3.0  # times the first loss

Record = dict[str, Any]


def rate(step: int, steps: int) -> float:
    """The schedule of all: a linear warm-up over 5 % of the steps, then half a cosine down to zero."""
    warm = math.ceil(WARM_UP * steps)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def run(
    task: Task,
    optimizer: str,
    setting: dict[str, Any],
    seed: int,
    folder: Path,
    backend: str = "inductor",
    limit_s: float = LIMIT_S,
) -> Record:
    """Train once.

    Returns:
        what was asked for (``task``, ``optimizer``, ``setting``, ``seed``, ``protocol``), and what came out:
        ``status`` ("done", "diverged" or "out of time"), ``losses`` of every step, ``wall_ms`` and ``cpu_ms``
        of every step without compilation, ``compile_s``, ``valid_loss`` and ``valid_accuracy`` (None where it
        has no meaning).
    """
    source = task.load(folder)
    torch.manual_seed(seed)
    model = task.build()
    contender = OPTIMIZERS[optimizer].make(model, task, dict(setting), backend)
    losses: list[float] = []
    wall: list[float] = []
    cpu: list[float] = []
    status = "done"
    for step, indices in enumerate(task.batches(source, seed)):
        batch = source.draw(indices)
        before = time.perf_counter(), time.process_time()
        loss = float(contender.step(*batch, rate(step, task.steps)))
        wall.append(time.perf_counter() - before[0])
        cpu.append(time.process_time() - before[1])
        losses.append(loss)
        if not loss <= DIVERGED * losses[0]:
            status = "diverged"
            break
        if sum(cpu) > limit_s:
            status = "out of time"
            break
    first = max(2, contender.period)
    asked = {
        "task": task.name,
        "protocol": task.protocol,
        "optimizer": optimizer,
        "setting": setting,
        "seed": seed,
    }
    asked["where"] = f"{cpu_name()}, torch {torch.__version__}"
    times = {"wall_ms": in_ms(steady(wall, first)), "cpu_ms": in_ms(steady(cpu, first))}
    compile_s = round(max(0.0, sum(wall) - sum(steady(wall, first))), 2)
    load = round(os.getloadavg()[0], 1)
    lost = {"losses": [shortened(loss) for loss in losses], **times, "compile_s": compile_s, "load": load}
    return {**asked, "status": status, **validate(task, model, source), **lost}


def steady(times: Sequence[float], first: int) -> list[float]:
    """The times without compilation: the ``first`` steps get the times of the ``first`` steps after them."""
    again = times[first : 2 * first]
    return [*again, *times[len(again) :]]


def validate(task: Task, model: WithLoss, source: Data) -> Record:
    """Loss and accuracy on the held-out data, from a fresh copy that no compiler has seen."""
    fresh = task.build()
    fresh.load_state_dict(model.state_dict())
    fresh.eval()
    scores = [score(fresh, batch) for batch in source.validation]
    loss = sum(loss for loss, _ in scores) / len(scores)
    accuracies = [accuracy for _, accuracy in scores if accuracy is not None]
    accuracy = shortened(sum(accuracies) / len(accuracies)) if accuracies else None
    return {"valid_loss": shortened(loss), "valid_accuracy": accuracy}


def score(model: WithLoss, batch: Batch) -> tuple[float, float | None]:
    outputs, loss = outputs_and_loss(model, *batch)
    return float(loss), hits(outputs, batch[1])


def hits(outputs: Tensor, y: Tensor) -> float | None:
    return None if y.is_floating_point() else float((outputs.argmax(-1) == y).double().mean())


def shortened(value: float) -> float | None:
    """Five digits; None where JSON has no number for it."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def cpu_name() -> str:
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def in_ms(seconds: Sequence[float]) -> list[float]:
    return [round(1000 * s, 2) for s in seconds]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, required=True)
    parser.add_argument("--setting", type=json.loads, required=True, help="keyword arguments, in JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", help="folder of the data; default: the environment variable THOR_FX_DATA")
    parser.add_argument("--backend", default="inductor")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    folder = folder_of(asked.data)
    print(
        json.dumps(run(TASKS[asked.task], asked.optimizer, asked.setting, asked.seed, folder, asked.backend))
    )


if __name__ == "__main__":
    main()
