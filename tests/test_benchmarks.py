"""The benchmarks run, report every contender, and the hand-written rival does the same work as ours."""

import importlib.util
import json
import os
import re
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
    "thor_fx, factors every step": {"plain_step", "factor_step"},
    "thor_fx, bfloat16 products": {"plain_step", "factor_step"},
    "thor_fx, bfloat16 products, factors every step": {"plain_step", "factor_step"},
    'thor_fx, inverse="eva"': {"plain_step", "factor_step"},
    'thor_fx, preset="recommended"': {"plain_step", "factor_step"},
    "Muon (torch.optim) + AdamW": {"plain_step", *PHASES[::2]},
}
PEERS = {
    "SOAP": "soap",
    "Distributed Shampoo": "distributed_shampoo",
    "kfac-pytorch": "kfac",
    "kfac-pytorch, factors every step": "kfac",
    "ASDL, K-FAC": "asdl",
    "ASDL, K-FAC, factors every step": "asdl",
    "curvlinops, factors alone": "curvlinops",
}
IN_JAX = ("JAX, SGD-momentum", "kfac-jax", "kfac-jax, factors every step")
FLOORS = {
    ("torch.compile + fused AdamW", "AdamW's update"),
    ("torch.compile + fused SGD-momentum", "SGD's update"),
    ("thor_fx, drop-in", "update"),
    ("thor_fx, drop-in", "factors"),
    ("thor_fx, drop-in", "refresh"),
    ("thor_fx, drop-in", "factors + refresh"),
    ("thor_fx, functional", "factors + refresh"),
    ("thor_fx, factors every step", "factors"),
    ("thor_fx, factors every step", "refresh"),
}


