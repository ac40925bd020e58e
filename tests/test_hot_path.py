"""What a step costs besides its arithmetic: no Python per layer, no recompilation, no wait for the device."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

import thor_fx
from late_words import late_words
from training import CLASSES, IN, batches, build, classifier_loss, mlp, snapshot

SETTINGS: dict[str, Any] = {"lr": 0.05, "damping": 0.1, "momentum": 0.9, "frequency": 5}
SCHEDULES = {"lr": lambda step: 0.05 / (1 + step), "damping": lambda step: 0.1 * 0.99**step}
REFRESHED = {"factor_decay": 0.9, "refresh": thor_fx.Every(20)}

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "schedules": SCHEDULES,
    "every link": {
        "weight_decay": 0.01,
        "enable_clip_grad": True,
        "use_nesterov": True,
        "kl_clip": 1e-3,
        "fallback": "adamw",
    },
    "refreshed between steps": REFRESHED,
    "recommended": {"preset": "recommended"},
}


def deep(layers: int) -> nn.Module:
    """A net of so many layers, all but the last of one shape."""
    hidden = [part for _ in range(layers - 1) for part in (nn.Linear(IN, IN), nn.Tanh())]
    return nn.Sequential(*hidden, nn.Linear(IN, CLASSES))


# --- the drop-in update is one compiled call ----------------------------------------------------------------


class Calls:
    """Counts the calls of compiled updates, which then do nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0

        def compile_nothing(*_: Any, **__: Any) -> Callable[..., tuple[()]]:
            def run(*_: Tensor) -> tuple[()]:
                self.count += 1
                return ()

            return run

        monkeypatch.setattr("thor_fx.compiled_update.compile_graph", compile_nothing)


class Operators(TorchDispatchMode):
    """Keeps the names of all operators that run one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def one_by_one(layers: int, calls: Calls, **settings: Any) -> list[list[str]]:
    """What runs outside of the one compiled call, by step: four plain steps, and the factor step after."""
    model = thor_fx.compile(build(lambda: deep(layers)), backend="aot_eager")
    optimizer, found = thor_fx.Thor(model, **{**SETTINGS, **settings}), []
    for x, y in batches(11):
        F.cross_entropy(model(x), y).backward()
        with Operators() as operators:
            optimizer.step()
        optimizer.zero_grad()
        assert calls.count == 1
        calls.count = 0
        found.append([name for name in operators.seen if name.startswith("aten.")])
    return found[6:]  # the first steps of either kind trace the update


GROUPS = [{"params": ["0.weight", "0.bias"], "lr": 0.1}]


@pytest.mark.parametrize("groups", [None, GROUPS], ids=["one group", "two groups"])
@pytest.mark.parametrize("settings", [{}, REFRESHED, SCHEDULES], ids=["plain", "refreshed", "schedules"])
def test_a_step_is_one_compiled_call_however_many_layers_there_are(monkeypatch, groups, settings):
    calls = Calls(monkeypatch)
    late_words(monkeypatch)
    few, many = (one_by_one(layers, calls, params=groups, **settings) for layers in (2, 12))
    for step, (one, other) in enumerate(zip(few, many, strict=True)):
        assert Counter(one) == Counter(other), f"step {step}"
    changing = 0 if settings is not SCHEDULES else 2 if groups is None else 3  # one group has its own lr
    word = ["aten.select.int", "aten.clone.default"]  # of the step, to the host
    for operators in many[:4]:  # the tensors of the numbers that have changed
        assert operators == ["aten.full.default"] * changing + word


# --- nothing is compiled twice -------------------------------------------------------------------------


class Compilations:
    """Counts all graphs that are compiled: by Dynamo, and by us."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ours = 0
        for module in ("thor_fx.step", "thor_fx.compiled_update"):
            monkeypatch.setattr(f"{module}.compile_graph", self._counted)

    def _counted(self, gm: Any, fakes: Any, **_: Any) -> Any:
        self.ours += 1
        return gm

    @property
    def all(self) -> tuple[int, int]:
        return self.ours, counters["stats"]["unique_graphs"]


