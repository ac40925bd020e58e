"""Files of checkpoints: whole or not there, without code, and what is not what was written is refused."""

import ast
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import thor_fx
from resume_runs import CASES, Functional, data, digest
from thor_fx import checkpoint
from thor_fx.distributed import checkpoint as of_ranks

ROOT = Path(__file__).parents[1]
SOURCES = [
    path for folder in ("thor_fx", "passes", "examples") for path in sorted((ROOT / folder).rglob("*.py"))
]

STATE = {"weight": torch.arange(300.0), "epoch": 3}


def test_saving_replaces_the_file_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "checkpoint.pt"
    checkpoint.save(file, STATE)

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.os, "fsync", fail)
        with pytest.raises(OSError, match="no space left"):
            checkpoint.save(file, {"weight": torch.zeros(2)})
    assert digest(checkpoint.load(file)) == digest(STATE)
    checkpoint.save(file, {"epoch": 4})
    assert checkpoint.load(file) == {"epoch": 4}
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("keep", [0, 10, 500, -200, -5])
def test_a_part_of_a_file_is_refused(tmp_path: Path, keep: int):
    file = tmp_path / "checkpoint.pt"
    torch.save(STATE, file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"checkpoint.pt' is no checkpoint, or .* a part of one"):
        checkpoint.load(file)


def test_any_flipped_bit_is_refused_or_harmless(tmp_path: Path):
    file, expected = tmp_path / "checkpoint.pt", digest(STATE)
    checkpoint.save(file, STATE)
    whole, refused = file.read_bytes(), 0
    places = range(0, len(whole), 7)
    for place in places:
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            found = checkpoint.load(file)
        except (ValueError, RuntimeError):
            refused += 1
        else:  # in what fills up a record, or a date
            assert digest(found) == expected, place
    assert refused > len(places) / 3


def test_a_flipped_bit_of_a_weight_is_named_and_torch_does_not_see_it(tmp_path: Path):
    file = tmp_path / "checkpoint.pt"
    torch.save(STATE, file)
    whole = bytearray(file.read_bytes())
    place = whole.index(STATE["weight"][100:110].numpy().tobytes())
    whole[place] ^= 4
    file.write_bytes(whole)
    assert not torch.equal(torch.load(file, weights_only=True)["weight"], STATE["weight"])
    with pytest.raises(ValueError, match=r"checkpoint.pt' is damaged: 'checkpoint/data/0' .*CRC-32"):
        checkpoint.load(file)


def test_a_flipped_bit_is_named_in_a_checkpoint_of_ranks(tmp_path: Path):
    of_ranks.save(tmp_path / "1", STATE)
    (file,) = (tmp_path / "1").glob("*.distcp")
    whole = bytearray(file.read_bytes())
    whole[whole.index(STATE["weight"][100:110].numpy().tobytes())] ^= 4
    file.write_bytes(whole)
    with pytest.raises(ValueError, match=r"1' is damaged.* \(tensor 'weight' is .* and was saved as"):
        of_ranks.load(tmp_path / "1")


class Code:
    """Something that runs when it is loaded."""

    def __reduce__(self) -> tuple[object, ...]:
        return print, ("loaded",)


def test_nothing_runs_when_a_file_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    torch.save({"x": Code()}, tmp_path / "foreign.pt")
    with pytest.raises(Exception, match="print"):
        checkpoint.load(tmp_path / "foreign.pt")
    with pytest.raises(TypeError, match="print would not be loaded again"):
        of_ranks.save(tmp_path / "1", {"x": Code()})
    assert not (tmp_path / "1").exists()
    assert capsys.readouterr().out == ""


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    found = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return [(ast.unparse(node.func), node) for node in found]


def test_our_code_loads_nothing_that_could_run():
    loads = [(path, node) for path in SOURCES for name, node in calls(path) if name == "torch.load"]
    assert [path.name for path, _ in loads] == ["checkpoint.py", "sealed.py"]
    for _, node in loads:
        assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
    pickled = re.compile(r"(c?[pP]ickle|dill|joblib|shelve|marshal)\.(loads?|Unpickler|open)$")
    assert not [(path, name) for path in SOURCES for name, _ in calls(path) if pickled.match(name)]


