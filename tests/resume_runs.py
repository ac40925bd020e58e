"""Trainings that may be killed at any moment: what a process does that writes a checkpoint after every step.

A training is one of :data:`CASES`. It saves after every step, and then writes a line with the number of the
step and a digest of all that a further step depends on: so a step in the log is a step that is not lost.

Run as a script, this is a process that has imported everything, forks one that trains, kills it, and forks
the next. One line of JSON says which training is asked for, another what came of it.
"""

import contextlib
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

import thor_fx
from thor_fx import checkpoint
from thor_fx.distributed import checkpoint as of_ranks

IN, HIDDEN, CLASSES, ROWS, DATA = 5, 6, 3, 4, 16
STEPS = 13

Parameters = dict[str, Tensor]


class Dropped(nn.Module):
    """Random numbers in every forward pass, buffers, and a norm beside the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(IN, HIDDEN), nn.BatchNorm1d(HIDDEN)
        self.last = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.dropout(self.norm(self.first(x)).tanh(), 0.3, self.training))


class Branching(nn.Module):
    """One of two layers in every pass, seldom the second: not all are seen in one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, CLASSES)
        self.often, self.seldom = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes = (self.passes + 1) % 3
        middle = self.seldom if self.passes == 2 else self.often
        return self.last(middle(self.first(x).tanh()).tanh())


def rounded() -> nn.Module:
    """Parameters in fewer bits than the inverses."""
    return nn.Sequential(nn.Linear(IN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES)).bfloat16()


def _save(folder: Path, _: int, state: Any) -> None:
    checkpoint.save(folder / "checkpoint.pt", state)


def _load(folder: Path) -> Any:
    file = folder / "checkpoint.pt"
    return checkpoint.load(file) if file.exists() else None


@dataclass(frozen=True)
class Case:
    """A way to train.

    Attributes:
        options: of Thor.
        functional: through which door.
        model: what is trained.
        scaled: with a gradient scaler, which finds an overflow in some steps.
        scheduled: with one of torch's schedulers.
        groups: with parameters in groups of their own.
        save: writes a checkpoint into a folder.
        load: reads the newest of a folder; None: there is none.
    """

    options: dict[str, Any] = field(default_factory=dict)
    functional: bool = False
    model: Callable[[], nn.Module] = Dropped
    scaled: bool = False
    scheduled: bool = False
    groups: bool = False
    save: Callable[[Path, int, Any], None] = _save
    load: Callable[[Path], Any] = _load


def _save_as_ranks_do(folder: Path, step: int, state: Any) -> None:
    of_ranks.save(folder / f"{step}", state)


def _load_as_ranks_do(folder: Path) -> Any:
    newest = of_ranks.newest(folder)
    return None if newest is None else of_ranks.load(newest)


def falling(step: int) -> float:
    return 0.05 * 0.9**step


SETTINGS: dict[str, Any] = {"lr": 0.05, "damping": 0.1, "momentum": 0.9, "frequency": 4}
"""Factors in steps 0, 4, 8 and 12, so that most checkpoints are from within an interval."""

AVERAGES: dict[str, Any] = {"factor_decay": 0.5}
BY_TRACE: dict[str, Any] = {**AVERAGES, "refresh": thor_fx.ByTrace(0.3, 0.01, growth=1.5), "frequency": 2}
ADAPTS: dict[str, Any] = {"damping": thor_fx.LevenbergMarquardt(0.1, interval=2)}
MANY: dict[str, Any] = {
    **AVERAGES, "kl_clip": 0.01, "step_norm": "adam", "fallback": "adamw", "enable_clip_grad": True,
    "weight_decay": 0.01, "momentum_on": "gradient", "bias": "joint", "inverse": "newton_schulz",
}  # fmt: skip

CASES: dict[str, Case] = {
    "plain": Case(scheduled=True),
    "averages": Case({**AVERAGES, "refresh": thor_fx.Staggered(2)}),
    "async": Case({**AVERAGES, "refresh_async": True, "lr": falling, "damping": lambda t: 0.1 / (1 + t)}),
    "by trace": Case(BY_TRACE),
    "sampled": Case({"fisher": "sampled", "likelihood": "categorical"}),
    "scaled": Case({"fisher": "empirical"}, scaled=True),
    "adapts": Case(ADAPTS),
    "many": Case(MANY),
    "ekfac": Case({"inverse": "ekfac", "factor_decay": 0.5}),
    "eva": Case({"inverse": "eva", "factor_decay": 0.5}),
    "auto": Case({"block_size": "auto"}),
    "groups": Case({**AVERAGES, "refresh": thor_fx.Every(5)}, groups=True),
    "rounded": Case({**BY_TRACE}, model=rounded),
    "branching": Case(model=Branching),
    "branching by trace": Case(BY_TRACE, model=Branching),
    "ranks' checkpoint": Case(AVERAGES, save=_save_as_ranks_do, load=_load_as_ranks_do),
    "functional": Case({"lr": torch.linspace(0.1, 0.01, STEPS)}, functional=True),
    "functional async": Case({**AVERAGES, "refresh_async": True, "lr": falling}, functional=True),
    "functional by trace": Case(BY_TRACE, functional=True),
    "functional sampled": Case({"fisher": "sampled", "likelihood": "categorical"}, functional=True),
    "functional adapts": Case(ADAPTS, functional=True),
    "functional many": Case(MANY, functional=True),
    "functional auto": Case({"block_size": "auto", "inverse": "eva", "factor_decay": 0.5}, functional=True),
    "functional, ranks' checkpoint": Case(
        {**AVERAGES, "refresh": thor_fx.Staggered(2)}, functional=True,
        save=_save_as_ranks_do, load=_load_as_ranks_do,
    ),
}  # fmt: skip


