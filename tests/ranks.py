"""Runs of several ranks on this machine, and what each of them returned."""

import fcntl
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from training import Parameters, identical

SCRIPT = Path(__file__).with_name("rank_runs.py")
Results = dict[str, list[Any]]


def shared(factory: pytest.TempPathFactory) -> Path:
    """A folder of this session, the same for all of its workers."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def launched(
    script: Path, arguments: Sequence[str], size: int, *, timeout: float = 540, options: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """``torchrun`` on the loopback device, bounded in time."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}",
        *options, str(script), *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        try:
            texts = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()  # it ends its ranks; killed, it would leave them
            process.wait()
            raise
    return subprocess.CompletedProcess(command, process.returncode, *texts)


def run_on_ranks(names: Sequence[str], size: int, folder: Path, script: Path = SCRIPT) -> Results:
    """What every rank returned of each run of a script, or the text of the error that it raised.

    Several processes may ask for the same folder: the first one runs, the others wait for it.
    """
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            done = launched(script, [str(folder), *names], size)
            assert done.returncode == 0, done.stderr[-4000:]
            (folder / "done").touch()
    return {
        name: [torch.load(folder / f"{name}.{rank}.pt", weights_only=False) for rank in range(size)]
        for name in names
    }


def all_equal(results: list[Any]) -> list[Parameters]:
    """What all ranks returned, which is the same."""
    for result in results:
        assert not isinstance(result, str), result
    first, *others = results
    for other in others:
        assert all(map(identical, first, other))
    return first
