"""The benchmark runs, reports every contender, and its hand-written rival does the same work as ours."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import thor_fx

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PHASES = ["forward_backward_plain", "forward_backward_factor", "update_plain", "update_refresh"]
ROWS = {
    "torch.compile + fused AdamW": {"plain_step", *PHASES[::2]},
    "torch.compile + fused SGD-momentum": {"plain_step", *PHASES[::2]},
    "eager K-FAC by hooks": {"plain_step", "factor_step", *PHASES},
    "thor_fx, drop-in": {"plain_step", "factor_step", *PHASES},
    "thor_fx, functional": {"plain_step", "factor_step"},
}


@pytest.fixture
def on_path(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


def step_time(folder: Path, *further: str):
    """The tables that it prints, and its reports."""
    file = folder / "out.json"
    command = [sys.executable, BENCHMARKS / "step_time.py", "--model", "tiny", "--threads", "1", "--quick"]
    command += ["--backend", "eager", "--json", file, *further]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout, json.loads(file.read_text())


def test_step_time_reports_every_option(tmp_path: Path, on_path: None):
    from contenders import OPTIONS

    shown, reports = step_time(tmp_path, "--options")
    assert list(reports["tiny-options"]["rows"]) == ["torch.compile + fused AdamW", *OPTIONS]
    assert all(f"| {label} |" in shown for label in OPTIONS)


def test_step_time_reports_every_contender(tmp_path: Path):
    shown, reports = step_time(tmp_path)
    report = reports["tiny"]
    assert report["machine"]["torch"] == torch.__version__
    assert list(report["rows"]) == list(ROWS)
    for label, row in report["rows"].items():
        assert f"| {label} |" in shown
        assert all(ms > 0 for ms in row["amortised"].values())
        measured = {name for name in ("plain_step", "factor_step", *PHASES) if row[name]}
        assert measured == ROWS[label]
        assert all(0 < row[name]["min"] <= row[name]["median"] for name in measured)


@pytest.mark.inductor
def test_factors_of_a_convolution_take_half_as_much_memory_again_at_most(on_path: None):
    """3 x 3, 64 channels, 256 images: written down, the patches would take nine times the input."""
    from layer_cost import measure_apart

    plain, factor = measure_apart("convolution 3x3, 64 channels", "inductor", steps=3, threads=1)
    image = 256 * 64 * 16 * 16 * 4 / 2**20
    assert plain["mb"] > image  # the output at least: something has been measured
    assert factor["mb"] <= 1.5 * plain["mb"]


def test_doors_reports_both(tmp_path: Path):
    file = tmp_path / "out.json"
    command = [sys.executable, BENCHMARKS / "doors.py", "--model", "tiny", "--backend", "eager"]
    command += ["--rounds", "1", "--json", file]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    doors = json.loads(file.read_text())["models"]["tiny"]
    assert list(doors) == ["drop-in", "functional"]
    for door, numbers in doors.items():
        assert f"| tiny | {door} |" in ran.stdout
        assert 0 < numbers["plain ms, least"] <= numbers["plain ms"]
        assert numbers["factor ms"] > 0
        assert min(numbers["plain MB"], numbers["factor MB"]) >= 0


def test_eager_hooks_take_the_same_steps_as_thor(on_path: None):
    from eager_hooks import EagerKfac
    from workloads import Transformer, text

    torch.manual_seed(0)
    ours, theirs = (Transformer(13, 5, width=12, layers=2, heads=2).double() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    settings = {"lr": 0.05, "damping": 0.1, "momentum": 0.9, "frequency": 2, "block_size": 8}
    thor_fx.compile(ours, backend="eager")
    rivals = [
        (ours, thor_fx.Thor(ours, **settings)),
        (theirs, EagerKfac(theirs, **settings, terms=4 * 5)),
    ]
    for _ in range(5):
        tokens, following = text(4, 5, 13)
        for model, optimizer in rivals:
            F.cross_entropy(model(tokens), following).backward()
            optimizer.step()
            optimizer.zero_grad()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


def test_amortised_times_and_ratios(on_path: None):
    from tables import Timing, markdown, replace_section, summarise

    timings = {
        "first": [Timing(False, (1.0, 1.0))] * 4,
        "second": [Timing(False, (2.0, 2.0))] * 4 + [Timing(True, (5.0, 9.0))],
    }
    rows = summarise(timings)
    assert rows["second"]["amortised"] == {"1": 14.0, "10": 5.0, "100": 4.1}
    assert rows["second"]["ratio_to_first"] == {
        "plain": 2.0,
        "plain_min": 2.0,
        "1": 7.0,
        "10": 2.5,
        "100": 2.05,
    }
    assert rows["first"]["amortised"] == dict.fromkeys(("1", "10", "100"), 2.0)
    shown = markdown({"title": "t", "machine": {}, "settings": {}, "rows": rows})
    assert "| second | 2.00 | 5.00 | 3.00 | 2.00 | 9.00 | 7.00 |" in shown
    document = "a\n<!-- x -->\nold\n<!-- end -->\nb\n<!-- y -->\nkept\n<!-- end -->\n"
    assert replace_section(document, "x", "new\n") == document.replace("old", "new")
