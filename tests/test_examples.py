"""The examples run and lower their loss."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


def run(path: Path, backend: str, cwd: Path) -> str:
    # NOTE: one thread: threads that wait for each other are slow where other tests run beside
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(path), backend]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_are_examples_of_both_doors():
    assert {"drop_in_digits", "functional_digits"} <= {path.stem for path in EXAMPLES}


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.inductor)])
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path, backend: str, tmp_path: Path):
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", run(path, backend, tmp_path))]
    assert len(losses) == 2
    assert losses[1] < losses[0] / 5
