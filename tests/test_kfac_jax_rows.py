"""Rows of kfac-jax: what starts their process, what is read from it, and what is said where there is none."""

import ast
import json
import math
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PROCESS = """#!{python}
import json, sys
from pathlib import Path
name = Path(__file__).with_name("started.jsonl")
with name.open("a") as file:
    print(json.dumps(sys.argv[1:]), file=file)
print(json.dumps({{"parameters": {parameters}}}), flush=True)
taken = 0
for line in sys.stdin:
    times = [70.0 if (taken + i) % 10 == 0 else 2.0 for i in range(int(line))]
    taken += len(times)
    print(json.dumps(times), flush=True)
"""
"""A step in ten takes 70 ms, beginning with the first; all others take 2."""


@pytest.fixture
def on_path(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


def stand_in(folder: Path, parameters: int) -> Path:
    """A Python of sorts, which answers as the process does."""
    file = folder / "python"
    file.write_text(PROCESS.format(python=sys.executable, parameters=parameters))
    file.chmod(0o755)
    return file


def parameters(name: str) -> int:
    from workloads import WORKLOADS

    return sum(p.numel() for p in WORKLOADS[name].build().parameters())


def test_steps_of_another_process_are_rows(tmp_path: Path, on_path: None):
    import step_time
    from kfac_jax_rows import SETTINGS
    from tables import summarise
    from workloads import WORKLOADS

    python = stand_in(tmp_path, parameters("tiny"))
    settings = step_time.parse(["--kfac-jax-python", str(python)])
    entrants = [entrant for entrant in step_time.chosen(settings) if entrant.label in SETTINGS]
    tiny = WORKLOADS["tiny"]
    batch = tiny.batch()
    contenders = step_time.started(entrants, tiny, batch, "eager", math.inf)
    rows = summarise(step_time.measure(contenders, batch, 2, math.inf))
    for contender in contenders.values():
        contender.close()

    assert list(rows) == list(SETTINGS)
    for label in ("kfac-jax", "kfac-jax, factors every step"):
        assert rows[label]["plain_step"] == {"median": 2.0, "min": 2.0, "iqr": 0.0, "count": 16}
        assert rows[label]["factor_step"] == {"median": 70.0, "min": 70.0, "iqr": 0.0, "count": 2}
        assert rows[label]["amortised"]["10"] == pytest.approx(8.8)
    assert rows["JAX, SGD-momentum"]["plain_step"]["count"] == 18
    assert rows["JAX, SGD-momentum"]["factor_step"] is None
    started = [json.loads(line) for line in (tmp_path / "started.jsonl").read_text().splitlines()]
    threads = str(torch.get_num_threads())
    for words, expected in zip(started, SETTINGS.values(), strict=True):
        assert Path(words[0]).name == "kfac_jax_steps.py"
        assert words[1:3] == ["tiny", threads]
        assert json.loads(words[3]) == expected


@pytest.mark.parametrize(("answers", "why"), [(True, "failed: ValueError"), (False, "failed: RuntimeError")])
def test_another_model_and_a_process_that_ends_are_errors_in_the_row(
    tmp_path: Path, on_path: None, answers: bool, why: str
):
    import step_time
    from kfac_jax_rows import rows
    from step_time import classifier
    from workloads import WORKLOADS

    python = stand_in(tmp_path, parameters("tiny") + 1) if answers else Path("/bin/true")
    tiny = WORKLOADS["tiny"]
    for row in rows(python, "cpu"):
        assert step_time.start(row, classifier(tiny.build()), tiny, tiny.batch(), "eager") == why


def test_settings_are_those_of_ours(on_path: None):
    from contenders import DAMPING, FREQUENCY, LR, MOMENTUM, OURS
    from kfac_jax_rows import JAX_SGD, KFAC_JAX, KFAC_JAX_EVERY_STEP, SETTINGS

    for settings in SETTINGS.values():
        assert (settings["lr"], settings["momentum"]) == (LR, MOMENTUM)
    assert "damping" not in SETTINGS[JAX_SGD]
    for label in (KFAC_JAX, KFAC_JAX_EVERY_STEP):
        assert (SETTINGS[label]["damping"], SETTINGS[label]["frequency"]) == (DAMPING, FREQUENCY)
    assert SETTINGS[KFAC_JAX]["factor_frequency"] == FREQUENCY
    (ours,) = (entrant.settings for entrant in OURS if entrant.label == "thor_fx, factors every step")
    theirs = SETTINGS[KFAC_JAX_EVERY_STEP]
    assert (theirs["factor_frequency"], theirs["factor_decay"]) == (ours["frequency"], ours["factor_decay"])


@pytest.mark.parametrize(
    ("python", "device", "model", "why"),
    [
        (None, "cpu", "mlp", "give --kfac-jax-python"),
        (Path("/nowhere/python"), "cpu", "mlp", "no such Python: /nowhere/python"),
        (Path(sys.executable), "cuda", "mlp", "on a CPU only"),
        (Path(sys.executable), "cpu", "vit", "not written for this model"),
        (Path(sys.executable), "cpu", "mlp", None),
    ],
)
def test_what_is_missing_is_said(
    on_path: None, python: Path | None, device: str, model: str, why: str | None
):
    from kfac_jax_rows import rows
    from workloads import WORKLOADS

    assert {row.absent(WORKLOADS[model]) for row in rows(python, device)} == {why}


def test_models_that_are_said_to_be_written_are(on_path: None):
    """By their text: JAX is not installed here."""
    from kfac_jax_rows import WRITTEN

    tree = ast.parse((BENCHMARKS / "kfac_jax_models.py").read_text())
    (models,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "MODELS"
    )
    assert tuple(ast.literal_eval(key) for key in models.keys) == WRITTEN


def test_the_process_imports_no_torch(on_path: None):
    for name in ("kfac_jax_steps", "kfac_jax_models"):
        tree = ast.parse((BENCHMARKS / f"{name}.py").read_text())
        imported = [
            ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        assert imported
        assert not [line for line in imported if "torch" in line or "workloads" in line]
