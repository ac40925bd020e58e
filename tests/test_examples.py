"""The examples run and lower their loss."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ranks import launched

FOLDER = Path(__file__).parents[1] / "examples"
ON_RANKS = FOLDER / "ddp_digits.py"
OTHERS = "char_gpt", "custom_pass", "fusion_study", "inspect_graph", "laplace_digits", "poisson"
GPT, CUSTOM, STUDY, INSPECT, LAPLACE, POISSON = (FOLDER / f"{name}.py" for name in OTHERS)
LOOPS = {"accelerate": ["accelerate"], "lightning": ["lightning"], "lora": ["peft"]}
LOOPS["trainer"] = ["accelerate", "transformers"]
BY_LOOP = {name: FOLDER / f"{name}_digits.py" for name in LOOPS}
APART = {ON_RANKS, GPT, CUSTOM, STUDY, INSPECT, LAPLACE, POISSON, *BY_LOOP.values()}
EXAMPLES = sorted({*FOLDER.glob("*.py")} - APART)
COMPILED = [FOLDER / "ensemble_digits.py"]  # tests/test_readme.py runs the loops of both doors so
RUNS = [
    *((path, "aot_eager") for path in EXAMPLES),
    *(pytest.param(path, "inductor", marks=pytest.mark.inductor) for path in COMPILED),
]


def run(path: Path, arguments: str, cwd: Path) -> str:
    # NOTE: one thread: threads that wait for each other are slow where other tests run beside
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(path), *arguments.split()]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_are_examples_of_both_doors():
    assert {"drop_in_digits", "functional_digits"} <= {path.stem for path in EXAMPLES}


@pytest.mark.parametrize(("path", "backend"), RUNS, ids=lambda value: getattr(value, "stem", value))
def test_example(path: Path, backend: str, tmp_path: Path):
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", run(path, backend, tmp_path))]
    assert len(losses) == 2
    assert losses[1] < losses[0] / 5


def test_a_gpt_learns_and_writes(tmp_path: Path):
    printed, written = run(GPT, "aot_eager --steps 30", tmp_path).split("it writes:\n")
    before, after = (float(bits) for bits in re.findall(r": (\d\.\d+) bits per character", printed))
    assert after < before - 2
    assert written.startswith("The ")
    assert len(written) == len("The ") + 300 + 1  # and a line end


def test_a_differential_equation_is_solved(tmp_path: Path):
    printed = run(POISSON, "aot_eager --steps 80 --adam 0.1", tmp_path)
    losses = [float(loss) for loss in re.findall(r": loss (\d+\.\d+)", printed)]
    *errors, of_adam = [float(error) for error in re.findall(r"relative error (\d\.\d+)", printed)]
    assert losses[1] < losses[0] / 500
    assert errors[1] < 0.15
    assert errors[1] < of_adam


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_of_another_package(name: str, tmp_path: Path):
    for package in LOOPS[name]:
        pytest.importorskip(package)
    printed = run(BY_LOOP[name], "aot_eager", tmp_path)
    first, last = map(float, re.findall(r"(?:first|last) loss (\d+\.\d+)", printed))
    assert last < first / 5
    right = re.findall(r"(\d+\.\d)% of the digits are right", printed)
    assert len(right) == (name in {"lora", "trainer"})
    assert all(float(share) > 85 for share in right)


def test_a_pass_of_ones_own(tmp_path: Path):
    printed = run(CUSTOM, "aot_eager", tmp_path)
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", printed)]
    assert losses[1] < losses[0] / 5
    rows = re.findall(r"^ +(\d+)  (\d\.weight)  (\S+)  (\S+)$", printed, re.MULTILINE)
    assert [(int(step), weight) for step, weight, *_ in rows] == [
        (step, weight) for step in range(0, 140, 25) for weight in ("0.weight", "2.weight")
    ]
    assert all(0 < float(median) < float(largest) for *_, median, largest in rows)


def test_the_study_of_optimisations(tmp_path: Path):
    header, *lines = run(STUDY, "--quick", tmp_path).splitlines()
    assert header.split() == ["factor", "step", "operators", "kernels", "ms", "peak", "MB"]
    table = {label.strip(): int(count) for label, count in (re.split(r" {2,}", line)[:2] for line in lines)}
    everything = table.pop("nothing off")
    assert {"without accumulate", "without shared_inputs", "drop-in, nothing off"} <= table.keys()
    assert table["without accumulate"] > everything
    assert table["without shared_inputs"] != everything
    assert table["without batched_inverses"] > everything


def test_a_look_at_a_step(tmp_path: Path):
    printed = run(INSPECT, "--layers=2", tmp_path)
    for line in (
        r"98\.3% of 108,416 parameters preconditioned; loss terms n = 256",
        r"preconditioned: linear, A 64x64, G 192 in blocks of 128, rows 256",
        r"factor  refresh +\d+",
        r"critical path: \d+ of \d+ nodes",
        r"dearest factor: Factor\(layer='blocks\.\d\.fall\.weight', side='A'\)",
    ):
        assert re.search(line, printed), line
    assert "\N{MULTIPLICATION SIGN}2" in (tmp_path / "gpt.svg").read_text(), "both blocks are one box"
    assert "Spectra of the factors" in (tmp_path / "gpt.html").read_text()


def test_laplace_is_less_sure_of_what_is_wrong(tmp_path: Path):
    printed = run(LAPLACE, "aot_eager", tmp_path)
    losses = [float(loss) for loss in re.findall(r": loss (\d+\.\d+)", printed)]
    assert losses[1] < losses[0] / 100
    form = r"^test, noisy, (.+): accuracy (\S+), log loss (\S+), calibration error (\S+)$"
    found = {name: [*map(float, numbers)] for name, *numbers in re.findall(form, printed, re.MULTILINE)}
    (right, loss, error), (as_right, less, smaller) = found["trained weights"], found["Laplace"]
    assert as_right > right - 0.02
    assert less < 0.8 * loss
    assert smaller < error / 2
    assert (tmp_path / "laplace.png").stat().st_size > 10_000


@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed here")
def test_example_on_two_ranks_resumes(tmp_path: Path):
    lines = []
    for epochs in ("2", "8"):
        arguments = ["aot_eager", "--checkpoints", str(tmp_path / "saved"), "--epochs", epochs]
        done = launched(ON_RANKS, arguments, 2, timeout=240)
        assert done.returncode == 0, done.stderr
        lines += done.stdout.splitlines()
    assert lines.pop(2) == f"resumed from {tmp_path / 'saved' / '2'}"
    form = r"epoch (\d+): loss (\d+\.\d+), held-out accuracy (\d\.\d+)"
    epochs, losses, accuracies = zip(*(re.fullmatch(form, line).groups() for line in lines), strict=True)
    assert list(epochs) == [str(epoch) for epoch in range(1, 9)]
    assert float(losses[-1]) < float(losses[0]) / 5
    assert float(accuracies[-1]) > 0.85
