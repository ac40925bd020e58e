"""The library says nothing on its own, warns once and at the user's line, and repeats itself bit by bit."""

import ast
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import thor_fx
from thor_fx.distributed import wrappers
from training import (
    Batch,
    Parameters,
    batches,
    build,
    classifier_loss,
    compiled,
    identical,
    mlp,
    snapshot,
    train,
)

ROOT = Path(__file__).parents[1]
SETTINGS: dict[str, Any] = {"lr": 0.05, "damping": 0.1, "momentum": 0.9, "frequency": 2}

# --- what is printed ------------------------------------------------------------------------------------

SAYS = ("thor_fx/commands/", "thor_fx/demo/", "thor_fx/__main__.py")
"""What is there to print."""

SOURCES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for folder in ("thor_fx", "passes")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def calls(source: str) -> Iterator[str]:
    """The functions that a source calls, as it writes them."""
    return (ast.unparse(node.func) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))


def where(*wanted: str) -> list[str]:
    found = {path for path, source in SOURCES.items() if set(wanted) & set(calls(source))}
    return sorted(path for path in found if not path.startswith(("thor_fx/passes/", *SAYS)))


def test_nothing_is_printed_by_the_library():
    assert where("print", "sys.stdout.write", "sys.stderr.write", "pprint", "logging.basicConfig") == []


def test_loggers_have_names():
    """Nothing goes to the root logger, whose handlers are the user's."""
    assert where("logging.getLogger") == ["passes/stages.py", "thor_fx/logs.py"]
    levels = ("debug", "info", "warning", "error", "exception", "critical", "log")
    assert where(*(f"logging.{level}" for level in levels)) == []
    for path in ("passes/stages.py", "thor_fx/logs.py"):
        assert "getLogger()" not in SOURCES[path]


def test_progress_is_shown_where_it_is_asked_for():
    assert where("tqdm") == ["thor_fx/data_factors.py"]  # factors(..., progress=True)


def test_what_is_looked_for_is_found():
    assert list(calls("def f():\n    print(1)\n    sys.stdout.write('x')")) == ["print", "sys.stdout.write"]
    assert any("print" in calls(SOURCES[path]) for path in SOURCES if path.startswith(SAYS))


# --- warnings -------------------------------------------------------------------------------------------


def test_all_warnings_look_for_the_users_line():
    assert where("warnings.warn") == ["thor_fx/warn.py"]


def warned(what: Callable[[], Any]) -> dict[str, str]:
    """The first words of what it warns of, each once, and the file that it points at."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        what()
    found = {" ".join(str(each.message).split()[:3]): each.filename for each in caught}
    assert len(found) == len(caught), "each once"
    return found


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "scheduled"])
def test_a_step_warns_at_the_line_that_takes_it(wrapped):
    """Schedulers wrap ``step`` once more."""
    model = compiled()
    optimizer = thor_fx.Thor(model, **{**SETTINGS, "damping": torch.tensor([0.1, 0.2])})
    if wrapped:
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
    train(model, optimizer, batches(2))
    model.eval()
    (x, y) = batches(1)[0]
    F.cross_entropy(model(x), y).backward()
    found = warned(lambda: (optimizer.step(), optimizer.step()))
    assert found == {"the damping table": __file__, "a factor step": __file__}


def test_a_functional_step_warns_at_the_line_that_takes_it():
    batch, model = batches(1)[0], build(mlp)
    tx = thor_fx.thor(**{**SETTINGS, "lr": torch.tensor([0.1])})
    step = thor_fx.compile_step(classifier_loss(model), tx, backend="eager")
    params: Any = dict(model.named_parameters())
    params, state, _ = step(params, step.init(params, *batch), *batch)

    def twice() -> None:
        _, new, _ = step(params, state, *batch)
        step(params, new, *batch)

    assert warned(twice) == {"the lr table": __file__}


def test_an_optimizer_warns_at_the_line_that_makes_it(monkeypatch):
    """With a preset there is one more function around its ``__init__``."""
    monkeypatch.setattr(wrappers, "has_others", lambda: True)
    found = warned(lambda: thor_fx.Thor(compiled(), lr=0.1, preset="recommended"))
    assert found == {" ".join(wrappers.NOT_AVERAGED.split()[:3]): __file__}


# --- the same bits again ----------------------------------------------------------------------------------


class Everything(nn.Module):
    """A lookup, a sum of lookups, a convolution and a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.bags = nn.Embedding(11, 6), nn.EmbeddingBag(7, 6, mode="mean")
        self.conv = nn.Conv1d(6, 5, 3, padding=1)
        self.norm, self.head = nn.LayerNorm(5), nn.Linear(5, 4)

    def forward(self, index: Tensor) -> Tensor:
        x = self.words(index) + self.bags(index % 7)[:, None]  # (batch, positions, 6)
        return self.head(self.norm(self.conv(x.mT).mT.tanh()).mean(1))


