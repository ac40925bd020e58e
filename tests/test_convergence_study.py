"""The study: its search, its levels, and a tiny task through all of it."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

STUDY = Path(__file__).parents[1] / "benchmarks" / "convergence"


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(STUDY)


def minimum_found(function, lr: float, budget: int):
    from search import Space, next_point

    space = Space(lr={"": lr}, knob="damping", values={"": (0.1, 1.0)})
    found: dict = {}
    while (point := next_point(space, "task", found, budget)) is not None:
        setting = space.setting("task", point)
        found[point] = function(setting["lr"], setting["damping"])
    return space.setting("task", min(found, key=found.get)), found


@pytest.mark.parametrize("start", [0.1 * 3**k for k in (-3, -1, 0, 2, 3)])
def test_the_search_finds_the_valley_wherever_it_starts(start: float):
    best, found = minimum_found(lambda lr, damping: abs(math.log(lr / 0.1)) + damping, start, budget=8)
    assert best == {"lr": pytest.approx(0.1, rel=0.02), "damping": 0.1}
    assert len(found) == 8


def test_the_search_turns_the_other_knob_too():
    best, _ = minimum_found(lambda lr, damping: abs(math.log(lr / 0.3)) - damping, 0.1, budget=8)
    assert best == {"lr": pytest.approx(0.3, rel=0.02), "damping": 1.0}


def test_the_search_leaves_where_all_diverges():
    best, found = minimum_found(lambda lr, damping: math.inf if lr > 1e-3 else -lr, 1.0, budget=8)
    assert best["lr"] <= 1e-3
    assert len(found) == 8


def test_every_search_has_room_for_the_whole_budget():
    from optimizers import OPTIMIZERS
    from search import BUDGET, next_point

    for entry in OPTIMIZERS.values():
        found: dict = {}
        while (point := next_point(entry.space, "gpt", found)) is not None:
            found[point] = 1.0
        assert len(found) == BUDGET == 8
        assert len({json.dumps(entry.space.setting("gpt", point)) for point in found}) == BUDGET


def test_levels_and_first_hits_of_a_known_curve():
    from levels import average, elapsed, levels_of, seconds_to, smooth, steps_to

    falling = [float(loss) for loss in range(8, 0, -1)]
    assert levels_of(falling) == {"early": 7.0, "middle": 5.0, "final": 1.0}
    assert levels_of([4.0, 2.0, 3.0, 5.0]) == {"early": 4.0, "middle": 2.0, "final": 2.0}
    assert [steps_to(falling, level) for level in (9.0, 7.0, 6.5, 1.0, 0.5)] == [1, 2, 3, 8, None]
    assert smooth([8.0, 4.0, 0.0, 0.0], 2) == [8.0, 6.0, 2.0, 0.0]
    assert smooth([1.0, None], 2) == [1.0, math.inf]
    assert average([[2.0, 1.0], [4.0]], 2) == [3.0, math.inf]
    times = [[1000.0, 1000.0, 1000.0], [3000.0, 3000.0, 3000.0]]
    assert seconds_to(times, 2) == 4.0
    assert seconds_to(times, None) is None
    assert elapsed(times) == [2.0, 4.0, 6.0]


def test_times_without_compilation():
    from run import steady

    compiled = [60.0, 5.0, *[1.0] * 8, 9.0, *[1.0] * 9]  # period 10: step 10 renews, as step 0 did
    assert steady(compiled, 10) == [9.0, *[1.0] * 9, 9.0, *[1.0] * 9]
    assert steady([60.0, 5.0, 1.0], 2) == [1.0, 5.0, 1.0]


def test_all_optimizers_share_schedule_and_batches():
    from run import rate
    from tasks import TASKS

    rates = [rate(step, 100) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] < 0.001
    task = TASKS["smoke"]
    source = task.load(Path())
    first, again, other = (task.batches(source, seed) for seed in (1, 1, 2))
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))
    assert not all(a.equal(b) for a, b in zip(first, other, strict=True))


def test_muon_sees_convolutions_as_matrices():
    import torch
    from optimizers import Matrices

    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(4, 3, 2, 2))
    matrix = torch.nn.Parameter(weight.detach().flatten(1).clone())
    ours, theirs = Matrices([weight], lr=0.1, weight_decay=0.0), torch.optim.Muon([matrix], 0.1, 0.0)
    for _ in range(3):
        weight.grad = torch.randn_like(weight)
        matrix.grad = weight.grad.flatten(1)
        ours.step()
        theirs.step()
        ours.zero_grad()
        assert weight.grad is None
    assert torch.equal(weight.flatten(1), matrix)


def test_both_doors_of_ours_train_alike():
    from optimizers import OPTIMIZERS
    from run import run
    from tasks import TASKS

    setting = OPTIMIZERS["recommended"].space.setting("smoke", (0.0, 0))
    first, second = (
        run(TASKS["smoke"], "recommended", {**setting, "door": door}, 1, Path(), "eager")
        for door in ("drop-in", "functional")
    )
    assert first["losses"] == pytest.approx(second["losses"], rel=1e-3)
    assert first["valid_loss"] == pytest.approx(second["valid_loss"], rel=1e-3)
    assert first["losses"][-1] < first["losses"][0]


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    smoke(tmp_path)
    return tmp_path


def smoke(folder: Path) -> None:
    import study

    optimizers = [f"--optimizer={name}" for name in ("adamw", "sgd", "recommended")]
    study.main(["--smoke", "--workers", "0", "--results", str(folder), *optimizers])


def test_study_resumes_and_reports(finished: Path, monkeypatch: pytest.MonkeyPatch):
    import report
    import study
    from optimizers import OPTIMIZERS

    lines = (finished / "runs.jsonl").read_text().splitlines()
    assert len(lines) == 3 * (3 + 2)  # three settings, two fresh seeds
    pages = {name: (finished / name).read_bytes() for name in ("summary.json", "report.md")}
    rows = json.loads(pages["summary.json"])["tasks"]["smoke"]["rows"]
    assert rows.keys() == OPTIMIZERS.keys()
    assert rows["soap"]["state"] in {"not run", "not installed"}
    for name in ("adamw", "sgd", "recommended"):
        assert rows[name]["state"] == ""
        assert rows[name]["valid_loss"]["mean"] < 1.3
        assert len(rows[name]["tried"]) == 3
    assert rows["adamw"]["ratio"] == 1.0
    assert rows["adamw"]["steps_to"]["middle"] <= 6
    assert (finished / "smoke.png").stat().st_size > 10_000

    def no_more_runs(*_: object):
        raise AssertionError("a finished run was repeated")

    monkeypatch.setattr(study, "run", no_more_runs)
    smoke(finished)
    assert (finished / "runs.jsonl").read_text().splitlines() == lines
    assert report.markdown(json.loads(pages["summary.json"])).encode() == pages["report.md"]
    assert {name: (finished / name).read_bytes() for name in pages} == pages


def test_an_interrupted_run_is_repeated_and_nothing_else(tmp_path: Path):
    from runs import Runs
    from tasks import TASKS

    file = tmp_path / "runs.jsonl"
    task = TASKS["smoke"]
    record = {"protocol": task.protocol, "optimizer": "sgd", "setting": {"lr": 1.0}, "seed": 0}
    Runs(file).add(record)
    whole = file.read_text()
    file.write_text(whole + whole[: len(whole) // 2])
    runs = Runs(file)
    assert len(runs) == 1
    runs.add({**record, "seed": 1})
    again = Runs(file)
    assert len(again) == 2
    assert again.get(task, "sgd", {"lr": 1.0}, 1) is not None


def test_a_run_in_its_own_process_and_one_that_fails(tmp_path: Path):
    from study import Executor
    from tasks import TASKS

    execute = Executor(tmp_path, "eager", own_process=True)
    record = execute(TASKS["smoke"], "sgd", {"lr": 0.1, "wrong": 1}, 0)
    assert record["status"] == "failed"
    assert "wrong" in record["error"]
    command = [
        sys.executable,
        STUDY / "run.py",
        "--task",
        "smoke",
        "--optimizer",
        "sgd",
        "--backend",
        "eager",
    ]
    ran = subprocess.run(
        [*command, "--setting", '{"lr": 0.1, "momentum": 0.9}'], capture_output=True, text=True, check=True
    )
    record = json.loads(ran.stdout)
    assert record["status"] == "done"
    assert len(record["losses"]) == len(record["cpu_ms"]) == TASKS["smoke"].steps


def test_a_run_that_is_killed_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import study
    from tasks import TASKS

    killed = subprocess.CompletedProcess([], returncode=-9, stdout="", stderr="")
    monkeypatch.setattr(study.subprocess, "run", lambda *_, **__: killed)
    with pytest.raises(RuntimeError, match="killed by signal 9"):
        study.Executor(tmp_path, "eager", own_process=True)(TASKS["smoke"], "sgd", {"lr": 0.1}, 0)


def test_a_missing_file_says_how_to_get_it(tmp_path: Path):
    from tasks import TASKS

    with pytest.raises(FileNotFoundError, match=r"mnist.npz is missing: make it with: python benchmarks"):
        TASKS["autoencoder"].load(tmp_path)


def test_the_report_says_where_others_are_better():
    from report import losses

    def row(label: str, loss: float, steps: int | None) -> dict:
        counts = {"early": 1, "middle": steps, "final": None}
        times = {name: None if count is None else count / 10 for name, count in counts.items()}
        return {
            "label": label,
            "setting": {},
            "valid_loss": {"mean": loss, "spread": 0.0},
            "ms_per_step": 100.0,
            "steps_to": counts,
            "seconds_to": times,
        }

    rows = {"recommended": row("ours", 1.0, 20), "muon": row("Muon", 0.5, 10), "sgd": row("SGD", 2.0, None)}
    assert losses({"rows": rows}) == [
        "held-out loss: Muon 0.5; ours 1",
        "steps to the middle level: Muon 10; ours 20",
        "seconds to the middle level: Muon 1.0; ours 2.0",
    ]
    rows["recommended"] = row("ours", 1.0, None)
    assert "steps to the middle level: Muon 10; ours never" in losses({"rows": rows})


def test_the_sweep_starts_every_run_anew_and_compiles_once():
    import torch
    from choosing import Trainer

    from thor_fx.demo.tasks import load

    trainer = Trainer("thor", frequency=2, steps=3, backend="eager")
    digits = load(0, torch.device("cpu"))
    settings = [(0.003, 0.1, 0), (0.003, 3.0, 0), (0.003, 0.1, 1), (0.003, 0.1, 0)]
    losses = [trainer(digits, *setting)["loss"] for setting in settings]
    assert losses[0] == losses[3]
    assert len(set(losses)) == 3


def test_what_is_drawn_of_the_sweep_is_what_was_run():
    from choosing import DAMPINGS, FREQUENCIES, RATES, RULES, SEEDS, means
    from choosing_pictures import at_best_rate, mean_ms

    runs = json.loads((STUDY / "results" / "choosing.json").read_text())["runs"]
    sweeps = {rule: len(DAMPINGS[rule]) * (len(RATES[rule]) + len(FREQUENCIES) - 1) for rule in RULES}
    assert len(runs) == len(SEEDS) * sum(sweeps.values())
    for rule, frequency in ((rule, frequency) for rule in RULES for frequency in FREQUENCIES):
        assert [run["damping"] for run in at_best_rate(runs, rule, frequency)] == list(DAMPINGS[rule])
    both = [{**runs[0], "seed": seed, "loss": loss} for seed, loss in ((0, 1.0), (1, None))]
    assert means(both)[0]["loss"] == math.inf
    assert mean_ms({"plain_ms": 1.0, "factor_ms": 3.0, "frequency": 4}) == 1.5
