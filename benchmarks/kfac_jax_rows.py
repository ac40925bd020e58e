"""Rows of kfac-jax, which is not of torch: every one runs in a process of its own, with its own Python.

The process (``kfac_jax_steps.py``) waits for its turn, takes as many steps as it is told and says how long
each took, by its own clock. So its rounds are among those of all others.
"""

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contenders import DAMPING, FREQUENCY, LR, MOMENTUM, Contender, Entrant, Mark
from from_study import WithLoss
from torch import Tensor, get_num_threads
from workloads import WORKLOADS, Batch, Workload

SCRIPT = Path(__file__).parent / "kfac_jax_steps.py"
WRITTEN = ("mlp", "cnn", "transformer", "gpt", "tiny")
"""The models that ``kfac_jax_models.py`` has."""

JAX_SGD, KFAC_JAX = "JAX, SGD-momentum", "kfac-jax"
KFAC_JAX_EVERY_STEP = "kfac-jax, factors every step"

SGD_SETTINGS = {"lr": LR, "momentum": MOMENTUM}
SETTINGS: dict[str, dict[str, float]] = {
    JAX_SGD: SGD_SETTINGS,
    KFAC_JAX: {
        **SGD_SETTINGS, "damping": DAMPING, "frequency": FREQUENCY,
        "factor_frequency": FREQUENCY, "factor_decay": 0.0,
    },
    KFAC_JAX_EVERY_STEP: {
        **SGD_SETTINGS, "damping": DAMPING, "frequency": FREQUENCY,
        "factor_frequency": 1, "factor_decay": 0.9,
    },
}  # fmt: skip
"""What each row trains with: the numbers of ours."""


class Elsewhere:
    """A contender in another process, started by ``command``; its model has to have ``parameters``."""

    lead = 0

    def __init__(self, command: list[str], parameters: int, *, second_order: bool) -> None:
        self.second_order = second_order
        pipe = subprocess.PIPE
        surroundings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, bufsize=1, env=surroundings
        )
        found = self._answer()["parameters"]
        if found != parameters:
            self.close()
            raise ValueError(f"the model elsewhere has {found} parameters, not {parameters}")

    def step(self, x: Tensor, y: Tensor, mark: Mark) -> None:
        self.steps(1)

    def steps(self, count: int) -> list[float]:
        """Take some steps there; the ms of each."""
        self._process.stdin.write(f"{count}\n")
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def _answer(self) -> Any:
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise RuntimeError(f"the process ended: {self._process.args}")
        return json.loads(line)


def rows(python: Path | None, device: str) -> tuple[Entrant, ...]:
    """The entrants that run with ``python``, where JAX and kfac-jax are installed."""
    return tuple(_entrant(label, settings, python, device) for label, settings in SETTINGS.items())


def _entrant(label: str, settings: Mapping[str, float], python: Path | None, device: str) -> Entrant:
    def make(model: WithLoss, workload: Workload, batch: Batch, backend: str) -> Contender:
        parameters = sum(p.numel() for p in model.parameters())
        return Elsewhere(command(python, workload, settings), parameters, second_order="damping" in settings)

    def absent(workload: Workload) -> str | None:
        if python is None:
            return "give --kfac-jax-python"
        if not python.exists():
            return f"no such Python: {python}"
        if device != "cpu":
            return "on a CPU only"
        return None if name_of(workload) in WRITTEN else "not written for this model"

    return Entrant(label, "peers", make, absent)


def command(python: Path | None, workload: Workload, settings: Mapping[str, float]) -> list[str]:
    """What starts the process, with as many threads as torch has."""
    return [str(python), str(SCRIPT), name_of(workload), str(get_num_threads()), json.dumps(settings)]


def name_of(workload: Workload) -> str:
    return next(name for name, known in WORKLOADS.items() if known is workload)
