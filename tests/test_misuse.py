"""What is done to models and optimizers without a thought: it works as hoped for, or is refused in words."""

import copy
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import thor_fx
from thor_fx import compiled_update, factor_graphs, inductor
from thor_fx.torch_version import supported
from training import (
    CLASSES,
    HIDDEN,
    IN,
    Parameters,
    assert_same,
    batches,
    build,
    by_drop_in_door,
    by_functional_door,
    classifier_loss,
    compiled,
    identical,
    mlp,
    snapshot,
    train,
)

SETTINGS: dict[str, Any] = {"lr": 0.05, "damping": 0.1, "momentum": 0.9, "frequency": 2}
DATA = batches(6)


def thor(model: nn.Module, **settings: Any) -> thor_fx.Thor:
    return thor_fx.Thor(model, **{**SETTINGS, **settings})


@pytest.fixture(scope="module")
def expected() -> list[Parameters]:
    return by_drop_in_door(build(mlp), DATA, **SETTINGS)


# --- copies, threads, processes ----------------------------------------------------------------------


def test_a_copied_model_continues_with_a_new_optimizer(expected: list[Parameters]):
    model = compiled()
    optimizer = thor(model)
    train(model, optimizer, DATA[:3])
    other = thor_fx.compile(copy.deepcopy(model), backend="aot_eager")
    own = thor(other)
    own.load_state_dict(optimizer.state_dict())
    for continued in (train(other, own, DATA[3:]), train(model, optimizer, DATA[3:])):
        assert identical(continued[-1], expected[-1])


def test_models_in_threads(expected: list[Parameters]):
    doors = [by_drop_in_door, by_functional_door] * 2
    found: dict[int, list[Parameters]] = {}

    def run(place: int) -> None:
        found[place] = doors[place](models[place], DATA, **SETTINGS)

    models = [build(mlp) for _ in doors]
    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(doors))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place in range(len(doors)):
        assert_same(found[place], expected)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_that_other_processes_load(start: str, expected: list[Parameters]):
    x, y = (torch.cat(parts) for parts in zip(*DATA, strict=True))
    model = compiled()
    optimizer, loaded = thor(model), []
    loader = DataLoader(
        TensorDataset(x, y), batch_size=len(DATA[0][0]), num_workers=1, multiprocessing_context=start
    )
    for batch in loader:  # the workers start when the model is compiled already
        loaded += train(model, optimizer, [batch])
    assert_same(loaded, expected)


# --- what happens to a model on the way --------------------------------------------------------------


def test_inference_mode_leaves_no_trace(expected: list[Parameters]):
    model = compiled()
    optimizer, found = thor(model), []
    for batch in DATA:
        with torch.inference_mode():
            assert model(batch[0]).is_inference()
        found += train(model, optimizer, [batch])
    assert_same(found, expected)


def test_a_model_that_is_compiled_twice_is_compiled_once(expected: list[Parameters]):
    model = thor_fx.compile(compiled(), backend="aot_eager")
    assert_same(train(model, thor(model), DATA), expected)


def test_a_compiled_model_in_another(expected: list[Parameters]):
    model = thor_fx.compile(nn.Sequential(compiled()), backend="aot_eager")
    found = train(model, thor(model), DATA)
    assert_same([{name.partition(".")[2]: p for name, p in step.items()} for step in found], expected)


def test_a_parameter_that_is_frozen_for_a_while():
    model = compiled()
    optimizer, weight = thor(model), model[0].weight
    train(model, optimizer, DATA[:2])
    before, other = weight.detach().clone(), model[2].weight.detach().clone()
    weight.requires_grad_(False)
    train(model, optimizer, DATA[2:4])
    assert torch.equal(weight, before)
    assert not torch.equal(model[2].weight, other)
    weight.requires_grad_(True)
    train(model, optimizer, DATA[4:])
    assert not torch.equal(weight, before)


def new_weight(model: nn.Module) -> None:
    model[0].weight = nn.Parameter(torch.ones(HIDDEN, IN, dtype=torch.float64))


def new_layer(model: nn.Module) -> None:
    model[0] = nn.Linear(IN, HIDDEN).double()


def everything_new(model: nn.Module) -> None:
    model[0], model[2] = nn.Linear(IN, HIDDEN).double(), nn.Linear(HIDDEN, CLASSES).double()


