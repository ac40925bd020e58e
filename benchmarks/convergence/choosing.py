"""Which damping, learning rate and frequency: an auto-encoder of small digits, trained a few hundred times.

``python benchmarks/convergence/choosing.py`` writes ``results/choosing.json``; ``choosing_pictures.py`` draws
it. Nothing is downloaded: the digits are scikit-learn's, the network that of ``python -m thor_fx demo``.

Two sweeps for each of two rules: learning rates by dampings, with curvature every 10 steps; then, at the
best of these learning rates, dampings by frequencies. Learning rate and damping are callables, so all runs of
one rule and frequency share one compiled step.
"""

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from run import DIVERGED, cpu_name, rate, shortened
from torch import Tensor
from torch.func import functional_call
from torch.utils import _pytree as pytree

import thor_fx
from thor_fx.demo.tasks import TASKS, Digits, load

Record = dict[str, Any]

STEPS, BATCH, SEEDS = 300, 128, (0, 1)
INTERVAL = 10  # as in the study
FREQUENCIES = (1, 2, 5, 10, 20, 50, 100)
SETTING = ("rule", "frequency", "lr", "damping")
FALLBACK = 0.2  # times the learning rate: what has no factors, under AdamW

RULES: Mapping[str, Mapping[str, Any]] = {
    "thor": {"momentum": 0.9, "damping_rule": "factor"},
    "recommended": {"preset": "recommended"},
}
RATES: Mapping[str, Sequence[float]] = {
    "thor": (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "recommended": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 0.3, 1.0),
}
DAMPINGS: Mapping[str, Sequence[float]] = {
    "thor": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 0.3, 1.0, 3.0),
    "recommended": (1e-2, 3e-2, 1e-1, 0.3, 1.0, 3.0, 10.0),
}


class Trainer:
    """One rule at one frequency: compiled once, run with any learning rate and damping."""

    def __init__(self, rule: str, frequency: int, steps: int, backend: str) -> None:
        task = TASKS[0]
        self._asked = {"rule": rule, "frequency": frequency}
        self._steps = steps
        self._lr, self._damping = 0.0, 0.0
        model = task.model(0)

        def loss_fn(params: dict[str, Tensor], x: Tensor) -> Tensor:
            return task.loss(functional_call(model, params, (x,)), x, x)

        given = dict(RULES[rule])
        if given.get("preset") == "recommended":
            given["fallback_lr"] = lambda step: FALLBACK * self._rate(step)
        self._tx = thor_fx.thor(lr=self._rate, damping=lambda _: self._damping, frequency=frequency, **given)
        self._loss_fn, self._task = loss_fn, task
        self._step = thor_fx.compile_step(loss_fn, self._tx, backend=backend)
        self._params = {name: p.detach() for name, p in model.named_parameters()}
        self._start = self._step.init(self._params, torch.zeros(BATCH, task.widths[0]))

    def __call__(self, digits: Digits, lr: float, damping: float, seed: int) -> Record:
        """Train from the weights and batches of a seed."""
        self._lr, self._damping = lr, damping
        return {**self._asked, "lr": lr, "damping": damping, "seed": seed, **self._run(digits, seed)}

    def _rate(self, step: int) -> float:
        return self._lr * rate(step, self._steps)

    def _run(self, digits: Digits, seed: int) -> Record:
        fresh = self._task.model(seed)
        for name, value in fresh.named_parameters():
            self._params[name].copy_(value.detach())
        params = self._params
        state = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, self._start)
        times: dict[bool, list[float]] = {True: [], False: []}
        losses: list[float] = []
        for step, (x, _) in enumerate(digits.training.batches(BATCH, self._steps, seed)):
            before = time.process_time()
            params, state, out = self._step(params, state, x)
            losses.append(float(out.loss))
            times[self._tx.wants_factors(step)].append(time.process_time() - before)
            if not losses[-1] <= DIVERGED * losses[0]:
                return {"status": "diverged", "loss": None, "factor_ms": None, "plain_ms": None}
        pixels = digits.validation.pixels
        loss = shortened(float(self._loss_fn(params, pixels)))
        return {
            "status": "done",
            "loss": loss,
            "factor_ms": median(times[True]),
            "plain_ms": median(times[False]),
        }


def median(seconds: Sequence[float]) -> float | None:
    """In ms; None of nothing."""
    return shortened(1000 * statistics.median(seconds)) if seconds else None


def sweep(rule: str, steps: int, seeds: Sequence[int], backend: str) -> list[Record]:
    """Both sweeps of one rule."""
    digits = {seed: load(seed, torch.device("cpu")) for seed in seeds}
    trainer = Trainer(rule, INTERVAL, steps, backend)
    grid = itertools.product(RATES[rule], DAMPINGS[rule], seeds)
    found = [trainer(digits[seed], lr, damping, seed) for lr, damping, seed in grid]
    lr = best(found)["lr"]
    for frequency in FREQUENCIES:
        if frequency != INTERVAL:
            trainer = Trainer(rule, frequency, steps, backend)
            pairs = itertools.product(DAMPINGS[rule], seeds)
            found += [trainer(digits[seed], lr, damping, seed) for damping, seed in pairs]
    return found


def best(records: Sequence[Record]) -> Record:
    """The setting with the lowest mean loss over seeds; one that diverges on any seed does not count."""
    return min(means(records), key=lambda record: record["loss"])


def means(records: Sequence[Record]) -> list[Record]:
    """Means over seeds; the loss is infinite where any seed diverged."""
    cells: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        cells.setdefault(tuple(record[name] for name in SETTING), []).append(record)
    return [{**cell[0], "loss": statistics.fmean(map(reached, cell))} for cell in cells.values()]


def reached(record: Record) -> float:
    """The held-out loss at the end."""
    return math.inf if record["loss"] is None else record["loss"]


def main(command_line: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = Path(__file__).parent / "results" / "choosing.json"
    parser.add_argument("--out", type=Path, default=here, help=f"the file of results ({here.name})")
    parser.add_argument("--rule", action="append", choices=RULES, help="may be repeated; default: all")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of every run ({STEPS})")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help=f"how many ({len(SEEDS)})")
    parser.add_argument("--backend", default="inductor", help="of thor_fx.compile_step")
    asked = parser.parse_args(command_line)
    torch.set_num_threads(1)
    began = time.perf_counter()
    runs = []
    for rule in asked.rule or RULES:
        runs += sweep(rule, asked.steps, range(asked.seeds), asked.backend)
        print(f"{rule}: best {best([run for run in runs if run['rule'] == rule])}", flush=True)
    about = {
        "task": f"auto-encoder of 8 x 8 digits, {TASKS[0].widths}, tanh, squared error; batch {BATCH}",
        "steps": asked.steps,
        "where": f"{cpu_name()}, torch {torch.__version__}",
        "rules": {rule: dict(given) for rule, given in RULES.items()},
    }
    lines = ",\n".join(json.dumps(run) for run in runs)
    asked.out.write_text(f'{{"about": {json.dumps(about, indent=1)},\n"runs": [\n{lines}\n]}}\n')
    print(f"{len(runs)} runs in {time.perf_counter() - began:.0f} s: {asked.out}")


if __name__ == "__main__":
    main()
