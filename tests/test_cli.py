"""``python -m thor_fx``: exit codes, messages, and that the demo writes what it promises."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from thor_fx.__main__ import main
from thor_fx.demo.race import CONTENDERS, Curve, Settings, race
from thor_fx.demo.tasks import TASKS, load

PNG = b"\x89PNG"
QUICK = ["demo", "--steps", "6", "--backend", "aot_eager"]


@pytest.fixture(autouse=True)
def _same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_demo_prints_tables_and_saves_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    picture = tmp_path / "loss.png"
    assert main([*QUICK, "--out", str(picture)]) == 0
    printed = capsys.readouterr().out
    for shown in (
        "Auto-encoder",
        "Classifier",
        "ms/step",
        "compile s",
        "refreshes",
        "test errors %",
        str(picture),
    ):
        assert shown in printed
    assert len([line for line in printed.splitlines() if line.startswith("THOR")]) == 1 + 2
    assert picture.read_bytes().startswith(PNG)


def test_demo_runs_as_a_module(tmp_path: Path):
    command = [sys.executable, "-m", "thor_fx", *QUICK, "--clip-all", "--out", "loss.svg"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "gradients clipped" in done.stdout
    assert (tmp_path / "loss.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["train"], "invalid choice: 'train'"),
        (["demo", "--steps", "0"], "--steps: 0 is not positive"),
        (["demo", "--steps", "many"], "--steps: invalid number value: 'many'"),
        (["demo", "--backend", "nvfuser"], "--backend: invalid choice: 'nvfuser'"),
        (["demo", "--device", "abacus"], "--device: cannot use device 'abacus'"),
        (["demo", "--out", "loss.doc"], "--out: 'loss.doc' must end in one of .png, .svg, .pdf"),
        (["demo", "--out", "no/such/loss.png"], "--out: cannot write to the folder of 'no/such/loss.png'"),
    ],
)
def test_bad_arguments_leave_with_2_and_say_why(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_packages_are_named_with_the_command_that_installs_them(monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name)
    )
    with pytest.raises(SystemExit) as left:
        main(["demo"])
    assert left.value.code == 1
    message = capsys.readouterr().err
    assert message == 'the demo needs matplotlib: pip install "thor-fx[examples]"\n'


@pytest.mark.parametrize("make", CONTENDERS, ids=lambda make: make.__name__.strip("_"))
def test_a_run_starts_over(make):
    """Nothing is left behind by other runs: not by their rate, nor by one that diverged or was shorter."""
    digits = load(seed=0, device=torch.device("cpu"))
    contender = make(TASKS[0], digits, Settings(steps=4, seed=0, backend="aot_eager"))
    batches = digits.training.batches(256, 6, seed=0)

    def run(rate: float, steps: int) -> Curve:
        return contender.run(rate, batches[:steps], digits, 3, lambda _steps, _what: None)

    alone = run(0.01, 6)
    assert alone.steps == [0, 2, 4, 6]
    assert alone.losses[-1] < alone.losses[0]
    assert run(1e4, 5).diverged
    again = run(0.01, 6)
    assert again.losses == alone.losses
    assert (again.validation, again.score) == (alone.validation, alone.score)


def test_the_race_takes_the_best_rate_of_the_search():
    digits = load(seed=0, device=torch.device("cpu"))
    advanced = []
    settings = Settings(steps=3, seed=0, backend="eager")
    results = race(TASKS[1], digits, settings, lambda steps, _what: advanced.append(steps))
    assert [result.name for result in results] == ["SGD", "AdamW", "THOR"]
    assert len({result.curve.losses[0] for result in results}) == 1
    assert all(result.rate == min(result.search, key=result.search.get) for result in results)
    assert [result.refreshes for result in results] == [0, 0, 1]
    assert sum(advanced) == settings.planned_steps


def test_a_curve_knows_when_it_was_below_a_loss():
    curve = Curve([0, 5, 10], [0.0, 0.1, 0.2], [4.0, 2.0, 1.0])
    assert curve.first_below(2.0) == (5, 0.1)
    assert curve.first_below(0.5) == (float("inf"), float("inf"))
    assert not curve.diverged
    assert Curve([0, 5], [0.0, 0.1], [4.0, float("nan")]).diverged


def test_the_split_keeps_every_digit_once():
    digits = load(seed=0, device=torch.device("cpu"))
    parts = (digits.training, digits.validation, digits.test)
    assert [len(part.labels) for part in parts] == [1197, 300, 300]
    assert len(torch.cat([part.pixels for part in parts]).unique(dim=0)) == 1797
    batches = digits.training.batches(256, 9, seed=0)
    assert [tuple(pixels.shape) for pixels, _ in batches] == [(256, 64)] * 9
    first_epoch = torch.cat([pixels for pixels, _ in batches[:4]])
    assert len(first_epoch.unique(dim=0)) == 1024
