"""``python -m thor_fx explain``, ``bench`` and ``blocks``, with good and with bad targets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import command_targets
import thor_fx
from thor_fx.__main__ import main

REPORTS = Path(__file__).parent / "golden" / "reports"


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("target", "report"), [("build_loss", "mlp"), ("Builders.convolution", "convolution")]
)
def test_explain_prints_the_report(target, report, capsys):
    golden = (REPORTS / f"{report}.txt").read_text()
    assert printed(capsys, "explain", f"command_targets:{target}") == golden


def test_explain_says_why(capsys):
    text = printed(capsys, "explain", "command_targets:build_loss", "--why", "0.weight")
    assert text.startswith("preconditioned: linear, A 8x8, G 6x6, rows 16\n  used at ")


def test_explain_prints_json(capsys):
    report = json.loads(printed(capsys, "explain", "command_targets:build_loss", "--json"))
    assert report == json.loads(json.dumps(thor_fx.explain(*command_targets.build_loss()).to_dict()))
    weight = report["parameters"]["0.weight"]
    assert weight["layers"]["0.weight"]["factor_bytes"] == 4 * (8 * 8 + 6 * 6)
    assert (report["numbers"], report["preconditioned_numbers"], report["loss_terms"]) == (75, 66, 16)


def test_blocks_prints_and_draws_both_curves(capsys, tmp_path: Path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "blocks.svg"
    text = printed(capsys, "blocks", "command_targets:build_loss", "--out", str(picture))
    assert text.startswith("block size  refresh ms  performance  factors that lose < 1%\n")
    assert picture.read_text().startswith("<?xml")
    report = json.loads(printed(capsys, "blocks", "command_targets:build_loss", "--json"))
    assert set(report["losses"]) == {"0.weight A", "0.weight G", "2.weight A", "2.weight G"}
    assert report["chosen"] in report["candidates"]


def test_bench_times_every_kind_of_step(capsys):
    quick = ("bench", "command_targets:build_loss", "--backend", "eager", "--steps", "2", "--frequency", "10")
    lines = printed(capsys, *quick).splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == [
        "AdamW",
        "THOR, plain step",
        "THOR, factor step",
        "THOR, frequency=10",
    ]
    adamw, plain, factor, average = json.loads(printed(capsys, *quick, "--json"))
    assert adamw["milliseconds"] > 0
    assert average["milliseconds"] == pytest.approx((9 * plain["milliseconds"] + factor["milliseconds"]) / 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["command_targets"],
            "target must be pkg.module:factory, e.g. my_models:build_mlp, got 'command_targets'",
        ),
        (
            ["nowhere:build"],
            "target: there is no module 'nowhere'; run this where 'nowhere' is, or install it",
        ),
        (["command_targets.inner:build"], "target: there is no module 'command_targets.inner'"),
        (
            ["command_targets:build"],
            "target: 'command_targets' has no 'build'; it has build_mlp, build_loss, ",
        ),
        (
            ["command_targets:NUMBER"],
            "must be a function that returns (model, *example inputs), or (loss_fn, ",
        ),
        (["command_targets:a_number"], "what it returned is of type int: 3"),
        (["command_targets:without_inputs"], "without inputs nothing can be traced"),
        (
            ["command_targets:build_mlp", "--why", "3.weight"],
            "no parameter '3.weight'; there are 0.weight, 0.bias",
        ),
        (["command_targets:build_mlp", "--device", "tpu9"], "--device: cannot use device 'tpu9'"),
        (["command_targets:build_mlp", "--svg", "step.png"], "--svg: 'step.png' must end in .svg"),
        (["command_targets:build_mlp", "--html", "/no/where/step.html"], "cannot write to the folder of"),
    ],
)
def test_a_bad_argument_leaves_with_2_and_says_what_is_wrong(arguments, message, capsys):
    with pytest.raises(SystemExit) as left:
        main(["explain", *arguments])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_nothing_to_cut_leaves_with_1_and_says_so(capsys):
    with pytest.raises(SystemExit) as left:
        main(["blocks", "command_targets:without_layers"])
    assert left.value.code == 1
    assert "no layer has a whole factor" in capsys.readouterr().err


def test_the_command_as_a_user_runs_it(tmp_path: Path):
    (tmp_path / "mine.py").write_text(
        "import torch\n\n\ndef build():\n    return torch.nn.Linear(3, 2), torch.ones(4, 3)\n"
    )
    command = [sys.executable, "-m", "thor_fx", "explain", "mine:build"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "75.0% of 8 parameters preconditioned" in done.stdout


def test_the_difference_of_two_reports():
    loss_fn, params, x, y = command_targets.build_loss()
    narrow, wide = (thor_fx.explain(loss_fn, params, x[:rows], y[:rows]) for rows in (8, 16))
    lines = narrow.diff(wide).splitlines()
    assert lines[:2] == ["--- before", "+++ after"]
    assert [line[0] for line in lines[2:]].count("-") == [line[0] for line in lines[2:]].count("+")
    assert any(line.startswith("+0.weight") and "rows 16" in line for line in lines)
    assert narrow.diff(narrow) == ""