@pytest.mark.parametrize("replace", [new_weight, new_layer, everything_new])
@pytest.mark.parametrize("steps", [0, 2], ids=["before the first step", "later"])
def test_replaced_parameters_are_noticed(replace: Callable[[nn.Module], None], steps: int):
    model = compiled()
    optimizer = thor(model)
    train(model, optimizer, DATA[:steps]) if steps else None
    replace(model)
    with pytest.raises(RuntimeError, match=r"replaced after Thor was made: it does not train \['0.weight'"):
        train(model, optimizer, DATA[steps:])
    own = thor(model)
    before = snapshot(dict(model.named_parameters()))
    train(model, own, DATA[:2])
    assert not any(torch.equal(before[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("steps", [2, 3], ids=["in a factor step", "in a plain step"])
def test_a_model_that_is_cast_takes_its_state_along(steps: int, expected: list[Parameters]):
    model = compiled()
    optimizer = thor(model)
    train(model, optimizer, DATA[:steps])
    model.float()
    narrow = [(x.float(), y) for x, y in DATA[steps:]]
    found = train(model, optimizer, narrow)
    assert {p.dtype for p in found[-1].values()} == {torch.float32}
    for name, p in found[-1].items():
        torch.testing.assert_close(p.double(), expected[-1][name], rtol=1e-4, atol=1e-5)
    restarted = compiled()
    restarted.load_state_dict(expected[steps - 1])
    without_state = train(restarted, thor(restarted), DATA[steps:])[-1]["0.weight"]
    assert not torch.allclose(without_state, expected[-1]["0.weight"], rtol=1e-2), "the state matters"


def test_parameters_on_two_devices_are_refused():
    model = build(mlp)
    model[2].to("meta")
    several = r"on several devices: cpu \('0.weight'\), meta \('2.weight'\)"
    with pytest.raises(ValueError, match=several):
        thor(thor_fx.compile(model, backend="aot_eager"))
    step = thor_fx.compile_step(classifier_loss(model), thor_fx.thor(**SETTINGS), backend="eager")
    with pytest.raises(ValueError, match=several):
        step.init(dict(model.named_parameters()), *DATA[0])


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(IN, CLASSES), nn.Linear(IN, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x), self.second(x)


def test_a_loss_that_uses_a_part_of_the_model():
    model = compiled(TwoHeads)
    optimizer = thor(model)
    start = model.second.weight.detach().clone()
    for used, (x, y) in zip([0, 0, 0, 1, 1, 1], DATA, strict=True):
        F.cross_entropy(model(x)[used], y).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(model.second.weight, start) == (used == 0)
        assert all(p.isfinite().all() for p in model.parameters())
    assert optimizer.coverage.layers.keys() == {"first.weight", "second.weight"}


def test_of_two_optimizers_the_first_says_that_it_gets_nothing():
    model = compiled()
    first, second = thor(model), thor(model)
    F.cross_entropy(model(DATA[0][0]), DATA[0][1]).backward()
    with pytest.raises(RuntimeError, match="another Thor was made for this model after this one"):
        first.step()
    second.step()


# --- compiling that ends early -----------------------------------------------------------------------


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_ctrl_c_while_the_model_is_compiled(monkeypatch: pytest.MonkeyPatch, expected: list[Parameters]):
    model = compiled()
    optimizer = thor(model)
    with monkeypatch.context() as patched:
        patched.setattr(factor_graphs, "survey", interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(DATA[0][0])
    assert torch.equal(model.forward(DATA[0][0]), build(mlp)(DATA[0][0]))
    assert_same(train(model, optimizer, DATA), expected)


def test_ctrl_c_while_the_update_is_compiled(monkeypatch: pytest.MonkeyPatch, expected: list[Parameters]):
    model = compiled()
    optimizer = thor(model)
    F.cross_entropy(model(DATA[0][0]), DATA[0][1]).backward()
    with monkeypatch.context() as patched:
        patched.setattr(compiled_update, "update_graph", interrupt)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    optimizer.step()  # with the factors of the same backward pass
    optimizer.zero_grad()
    assert_same(train(model, optimizer, DATA[1:]), expected[1:])


def test_gradients_that_come_before_the_second_try_add_up(monkeypatch: pytest.MonkeyPatch):
    def trained(interrupted: bool) -> Parameters:
        model = compiled()
        optimizer = thor(model)
        for place, (x, y) in enumerate(DATA[:2]):
            F.cross_entropy(model(x), y).backward()
            if interrupted and place == 0:
                with monkeypatch.context() as patched:
                    patched.setattr(compiled_update, "update_graph", interrupt)
                    with pytest.raises(KeyboardInterrupt):
                        optimizer.step()
        optimizer.step()
        return snapshot(dict(model.named_parameters()))

    assert_same([trained(True)], [trained(False)])


def fail(*_: Any, **__: Any) -> None:
    raise NotImplementedError("no code for this\nand more")


REASON = r"runs uncompiled.* because on_compile_error='eager': NotImplementedError: no code for this$"


def failing_model(on_compile_error: str) -> nn.Module:
    return thor_fx.compile(build(mlp), backend="inductor", on_compile_error=on_compile_error)


def failing_step(on_compile_error: str) -> thor_fx.CompiledStep:
    loss_fn, tx = classifier_loss(build(mlp)), thor_fx.thor(**SETTINGS)
    return thor_fx.compile_step(loss_fn, tx, backend="inductor", on_compile_error=on_compile_error)


def by_step(step: thor_fx.CompiledStep) -> list[Parameters]:
    params = snapshot(dict(build(mlp).named_parameters()))
    state, found = step.init(params, *DATA[0]), []
    for batch in DATA:
        params, state, _ = step(params, state, *batch)
        found.append(snapshot(params))
    return found


def test_what_cannot_be_compiled_runs_uncompiled(monkeypatch: pytest.MonkeyPatch, expected: list[Parameters]):
    monkeypatch.setattr(inductor, "compile_fx", fail)
    model = failing_model("eager")
    with pytest.warns(RuntimeWarning, match=REASON) as told:
        found = train(model, thor(model), DATA)
    assert_same(found, expected)
    assert len(told) == 4, "both kinds of forward, both kinds of update"
    with pytest.warns(RuntimeWarning, match=REASON):
        assert_same(by_step(failing_step("eager")), expected)


def test_what_cannot_be_compiled_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(inductor, "compile_fx", fail)
    with pytest.raises(Exception, match="no code for this"):
        failing_model("raise")(DATA[0][0])
    with pytest.raises(Exception, match="no code for this"):
        by_step(failing_step("raise"))


@pytest.mark.parametrize("make", [failing_model, failing_step])
def test_another_word_is_refused(make: Callable[[str], Any]):
    with pytest.raises(
        ValueError, match=r"on_compile_error must be one of \['raise', 'eager'\], got 'ignore'"
    ):
        make("ignore")


FULL_DISK = """
import resource, signal, sys, torch, thor_fx
model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
model = thor_fx.compile(model, on_compile_error=sys.argv[1])
opt = thor_fx.Thor(model, lr=0.1, damping=0.1, momentum=0.9, frequency=2)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))  # no file can grow any more
for _ in range(2):
    model(torch.eye(3)).square().mean().backward()
    opt.step()
print(opt.metrics()["step"])
"""


@pytest.mark.inductor
@pytest.mark.parametrize(("word", "code"), [("raise", 1), ("eager", 0)])
def test_a_full_disk(word: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    command = [sys.executable, "-W", "always::RuntimeWarning", "-c", FULL_DISK, word]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert "OSError: [Errno 27] File too large" in done.stderr
    assert done.stdout == ("2\n" if word == "eager" else "")


# --- the version of torch ----------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["2.10.1+cu130", "2.2.0", "1.13"])
def test_an_old_torch_is_refused(version: str):
    needed = rf"needs torch 2.11 to 2.15, and this is torch {version[:3]}.*>=2.11"
    with pytest.raises(ImportError, match=needed), supported(version):
        pytest.fail("nothing is imported")


def test_a_name_that_a_new_torch_does_not_have():
    needed = r"torch 2.16.0, which does not have a name .*_gone.*'torch<2.16'"
    with pytest.raises(ImportError, match=needed), supported("2.16.0"):
        from torch import _gone  # noqa: F401


@pytest.mark.parametrize("version", ["2.15.0", "2.16.0"])
def test_errors_that_have_nothing_to_do_with_torch_stay(version: str):
    with pytest.raises(ImportError, match=r"^No module named 'gone_astray'$"), supported(version):
        import gone_astray  # noqa: F401