def drop_in(**settings: Any) -> Iterator[None]:
    """Train through the drop-in door, one step at a time, for ever."""
    model = thor_fx.compile(build(mlp), backend="aot_eager")
    optimizer = thor_fx.Thor(model, **{**SETTINGS, **settings})
    for x, y in itertools.cycle(batches(3)):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield


def functional(**settings: Any) -> Iterator[None]:
    """Train through the functional door, one step at a time, for ever."""
    model = build(mlp)
    tx = thor_fx.thor(**{**SETTINGS, **settings})
    step = thor_fx.compile_step(classifier_loss(model), tx, backend="eager")
    params: Any = snapshot(dict(model.named_parameters()))
    state = step.init(params, *batches(1)[0])
    for batch in itertools.cycle(batches(3)):
        params, state, _ = step(params, state, *batch)
        yield


DOORS = pytest.mark.parametrize("door", [drop_in, functional])


@DOORS
@pytest.mark.parametrize("name", VARIANTS)
def test_fifty_steps_with_schedules_compile_nothing_anew(monkeypatch, door, name):
    compilations = Compilations(monkeypatch)
    training = door(**{**VARIANTS[name], **SCHEDULES})
    for _ in range(12):  # every kind of step has been seen
        next(training)
    assert compilations.all > (0, 0)
    before = compilations.all
    for _ in range(50):
        next(training)
    assert compilations.all == before


# --- no wait for the device ----------------------------------------------------------------------------

READS = ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__float__", "__int__", "__index__")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The values that have been read to the host: by Python, or by a graph of ours when it is compiled."""
    found: list[str] = []

    def told(name: str) -> Callable[..., Any]:
        original = getattr(Tensor, name)

        def read(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            found.append(name)
            return original(self, *args, **kwargs)

        return read

    for name in READS:
        monkeypatch.setattr(Tensor, name, told(name))
    late_words(monkeypatch)

    def inspected(gm: fx.GraphModule, fakes: Any, **_: Any) -> Any:
        targets = {str(node.target) for node in gm.graph.nodes}
        found.extend(target for target in targets if target.startswith(HOST))
        return gm

    for module in ("thor_fx.step", "thor_fx.compiled_update"):
        monkeypatch.setattr(f"{module}.compile_graph", inspected)
    return found


HOST = ("aten._local_scalar_dense", "aten.item", "aten.is_nonzero", "aten.equal", "aten.nonzero")


def waits(training: Iterator[None], reads: list[str]) -> list[str]:
    """What one step reads."""
    reads.clear()
    next(training)
    return list(reads)


def test_reads_are_seen(reads):
    one = torch.ones(())
    for read in (float, int, bool, Tensor.item, Tensor.tolist):
        read(one)
    assert len(reads) == 5


@DOORS
@pytest.mark.parametrize("name", VARIANTS)
def test_only_the_first_step_waits(door, name, reads):
    training = door(**VARIANTS[name])
    assert waits(training, reads), "it asks whether the first factors were any good"
    for step in range(1, 12):
        assert waits(training, reads) == [], f"step {step}"


@DOORS
def test_a_step_that_is_skipped_does_not_wait(monkeypatch, door, reads):
    data = batches(3)
    data[1][0][0, 0] = float("nan")
    monkeypatch.setitem(globals(), "batches", lambda count: data[:count])
    training = door()
    next(training)
    for step in range(1, 8):
        assert waits(training, reads) == [], f"step {step}"


@pytest.mark.gpu
@DOORS
@pytest.mark.parametrize("name", VARIANTS)
def test_no_synchronisation_on_a_gpu(monkeypatch, door, name, reads):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    with torch.device("cuda"):
        data = [(x.cuda(), y.cuda()) for x, y in batches(3)]
    made = build(mlp).cuda()
    monkeypatch.setitem(globals(), "batches", lambda count: data[:count])
    monkeypatch.setitem(globals(), "build", lambda _: made)
    training = door(**VARIANTS[name])
    for _ in range(12):
        next(training)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(12):
            next(training)
    finally:
        torch.cuda.set_sync_debug_mode("default")