def of_everything(device: str) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    draws = (torch.randint(high, size, generator=generator) for _ in range(3) for high, size in SIZES)
    return list(zip(*(iter(draw.to(device) for draw in draws),) * 2, strict=True))


SIZES = (11, (6, 9)), (4, (6,))

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sampled": {
        **{"fisher": "sampled", "likelihood": "categorical", "rows": 0.5},
        **{"inverse": "eigen", "factor_decay": 0.5, "bias": "joint"},
    },
    "ekfac": {"inverse": "ekfac", "sharing": "reduce"},
}


def by_optimizer(settings: dict[str, Any], device: str, backend: str) -> list[Parameters]:
    torch.manual_seed(0)
    model = thor_fx.compile(build(Everything, torch.float32).to(device), backend=backend)
    return train(model, thor_fx.Thor(model, **SETTINGS, **settings), of_everything(device))


def by_step(settings: dict[str, Any], device: str, backend: str) -> list[Parameters]:
    torch.manual_seed(0)
    model = build(Everything, torch.float32).to(device)

    def loss_fn(params: Any, index: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, params, (index,)), y)

    own = {name: value for name, value in settings.items() if name != "likelihood"}
    step = thor_fx.compile_step(loss_fn, thor_fx.thor(**SETTINGS, **own), backend=backend)
    params: Any = snapshot(dict(model.named_parameters()))
    state, trajectory = step.init(params, *of_everything(device)[0]), []
    for batch in of_everything(device):
        params, state, _ = step(params, state, *batch)
        trajectory.append(snapshot(params))
    return trajectory


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for then
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("door", [by_optimizer, by_step])
def test_deterministic_algorithms_repeat_every_bit(door, variant):
    """Two runs, each with graphs of its own, under a mode in which torch refuses what it cannot repeat."""
    first, second = (door(VARIANTS[variant], "cpu", "aot_eager") for _ in range(2))
    assert all(map(identical, first, second))
    assert not identical(first[0], first[-1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.inductor)])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("door", [by_optimizer, by_step])
def test_deterministic_algorithms_repeat_every_bit_on_a_gpu(door, variant, backend):
    first, second = (door(VARIANTS[variant], "cuda", backend) for _ in range(2))
    assert all(map(identical, first, second))


def test_no_pass_uses_what_has_no_deterministic_kernel():
    """Of torch's list for CUDA; operators of the user's own model are the user's."""
    refused = {"cumsum", "histc", "bincount", "put_", "scatter_reduce", "kthvalue", "median"}
    traced = {path: source for path, source in SOURCES.items() if re.match("passes/|thor_fx/inverses/", path)}
    used = {(path, call.rpartition(".")[2]) for path, source in traced.items() for call in calls(source)}
    known = {("passes/scores.py", "cumsum")}  # docs/compiling.md
    assert {(path, name) for path, name in used if name in refused} == known
