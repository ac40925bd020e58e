"""The whole study: a search for every optimizer on every task, then fresh seeds of the best setting.

Every run has a process of its own with one thread, and is written down as soon as it ends; the same command
continues where it was stopped. At the end the report is made.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import report
import torch
from data import VARIABLE, folder_of
from optimizers import OPTIMIZERS
from run import run
from runs import FILE, TUNING_SEED, Plan, Record, Runs, Setting, finals, tuning
from tasks import TASKS, Task

HERE = Path(__file__).parent
STAGES = ("tuning", "seeds")
SMOKE = {"tasks": ["smoke"], "optimizers": ["adamw", "sgd", "thor", "recommended"]}


@dataclass(frozen=True)
class Executor:
    """How a single run is run: in a process of its own, or in this one."""

    folder: Path
    backend: str
    own_process: bool

    def __call__(self, task: Task, optimizer: str, setting: Setting, seed: int) -> Record:
        if self.own_process:
            return self._elsewhere(task, optimizer, setting, seed)
        torch.compiler.reset()
        return run(task, optimizer, setting, seed, self.folder, self.backend)

    def _elsewhere(self, task: Task, optimizer: str, setting: Setting, seed: int) -> Record:
        command = [sys.executable, str(HERE / "run.py"), "--task", task.name, "--optimizer", optimizer]
        command += ["--setting", json.dumps(setting), "--seed", str(seed)]
        command += ["--data", str(self.folder), "--backend", self.backend]
        ended = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        if ended.returncode == 0:
            return json.loads(ended.stdout.splitlines()[-1])
        if ended.returncode < 0:  # says nothing about the optimizer, so it is no result
            raise RuntimeError(
                f"a run was killed by signal {-ended.returncode}: start the study again to go on"
            )
        lines = ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"]
        asked = {
            "task": task.name,
            "protocol": task.protocol,
            "optimizer": optimizer,
            "setting": setting,
            "seed": seed,
        }
        return {**asked, "status": "failed", "valid_loss": None, "error": lines[-1][:500]}


class Study:
    """Works through pairs of a task and an optimizer; each pair belongs to one worker at a time."""

    def __init__(self, runs: Runs, plan: Plan, execute: Executor) -> None:
        self._runs, self._plan, self._execute = runs, plan, execute
        self._lock = threading.Lock()

    def work(self, task: Task, optimizer: str, stage: str) -> None:
        """All runs of a stage that are missing."""
        while (job := self._next(task, optimizer, stage)) is not None:
            setting, seed = job
            record = self._execute(task, optimizer, setting, seed)
            with self._lock:
                self._runs.add(record)
            say(record)

    def _next(self, task: Task, optimizer: str, stage: str) -> tuple[Setting, int] | None:
        with self._lock:
            found = tuning(self._runs, task, optimizer, OPTIMIZERS[optimizer].space, self._plan)
            if found.following is not None:
                return (found.following, TUNING_SEED) if stage == "tuning" else None
            if stage == "tuning" or found.best is None:
                return None
            by_seed = finals(self._runs, task, optimizer, found.best, self._plan.seeds)
        missing = [seed for seed, record in by_seed.items() if record is None]
        return (found.best["setting"], missing[0]) if missing else None


def work_through(study: Study, tasks: Sequence[Task], optimizers: Sequence[str], workers: int) -> None:
    """First the searches, then the seeds; the optimizers in their order, so that AdamW's come early."""
    jobs = [(task, name, stage) for stage in STAGES for name in optimizers for task in tasks]
    if workers == 0:
        for job in jobs:
            study.work(*job)
        return
    for stage in STAGES:
        with ThreadPoolExecutor(workers) as pool:
            waiting = [pool.submit(study.work, *job) for job in jobs if job[2] == stage]
            for future in waiting:
                future.result()


def say(record: Record) -> None:
    count = len(record.get("losses", ()))
    each = f"{sum(record['cpu_ms']) / count:.1f} ms per step" if count else record.get("error", "")
    what = [record["task"], record["optimizer"], json.dumps(record["setting"]), f"seed {record['seed']}"]
    print(
        *what, record["status"], f"loss {record['valid_loss']}", each, sep="; ", file=sys.stderr, flush=True
    )


def arguments(command_line: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--task", action="append", choices=TASKS, help="may be repeated; default: the three real ones"
    )
    parser.add_argument(
        "--optimizer", action="append", choices=OPTIMIZERS, help="may be repeated; default: all"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes at a time; 0: no process per run")
    parser.add_argument("--data", help=f"folder of the data; default: the environment variable {VARIABLE}")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--backend", default="inductor", help="of torch.compile and thor_fx")
    parser.add_argument(
        "--smoke", action="store_true", help="a tiny task through all of it, in seconds, eager"
    )
    options = parser.parse_args(command_line)
    if options.smoke:
        options.task, options.backend = SMOKE["tasks"], "eager"
        options.optimizer = options.optimizer or SMOKE["optimizers"]
    return options


def main(command_line: Sequence[str] | None = None) -> None:
    options = arguments(command_line)
    plan = Plan(budget=3, seeds=(1, 2)) if options.smoke else Plan()
    tasks = [TASKS[name] for name in options.task or [name for name in TASKS if name != "smoke"]]
    folder = folder_of(options.data)
    for task in tasks:
        task.load(folder)  # a missing file is told before the first run
    wanted = options.optimizer or list(OPTIMIZERS)
    for name in wanted:
        if not OPTIMIZERS[name].installed:
            print(f"{name}: not installed", file=sys.stderr)
    installed = [name for name in wanted if OPTIMIZERS[name].installed]
    torch.set_num_threads(1)
    execute = Executor(folder, options.backend, own_process=options.workers > 0)
    runs = Runs(options.results / FILE)
    work_through(Study(runs, plan, execute), tasks, installed, options.workers)
    report.write(options.results, tasks, plan)


if __name__ == "__main__":
    main()
