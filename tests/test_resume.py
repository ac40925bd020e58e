"""A training that is killed continues bit by bit: :mod:`resume_runs` has what runs.

``THOR_FX_KILLS=500 pytest -m nightly tests/test_resume.py`` kills more often.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import resume_runs
from resume_runs import CASES, STEPS

Ask = Callable[[str, int, int], dict[str, Any]]

OFTEN = [
    "plain", "async", "by trace", "sampled", "scaled", "adapts", "many", "rounded", "branching by trace",
    "ranks' checkpoint", "functional by trace", "functional many",
]  # fmt: skip
"""Trainings that differ most in what they keep; all of them are killed under ``-m nightly``."""

KILLS = {name: 5 if place < 2 else 4 for place, name in enumerate(OFTEN)}
"""Of every training; all together 50."""

MORE = int(os.environ.get("THOR_FX_KILLS", "250"))


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """A process that trains and kills; see :func:`resume_runs.serve`."""
    command = [sys.executable, resume_runs.__file__]
    folder = tmp_path_factory.mktemp("resume")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=folder, env=environment, **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def answer(case: str, kills: int, seed: int) -> dict[str, Any]:
            process.stdin.write(json.dumps({"case": case, "kills": kills, "seed": seed}) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield answer
        process.stdin.close()


def assert_nothing_was_lost(found: dict[str, Any], kills: int) -> None:
    assert set(found["codes"]) == {0}
    assert found["kills"] == kills
    whole = dict(found["whole"])
    assert list(whole) == list(range(1, STEPS + 1))
    assert len({*whole.values()}) == STEPS, "every step changes something"
    for log in found["logs"]:
        taken = [step for step, _ in log]
        # a process begins where the one before it has got to, or one further: it died before its line
        gaps = [after - before - 1 for before, after in zip([0, *taken], taken, strict=False)]
        assert min(gaps) == 0
        assert sum(gaps) + STEPS - taken[-1] <= kills  # the last one may have died before its line, too
        assert [(step, text) for step, text in log if whole[step] != text] == []


@pytest.mark.parametrize("case", OFTEN)
def test_a_killed_training_continues_bit_by_bit(ask, case):
    assert_nothing_was_lost(ask(case, KILLS[case], list(CASES).index(case)), KILLS[case])


def test_there_are_fifty_kills():
    assert sum(KILLS.values()) == 50


@pytest.mark.fuzz
@pytest.mark.nightly
@pytest.mark.parametrize("case", CASES)
def test_a_training_that_is_killed_often_continues_bit_by_bit(ask, case):
    kills = -(-MORE // len(CASES))
    assert_nothing_was_lost(ask(case, kills, 1000 + list(CASES).index(case)), kills)