def digest(nest: Any) -> str:
    """Of a nest of tensors and of all else that it holds: equal where every bit is."""
    found = hashlib.sha256()
    leaves = pytree.tree_flatten_with_path(nest)[0]
    for path, leaf in sorted(leaves, key=lambda found: pytree.keystr(found[0])):
        value = repr(leaf)
        if isinstance(leaf, Tensor):
            value = f"{leaf.dtype} {tuple(leaf.shape)}"
            found.update(leaf.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        found.update(f"{pytree.keystr(path)} {value}\n".encode())
    return found.hexdigest()


class Order:
    """The rows of all data in an order that is drawn anew in every epoch."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(7)
        self.left: Tensor = torch.empty(0, dtype=torch.int64)

    def next(self) -> Tensor:
        if len(self.left) < ROWS:
            self.left = torch.randperm(DATA, generator=self.generator)
        rows, self.left = self.left[:ROWS], self.left[ROWS:].clone()
        return rows

    def state(self) -> Any:
        return {"generator": self.generator.get_state(), "left": self.left}

    def resume(self, saved: Any) -> None:
        self.generator.set_state(saved["generator"])
        self.left = saved["left"]


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(DATA, IN, generator=generator), torch.randint(CLASSES, (DATA,), generator=generator)


def fresh(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    return make()


class DropIn:
    """A training through the drop-in door."""

    def __init__(self, case: Case) -> None:
        self.case, self.steps = case, 0
        self.model = thor_fx.compile(fresh(case.model), backend="eager")
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=2, enabled=case.scaled)
        own = [{"params": ["first.weight", "norm.bias"], "lr": 0.02, "damping": 0.3, "momentum": 0.5}]
        self.optimizer = thor_fx.Thor(
            self.model, **{**SETTINGS, **case.options}, params=own if case.groups else None,
            loss_scale=self.scaler if case.scaled else 1.0,
        )  # fmt: skip
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 3, 0.7) if case.scheduled else None

    def take(self, x: Tensor, y: Tensor) -> None:
        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(x.to(next(self.model.parameters()).dtype)), y)
            self.scaler.scale(loss).backward()
            return loss

        if self.case.scaled:
            closure()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step(closure)
        if self.scheduler is not None:
            self.scheduler.step()
        self.optimizer.zero_grad()
        self.steps += 1

    def state(self) -> Any:
        found = {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler}
        if self.scheduler is not None:
            found["scheduler"] = self.scheduler
        passes = getattr(self.model, "passes", 0)
        return {
            **{name: each.state_dict() for name, each in found.items()},
            "steps": self.steps,
            "passes": passes,
        }

    def resume(self, saved: Any) -> None:
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(saved["scheduler"])
        self.steps = saved["steps"]
        if isinstance(self.model, Branching):
            self.model.passes = saved["passes"]


class Functional:
    """A training through the functional door; what resumes calls no ``init``."""

    def __init__(self, case: Case) -> None:
        model = fresh(case.model)
        self.params: Any = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.buffers: Any = {name: b.detach().clone() for name, b in model.named_buffers()}

        def loss_fn(params: Any, buffers: Any, x: Tensor, y: Tensor) -> Any:
            now = dict(buffers)
            loss = F.cross_entropy(functional_call(model, (params, now), (x,)), y)
            return loss, (now, None)

        tx = thor_fx.thor(**{**SETTINGS, **case.options})
        self.step = thor_fx.compile_step(loss_fn, tx, backend="eager")
        self.progress: thor_fx.StepState | None = None

    @property
    def steps(self) -> int:
        return 0 if self.progress is None else self.progress.step

    def take(self, x: Tensor, y: Tensor) -> None:
        if self.progress is None:
            self.progress = self.step.init(self.params, x, y, buffers=self.buffers)
        self.params, self.progress, _ = self.step(self.params, self.progress, x, y)

    def state(self) -> Any:
        return {"params": self.params, "state": self.progress}

    def resume(self, saved: Any) -> None:
        self.params, self.progress = saved["params"], saved["state"]


def train(case: Case, folder: Path, steps: int = STEPS, kill: "Kill | None" = None) -> None:
    """Train from the last checkpoint of ``folder``, or from the start; write it and the log."""
    x, y = data()
    training: DropIn | Functional = (Functional if case.functional else DropIn)(case)
    order = Order()
    torch.manual_seed(11)
    saved = case.load(folder)
    if saved is not None:
        training.resume(saved["training"])
        order.resume(saved["order"])
        torch.set_rng_state(saved["random"])
    first = training.steps
    while training.steps < steps:
        rows = order.next()
        training.take(x[rows], y[rows])
        state = {"training": training.state(), "order": order.state(), "random": torch.get_rng_state()}
        if kill is not None and kill.point is not None and training.steps > first + kill.line:
            POINTS[kill.point]()
        case.save(folder, training.steps, state)
        write_line(folder, f"{training.steps} {digest(state)}")


def write_line(folder: Path, text: str) -> None:
    """One call of the system, so that a kill leaves whole lines."""
    log = os.open(folder / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(log, f"{text}\n".encode())
    os.close(log)


def read_log(folder: Path) -> list[tuple[int, str]]:
    """The steps taken so far, by all processes, and the digest after each."""
    file = folder / "log"
    lines = file.read_text().splitlines() if file.exists() else []
    return [(int(line.split()[0]), line.split()[1]) for line in lines]


# --- kills ---------------------------------------------------------------------------------------------


def die(*_: Any, **__: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # not reached


def in_half_of_the_file() -> None:
    """Die when half of what a checkpoint holds has been written."""
    whole = torch.save

    def half(state: Any, stream: Any, **kwargs: Any) -> None:
        start = stream.tell()
        whole(state, stream, **kwargs)
        stream.truncate(start + (stream.tell() - start) // 2)
        die()

    torch.save = half


def before_the_name() -> None:
    """Die when all has been written, under a name that nobody looks for."""
    Path.rename = Path.replace = die  # type: ignore[assignment, method-assign]


def behind_the_name() -> None:
    """Die when the checkpoint is complete, and the log does not say so."""
    os.write = die


POINTS = in_half_of_the_file, before_the_name, behind_the_name
"""What a child does to itself in the step in which it is to die."""


@dataclass
class Kill:
    """When a process is killed.

    Attributes:
        line: after so many further steps.
        pause: and so many seconds.
        point: or in the next save, at one of :data:`POINTS`.
    """

    line: int
    pause: float
    point: int | None = None

    @classmethod
    def drawn(cls, source: random.Random) -> "Kill":
        line = source.randrange(STEPS // 2)
        if source.random() < 0.5:
            return cls(line, 0.0, source.randrange(len(POINTS)))
        # half of the others while the process still compiles
        return cls(0, source.uniform(0, 1)) if source.random() < 0.5 else cls(line, source.uniform(0, 0.02))


def child(case: Case, folder: Path, kill: Kill | None = None) -> int:
    """Train in a process of its own; how that ended."""
    before, pid = len(read_log(folder)), os.fork()
    if pid == 0:
        status = 1
        try:
            train(case, folder, kill=kill)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if kill is not None and kill.point is None:
        while len(read_log(folder)) < before + kill.line:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                break
            time.sleep(0.001)
        time.sleep(kill.pause)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def runs(case: Case, folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Train undisturbed, and with kills; where a run ends before its kill, another begins."""
    source, done = random.Random(seed), 0
    whole, cut = folder / "whole", folder / "cut"
    whole.mkdir()
    codes, logs = [child(case, whole)], []
    while True:
        cut.mkdir()
        code = 0
        while done < kills and (code := child(case, cut, Kill.drawn(source))) == -signal.SIGKILL:
            done += 1
        if code not in {0, -signal.SIGKILL}:
            codes.append(code)
            break
        codes.append(child(case, cut))
        logs.append(read_log(cut))
        if done == kills:
            break
        shutil.rmtree(cut)
    return {"codes": codes, "kills": done, "whole": read_log(whole), "logs": logs}


def import_what_a_training_does() -> None:
    """So that children need not; torch for GPUs allows no fork behind a backward pass."""

    def two_trainings(folder: Path) -> None:
        for name in ("plain", "functional"):
            (folder / name).mkdir()
            train(CASES[name], folder / name, steps=5)

    with tempfile.TemporaryDirectory() as folder:
        if torch.version.cuda is None:
            two_trainings(Path(folder))
            return
        pid, names = os.fork(), Path(folder) / "names"
        if pid == 0:
            two_trainings(Path(folder))
            names.write_text(" ".join(sys.modules))
            os._exit(0)
        os.waitpid(pid, 0)
        for name in names.read_text().split():
            with contextlib.suppress(ImportError):
                importlib.import_module(name)


def serve() -> None:
    """Read a request a line, write an answer a line, until there are none."""
    import_what_a_training_does()
    for line in sys.stdin:
        asked = json.loads(line)
        with tempfile.TemporaryDirectory() as folder:
            found = runs(CASES[asked["case"]], Path(folder), asked["kills"], asked["seed"])
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    serve()