@pytest.fixture
def on_path(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


def run(script: str, folder: Path, *further: str, **environment: str):
    """What it prints, and its reports."""
    file = folder / "out.json"
    command = [sys.executable, BENCHMARKS / script, "--json", file, *further]
    variables = os.environ | environment
    ran = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout, json.loads(file.read_text())


def step_time(folder: Path, *further: str, **environment: str):
    tiny = ("--model", "tiny", "--threads", "1", "--quick", "--backend", "eager")
    return run("step_time.py", folder, *tiny, *further, **environment)


def test_step_time_reports_options(tmp_path: Path, on_path: None):
    some = ["the defaults", "refresh=Every(50)", "damping=LevenbergMarquardt"]
    chosen = [word for label in some for word in ("--only", label)]
    shown, reports = step_time(tmp_path, "--options", *chosen)
    assert list(reports["tiny-options"]["rows"]) == ["torch.compile + fused AdamW", *some]
    assert all(f"| {label} |" in shown for label in some)


def test_every_option_of_the_table_is_one_of_thor(on_path: None):
    from contenders import DAMPING, FREQUENCY, OPTIONS, WITH_OPTIONS

    assert [entrant.label for entrant in WITH_OPTIONS[1:]] == list(OPTIONS)
    for settings in OPTIONS.values():
        known = {"lr": 0.1, "damping": DAMPING, "momentum": 0.9, "frequency": FREQUENCY}
        assert isinstance(thor_fx.thor(**{**known, **settings}), thor_fx.Transform)


def test_step_time_reports_every_contender(tmp_path: Path):
    shown, reports = step_time(tmp_path)
    report = reports["tiny"]
    assert report["machine"]["torch"] == torch.__version__
    assert list(report["rows"]) == [*ROWS, *PEERS, *IN_JAX]
    for label, expected in ROWS.items():
        row = report["rows"][label]
        assert f"| {label} |" in shown
        assert all(ms > 0 for ms in row["amortised"].values())
        measured = {name for name in ("plain_step", "factor_step", *PHASES) if row[name]}
        assert measured == expected
        assert all(0 < row[name]["min"] <= row[name]["median"] for name in measured)
    for label, package in PEERS.items():
        if importlib.util.find_spec(package):
            assert report["rows"][label]["plain_step"]["median"] > 0
        else:
            assert report["rows"][label] == {"absent": "not installed"}
            assert f"| {label} | not installed |" in shown
    for label in IN_JAX:
        assert report["rows"][label] == {"absent": "give --kfac-jax-python"}
    assert all(rate > 0 for rate in report["rates"].values())
    assert {(line["contender"], line["work"]) for line in report["floors"]} == FLOORS
    for line in report["floors"]:
        assert line["floor_ms"] > 0
        assert line["share"] is None or line["share"] * line["ms"] == pytest.approx(line["floor_ms"])


PACKAGES = {
    "soap": """
import torch
class SOAP(torch.optim.SGD):
    def __init__(self, params, lr, betas, weight_decay, precondition_frequency):
        assert precondition_frequency == 10
        super().__init__(params, lr=lr)
""",
    "asdl/precondition/__init__": "",
    "asdl/precondition/natural_gradient": "nvtx = None",
    "asdl/__init__": """
FISHER_EMP = "of the gradients"
def PreconditioningConfig(ignore_modules, curvature_upd_interval=None, ema_decay=None, **same):
    assert same == {"preconditioner_upd_interval": 10, "data_size": 15, "damping": 0.03}
    assert (curvature_upd_interval, ema_decay) in {(None, None), (1, 0.1)}
    assert [cls.__name__ for cls in ignore_modules] == ["Embedding"]
    return curvature_upd_interval or 10
class KfacGradientMaker:
    def __init__(self, net, interval, fisher_type):
        assert fisher_type == FISHER_EMP
        self.net, self.interval, self.count = net, interval, 0
    def do_update_curvature(self):
        return self.count % self.interval == 0
    def setup_model_call(self, run, x):
        assert (run is self.net) == self.do_update_curvature()
        self.run, self.x = run, x
        return "outputs"
    def setup_loss_call(self, loss, outputs, y):
        assert outputs == "outputs"
        self.loss, self.y = loss, y
    def forward_and_backward(self):
        self.loss(self.run(self.x), self.y).backward()
        self.count += 1
""",
    "kfac/__init__": "",
    "kfac/preconditioner": """
class KFACPreconditioner:
    def __init__(self, model, **settings):
        raise RuntimeError("of a peer")
""",
}


def test_peers_that_are_installed_run_and_those_that_fail_are_a_row(tmp_path: Path):
    for name, source in PACKAGES.items():
        file = tmp_path / f"{name}.py"
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_text(source)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    shown, reports = step_time(tmp_path, "--group", "peers", PYTHONPATH=path)
    rows = reports["tiny"]["rows"]
    assert not [label for label in rows if label.startswith("thor_fx")]
    assert rows["SOAP"]["factor_step"]["count"] == 2  # one in a round
    for label in ("ASDL, K-FAC", "ASDL, K-FAC, factors every step"):
        assert rows[label]["factor_step"]["count"] == 2
        assert rows[label]["update_plain"] is None  # one piece
    assert rows["kfac-pytorch"] == {"absent": "failed: RuntimeError"}
    assert "| kfac-pytorch | failed: RuntimeError |" in shown


def test_a_spent_budget_leaves_rows_out(tmp_path: Path):
    _, reports = step_time(tmp_path, "--group", "ours", "--budget", "0")
    first, *others = reports["tiny"]["rows"].values()
    assert first["plain_step"]["count"] == 2 * 9
    assert others == [{"absent": "no time left"}] * 3


@pytest.mark.inductor
def test_factors_of_a_convolution_take_half_as_much_memory_again_at_most(on_path: None):
    """3 x 3, 64 channels, 256 images: written down, the patches would take nine times the input.

    The peak of a plain step reads as three times the input or as two, from one process to the next, on every
    torch; that of the step with factors as four. So the bound is half as much again as three, whichever
    was read.
    """
    from layer_cost import measure_apart

    plain, factor = measure_apart("convolution 3x3, 64 channels", "inductor", steps=3, threads=1)
    image = 256 * 64 * 16 * 16 * 4 / 2**20
    assert plain["mb"] > image  # the output at least: something has been measured
    assert factor["mb"] <= 1.5 * max(plain["mb"], 3 * image)


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
    from from_study import Gpt
    from workloads import text

    torch.manual_seed(0)
    ours, theirs = (Gpt(13, 5, width=12, layers=2, heads=2).double() for _ in range(2))
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


def test_passes_are_timed_by_depth(on_path: None):
    from compile_time import PASSES, markdown, report

    result = report([1, 2], deep=[])
    shallow, deep = result["passes"]
    assert shallow["nodes"] < deep["nodes"] < 2 * shallow["nodes"]
    assert all(row[name] > 0 for row in result["passes"] for name in PASSES)
    assert f"| 2 | {deep['nodes']} |" in markdown(result)


def test_amortised_times_and_ratios(on_path: None):
    from tables import Timing, markdown, replace_section, summarise

    timings = {
        "first": [Timing(False, (1.0, 1.0))] * 4,
        "second": [Timing(False, (2.0, 2.0))] * 4 + [Timing(True, (5.0, 9.0))],
    }
    rows = summarise(timings, {"third": "not installed"})
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
    assert shown.count("third") == 1
    assert "| third | not installed | - | - | - | - |" in shown
    document = "a\n<!-- x -->\nold\n<!-- end -->\nb\n<!-- y -->\nkept\n<!-- end -->\n"
    assert replace_section(document, "x", "new\n") == document.replace("old", "new")


def test_what_the_extra_work_of_a_matrix_is(on_path: None):
    """R rows and one matrix (O, I), sides below a block of 128."""
    from floors import Work, count
    from from_study import classifier

    rows, in_, out = 40, 12, 7
    torch.manual_seed(0)
    model = classifier(torch.nn.Linear(in_, out, bias=False))
    found = count(model, (torch.randn(rows, in_), torch.randint(out, (rows,))), {})
    factors = in_**2 + out**2
    assert found["factors"] == Work(2 * rows * factors, 4 * (rows * (in_ + out) + factors))
    assert found["refresh"].bytes == 4 * 2 * factors
    assert found["update"] == Work(2 * in_ * out * (in_ + out), 4 * (5 * in_ * out + factors))


@pytest.fixture(scope="module")
def of_one_call(tmp_path_factory: pytest.TempPathFactory):
    """What ``gpu.sh`` prints and writes; on a CPU here, with a tiny model."""
    folder = tmp_path_factory.mktemp("gpu")
    return gpu(folder, LIMIT="400"), {path.name: path for path in folder.rglob("*.json")}


def gpu(folder: Path, **settings: str) -> str:
    tiny = {"DEVICE": "cpu", "MODELS": "tiny", "BACKEND": "eager", "ROUNDS": "2", "GROUPS_OF_ROWS": "ours"}
    variables = os.environ | tiny | settings | {"RESULTS": str(folder / "results"), "PYTHON": sys.executable}
    script = ["bash", BENCHMARKS / "gpu.sh"]
    ran = subprocess.run(script, env=variables, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "no table" not in ran.stdout, ran.stderr
    assert re.search(r"^\d+ s$", ran.stdout, re.MULTILINE)
    return ran.stdout


def test_the_tables_of_a_gpu_in_one_call(of_one_call):
    shown, files = of_one_call
    assert set(files) == {"tiny-cpu.json", "tiny-apart-cpu.json", "goals-cpu.json"}
    assert "| thor_fx, drop-in |" in shown
    rows = json.loads(files["tiny-cpu.json"].read_text())["tiny"]["rows"]
    assert rows["thor_fx, drop-in"]["plain_step"]["count"] == 16


def test_without_time_models_are_left_out(tmp_path: Path):
    assert "tiny is left out" in gpu(tmp_path, LIMIT="0")
    assert [path.name for path in tmp_path.rglob("*.json")] == ["goals-cpu.json"]


def test_bytes_that_adamw_keeps_are_two_moments_and_the_steps(on_path: None, of_one_call):
    from workloads import WORKLOADS

    rows = json.loads(of_one_call[1]["tiny-apart-cpu.json"].read_text())["tiny-apart"]["rows"]
    adamw, drop_in = rows["torch.compile + fused AdamW"], rows["thor_fx, drop-in"]
    counts = [p.numel() for p in WORKLOADS["tiny"].build().parameters()]
    assert adamw["parameter_bytes"] == 4 * sum(counts)
    assert adamw["state_bytes"] == 2 * 4 * sum(counts) + 4 * len(counts)
    assert drop_in["state_bytes"] > drop_in["parameter_bytes"]  # momentum, and the inverses
    assert adamw["cold_s"] > 0
    assert all(0 <= row["plain_mb"] < row["process_mb"] for row in rows.values())


@pytest.mark.parametrize(("stride", "products"), [(1, 13), (2, 45)])
def test_what_the_factor_of_a_convolution_is(on_path: None, stride: int, products: int):
    """Of 81 pairs of taps."""
    from floors import count
    from from_study import classifier

    torch.manual_seed(0)
    layers = torch.nn.Conv2d(2, 3, 3, stride, bias=False), torch.nn.Flatten()
    found = count(
        classifier(torch.nn.Sequential(*layers)), (torch.randn(4, 2, 6, 6), torch.randint(3, (4,))), {}
    )
    positions = 4 * (4 if stride == 1 else 2) ** 2
    assert found["factors"].flops == 2 * positions * (products * 2**2 + 3**2)


def test_a_second_process_compiles_warm(on_path: None, monkeypatch: pytest.MonkeyPatch):
    import apart

    caches: list[str] = []

    def process(label, name, settings, cache, deadline):
        caches.append(cache.name)
        numbers = dict.fromkeys(
            ("state_bytes", "parameter_bytes", "plain_mb", "curvature_mb", "process_mb"), 1
        )
        return {**numbers, "compile_s": 9.0 if caches.count(cache.name) == 1 else 2.0}

    monkeypatch.setattr(apart, "process", process)
    settings = apart.parse(["--model", "tiny", "--group", "ours", "--group", "hooks"])
    rows = apart.report("tiny", settings)["rows"]
    for label in ("torch.compile + fused AdamW", "thor_fx, drop-in", "thor_fx, functional"):
        assert (rows[label]["cold_s"], rows[label]["warm_s"]) == (9.0, 2.0)
    assert rows["eager K-FAC by hooks"]["cold_s"] is None
    assert caches.count("shared") == 4  # AdamW twice, SGD, hooks


def test_goals_beside_what_was_measured(on_path: None):
    from goals import compare, markdown

    def times(plain: float, factor: float, **phases: float):
        medians = {"plain_step": plain, "factor_step": factor, **phases}
        amortised = {"10": (factor + 9 * plain) / 10, "100": (factor + 99 * plain) / 100}
        return {name: {"median": ms} for name, ms in medians.items()} | {"amortised": amortised}

    machine = {"date": "today", "torch": "2", "threads": "1", "load before and after": "0 and 0"}
    rows = {
        "torch.compile + fused AdamW": times(10.0, 10.0, update_plain=1.0),
        "torch.compile + fused SGD-momentum": times(10.0, 10.0),
        "thor_fx, drop-in": times(10.3, 12.0, update_plain=1.9),
        "thor_fx, functional": times(10.1, 20.1),
        "kfac-pytorch": {"absent": "not installed"},
        "ASDL, K-FAC": times(22.0, 22.0),
        "JAX, SGD-momentum": times(40.0, 40.0),
        "kfac-jax": times(20.0, 40.0),
    }
    floors = [{"contender": "thor_fx, functional", "work": "factors + refresh", "share": 0.85}]
    state = {"torch.compile + fused AdamW": {"state_bytes": 8}, "thor_fx, drop-in": {"state_bytes": 18}}
    reports = {
        "gpt": {"machine": machine, "rows": rows, "floors": floors},
        "gpt-apart": {"machine": machine, "rows": state},
    }
    found = compare(reports, "cpu")
    lines = {row["goal"]: row for row in found["rows"]}
    assert {row["workload"] for row in found["rows"]} == {"gpt"}
    assert lines["plain step over AdamW's"]["met"] == {"drop-in": False, "functional": True}
    assert lines["mean step at frequency 100 over AdamW's"]["met"] == {"drop-in": True, "functional": True}
    factor = lines["factor step, refresh included, over plain step"]
    assert factor["met"] == {"drop-in": True, "functional": False}
    assert lines["factors and refresh: share of the floor's rate"]["met"] == {"functional": True}
    assert lines["update over fused AdamW's"]["measured"] == {"drop-in": pytest.approx(1.9)}
    assert lines["state beyond AdamW's over AdamW's"]["met"] == {"drop-in": False}
    shown = markdown(found)
    in_jax = lines["kfac-jax over ours, mean step, factors and inverses every 10"]
    assert in_jax["measured"]["functional"] == pytest.approx(22.0 / 11.1)
    assert in_jax["met"] == {"drop-in": True, "functional": True}
    in_jax = lines[
        "kfac-jax over ours, each over its framework's SGD, mean step, factors and inverses every 10"
    ]
    assert in_jax["measured"]["functional"] == pytest.approx((22.0 / 40.0) / (11.1 / 10.0))
    assert in_jax["met"] == {"drop-in": False, "functional": False}
    hooked = lines["ASDL, K-FAC over ours, mean step, factors and inverses every 10"]
    assert hooked["met"] == {"drop-in": False, "functional": False}
    assert shown.startswith("8 of 15 met.")
    assert "| plain step over AdamW's | gpt | at most 1.02 | 1.03 **not met** | 1.01 met |" in shown
    kfac = "| kfac-pytorch over ours, mean step, factors and inverses every 10 | gpt | at least 3 |"
    assert f"{kfac} not measured | not measured |" in shown


def test_symmetric_products_are_timed_on_a_gpu_only(
    on_path: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    import symmetric

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        symmetric.main(["--results", str(tmp_path)])
    assert ended.value.code == 1
    assert "needs a CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_the_kernel_of_symmetric_products_does_in_a_second(on_path: None):
    """Half of a product: R F (F + 1) operations."""
    from symmetric import markdown

    size = {"arithmetic": "tf32", "features": 1000, "rows": 1998}
    row = size | {
        "kernel ms": 0.02,
        "matmul ms": 0.03,
        "kernel error": 1e-6,
        "matmul error": 2e-6,
        "used": False,
    }
    shown = markdown({"title": "", "machine": {}, "settings": {"device": "cuda"}, "rows": [row]})
    assert "| tf32 | 1000 | 1998 | 0.020 | 0.030 | 1.50 | 100 | 1.0e-06 | 2.0e-06 | no |" in shown


def test_steps_of_a_shared_graph_are_timed_beside_those_of_two(on_path: None):
    from shared_graph import measure

    batch = torch.randn(4, 5), torch.tensor([0, 1, 2, 0])
    found = measure(lambda: torch.nn.Linear(5, 3), batch, rounds=1, backend="aot_eager")
    assert list(found) == [
        ("torch.compile", "plain"),
        *((way, kind) for kind in ("plain", "factor") for way in ("two graphs", "shared graph")),
    ]
    assert all(ms > 0 for ms in found.values())