# --- of another model -------------------------------------------------------------------------------------


def step_of(model: nn.Module) -> tuple[nn.Module, thor_fx.Thor]:
    """A model and its optimizer after a step."""
    net = thor_fx.compile(model, backend="eager")
    optimizer = thor_fx.Thor(net, lr=0.1, damping=0.1, momentum=0.9, frequency=4)
    net(torch.eye(4)).square().mean().backward()
    optimizer.step()
    return net, optimizer


class Named(nn.Module):
    def __init__(self, first: str, second: str, hidden: int = 3) -> None:
        super().__init__()
        self.parts = first, second
        self.add_module(first, nn.Linear(4, hidden))
        self.add_module(second, nn.Linear(hidden, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule(self.parts[1])(self.get_submodule(self.parts[0])(x).tanh())


@pytest.fixture(scope="module")
def saved() -> dict[str, object]:
    return step_of(Named("a", "b"))[1].state_dict()


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (
            lambda: Named("a", "b", hidden=5),
            r"momentum of 'a.weight' has shape \(3, 4\), and the parameter \(5, 4\)",
        ),
        (lambda: Named("a", "c"), "where it has 'b.weight', this one has 'c.weight'"),
        (lambda: nn.Linear(4, 2), r"its groups have \[4\] parameters, those of this one \[2\]"),
    ],
)
def test_the_state_of_another_model_is_refused_by_an_optimizer(saved, model, text):
    other = thor_fx.Thor(thor_fx.compile(model(), backend="eager"), lr=0.1, damping=0.1, momentum=0.9)
    before = digest(other.state_dict())
    with pytest.raises(ValueError, match=text):
        other.load_state_dict(saved)
    assert digest(other.state_dict()) == before


def test_a_state_without_some_inverses_is_refused(saved):
    parts = {place: dict(entry) for place, entry in saved["state"].items()}
    del parts[2]["inverses"]
    other = thor_fx.Thor(thor_fx.compile(Named("a", "b"), backend="eager"), lr=0.1, damping=0.1, momentum=0.9)
    with pytest.raises(ValueError, match=r"has lost the inverses of \['b.weight'\]"):
        other.load_state_dict({**saved, "state": parts})
    with pytest.raises(ValueError, match="with 'state' and 'param_groups': it has"):
        other.load_state_dict(Named("a", "b").state_dict())


def test_the_state_of_another_model_is_refused_by_a_step(tmp_path: Path):
    def step_and_params(hidden: int) -> tuple[thor_fx.CompiledStep, dict[str, Tensor]]:
        def loss_fn(params: dict[str, Tensor], x: Tensor) -> Tensor:
            return ((x @ params["a"].T).tanh() @ params["b"].T).square().mean()

        tx = thor_fx.thor(lr=0.1, damping=0.1, momentum=0.9)
        params = {"a": torch.ones(hidden, 4), "b": torch.ones(2, hidden)}
        return thor_fx.compile_step(loss_fn, tx, backend="eager"), params

    step, params = step_and_params(3)
    checkpoint.save(tmp_path / "checkpoint.pt", step.init(params, torch.eye(4)))
    other, params = step_and_params(5)
    before = digest(params)
    with pytest.raises(ValueError, match="state does not belong to this step"):
        other(params, checkpoint.load(tmp_path / "checkpoint.pt"), torch.eye(4))
    assert digest(params) == before


# --- every state ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.functional])
def test_the_state_of_every_step_is_read_without_running_code(tmp_path: Path, name: str):
    training = Functional(CASES[name])
    x, y = data()
    training.progress = training.step.init(training.params, x, y, buffers=training.buffers)
    checkpoint.save(tmp_path / "checkpoint.pt", training.state())
    assert digest(checkpoint.load(tmp_path / "checkpoint.pt")) == digest(training.state())
