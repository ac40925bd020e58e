"""A checkpoint continues a run as if it had not been interrupted, on any number of ranks; half a one is none.

One launch for each number of ranks; :mod:`checkpoint_runs` has the code that the ranks run.
"""

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import checkpoint_runs
from checkpoint_runs import DOORS, SAVED_AFTER, trained
from ranks import Results, all_equal, run_on_ranks, shared
from training import assert_moved, assert_same, identical

if not torch.distributed.is_available():
    pytest.skip("no torch.distributed here", allow_module_level=True)

from torch.distributed.checkpoint.api import CheckpointException

from thor_fx.distributed import checkpoint, sealed
from thor_fx.step import StepState

SCRIPT = Path(checkpoint_runs.__file__)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parent = shared(tmp_path_factory) / "checkpoints of ranks"
    parent.mkdir(exist_ok=True)
    return parent


@pytest.fixture(scope="session")
def two(folder: Path) -> Results:
    """Both what is not interrupted, which saves, and what resumes."""
    names = [f"{run} {door}" for run in ("whole", "resumed") for door in DOORS]
    return run_on_ranks([*names, "own state"], 2, folder / "two", SCRIPT)


@pytest.fixture(scope="session")
def four(two: Results, folder: Path) -> Results:
    return run_on_ranks([f"resumed {door}" for door in DOORS], 4, folder / "four", SCRIPT)


@pytest.mark.parametrize("door", DOORS)
def test_as_many_ranks_continue_bit_by_bit(two, door):
    whole, resumed = all_equal(two[f"whole {door}"]), all_equal(two[f"resumed {door}"])
    assert_moved(whole[SAVED_AFTER:], whole[SAVED_AFTER - 1])
    assert len(resumed) == len(whole) - SAVED_AFTER > 0
    assert all(map(identical, resumed, whole[SAVED_AFTER:]))


@pytest.mark.parametrize("door", DOORS)
def test_other_numbers_of_ranks_continue(two, four, folder, door):
    whole = all_equal(two[f"whole {door}"])[SAVED_AFTER:]
    assert_same(all_equal(four[f"resumed {door}"]), whole, rtol=1e-6)
    assert_same(trained(door, folder / "checkpoints", resumes=True), whole, rtol=1e-6)


def test_a_state_that_is_each_ranks_own_is_refused_on_all_of_them(two):
    for message in two["own state"]:
        assert message.startswith("ValueError: state"), message
        assert "save it rank by rank with torch.save" in message


def equal(one: Any, other: Any) -> bool:
    """Whether two nests are the same, types and bits included."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        kinds = [(each.dtype, each.shape, each.requires_grad) for each in (one, other)]
        return kinds[0] == kinds[1] and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def test_a_nest_comes_back_as_it_was(tmp_path: Path):
    state = {
        "state": {0: {"weights": [torch.randn(3, 2)[:, 1], (torch.zeros(0, 4), None)]}, 7: {}},
        "step": StepState(3, {"x": (torch.tensor(True), torch.tensor(2.5, dtype=torch.bfloat16))}, due=5),
        "params": {"trained": nn.Parameter(torch.ones(2)), "frozen": nn.Parameter(torch.arange(2), False)},
        "model": OrderedDict({"0.weight": torch.full((2, 2), torch.nan).nan_to_num(1.0)}),
        "plain": ["text", 1.5, torch.float64, True],
    }
    checkpoint.save(tmp_path / "1", state)
    assert equal(checkpoint.load(tmp_path / "1"), state)


def test_one_tensor_in_two_places_is_one_again(tmp_path: Path):
    tied = torch.ones(2)
    checkpoint.save(tmp_path / "1", {"left": tied, "right": [tied]})
    found = checkpoint.load(tmp_path / "1")
    assert found["left"] is found["right"][0]


def test_torchs_own_tools_read_the_weights(tmp_path: Path):
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    checkpoint.save(tmp_path / "1", {"model": model.state_dict(), "epoch": 1})
    with pytest.warns(UserWarning, match="single process"):
        torch.distributed.checkpoint.load({"model": other.state_dict()}, checkpoint_id=tmp_path / "1")
    assert identical(other.state_dict(), model.state_dict())


def test_the_newest_is_the_highest_number(tmp_path: Path):
    assert checkpoint.newest(tmp_path / "missing") is None
    for name in ("epoch-9", "epoch-10", "notes"):
        checkpoint.save(tmp_path / name, {"name": name})
    (tmp_path / "epoch-11").mkdir()
    assert checkpoint.newest(tmp_path) == tmp_path / "epoch-10"


@pytest.mark.parametrize("method", ["write_data", "finish"])
def test_half_a_checkpoint_is_none_and_can_be_written_again(tmp_path, monkeypatch, method):
    checkpoint.save(tmp_path / "1", {"x": torch.ones(2)})

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(torch.distributed.checkpoint.FileSystemWriter, method, fail)
        with pytest.raises(CheckpointException, match="no space left"):
            checkpoint.save(tmp_path / "2", {"x": torch.zeros(2)})
    assert (tmp_path / "2").is_dir()
    assert checkpoint.newest(tmp_path) == tmp_path / "1"
    with pytest.raises(FileNotFoundError, match=r"2' holds no complete checkpoint: newest"):
        checkpoint.load(tmp_path / "2")
    checkpoint.save(tmp_path / "2", {"x": torch.zeros(3)})
    assert equal(checkpoint.load(tmp_path / "2"), {"x": torch.zeros(3)})


def test_a_checkpoint_is_not_written_over(tmp_path: Path):
    checkpoint.save(tmp_path / "1", {"x": torch.ones(2)})
    with pytest.raises(FileExistsError, match="give every checkpoint a folder of its own"):
        checkpoint.save(tmp_path / "1", {"x": torch.zeros(2)})
    assert equal(checkpoint.load(tmp_path / "1"), {"x": torch.ones(2)})


def test_a_checkpoint_of_others_is_named(tmp_path: Path):
    with pytest.warns(UserWarning, match="single process"):
        torch.distributed.checkpoint.save({"x": torch.ones(2)}, checkpoint_id=tmp_path / "1")
    with pytest.raises(ValueError, match=r"not written by thor_fx.distributed.checkpoint.save: read it with"):
        checkpoint.load(tmp_path / "1")


# --- damage, versions, and what may be loaded --------------------------------------------------------

DATA, METADATA = "__0_0.distcp", ".metadata"
DAMAGED = r"the checkpoint in '.*1' is damaged, or not of thor_fx"


@pytest.mark.parametrize("text", [b"a value of ours", torch.full((9,), torch.pi).numpy().tobytes()])
def test_a_wrong_bit_is_seen(tmp_path: Path, text: bytes):
    """In a value and in a tensor: torch reads either without a word."""
    checkpoint.save(tmp_path / "1", {"name": "a value of ours", "x": torch.full((9,), torch.pi)})
    file = tmp_path / "1" / DATA
    content = bytearray(file.read_bytes())
    content[content.index(text) + 5] ^= 4
    file.write_bytes(content)
    with pytest.raises(ValueError, match=DAMAGED + r".*(tensor 'x' is|the values besides tensors are not)"):
        checkpoint.load(tmp_path / "1")


@pytest.mark.parametrize("name", [DATA, METADATA])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_a_part_of_a_file_is_refused(tmp_path: Path, name: str, kept: float):
    checkpoint.save(tmp_path / "1", {"x": torch.ones(9)})
    content = (tmp_path / "1" / name).read_bytes()
    (tmp_path / "1" / name).write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=DAMAGED):
        checkpoint.load(tmp_path / "1")


def test_a_file_that_is_missing_is_named(tmp_path: Path):
    checkpoint.save(tmp_path / "1", {"x": torch.ones(9)})
    (tmp_path / "1" / DATA).unlink()
    with pytest.raises(ValueError, match=DAMAGED + ".*No such file"):
        checkpoint.load(tmp_path / "1")


class Unknown:
    """What pickle would load."""


def test_what_would_not_be_loaded_again_is_not_saved(tmp_path: Path):
    with pytest.raises(TypeError, match=r"Unknown would not be loaded again: .*add_safe_globals"):
        checkpoint.save(tmp_path / "1", {"own": Unknown()})
    assert not (tmp_path / "1").exists()
    with torch.serialization.safe_globals([Unknown]):
        checkpoint.save(tmp_path / "1", {"own": Unknown()})
        assert type(checkpoint.load(tmp_path / "1")["own"]) is Unknown
    with pytest.raises(pickle.UnpicklingError, match="Unknown"):
        checkpoint.load(tmp_path / "1")


def test_a_checkpoint_of_version_0_is_loaded(tmp_path: Path):
    """It had no seal, and the nest as an object."""
    state = {"x": torch.ones(2), "step": StepState(3, (torch.zeros(1),)), "epoch": 1}
    tensors, nest = checkpoint._parted(state)
    with pytest.warns(UserWarning, match="single process"):
        torch.distributed.checkpoint.save({**tensors, checkpoint.NEST: nest}, checkpoint_id=tmp_path / "1")
    assert equal(checkpoint.load(tmp_path / "1"), state)


def test_a_checkpoint_of_a_later_version_is_refused(tmp_path: Path, monkeypatch):
    with monkeypatch.context() as later:
        later.setattr(sealed, "VERSION", 7)
        checkpoint.save(tmp_path / "1", {"x": torch.ones(2)})
    with pytest.raises(ValueError, match=r"'.*1' is of version 7 .* versions up to 3: install"):
        checkpoint.load(tmp_path / "1")


@pytest.mark.parametrize(
    ("state", "error", "text"),
    [
        ({"model": nn.Linear(1, 1)}, TypeError, r"state: 'model' is a Linear: save its state_dict\(\)"),
        ({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}, ValueError, "two tensors are called 'a.b'"),
    ],
)
def test_what_cannot_be_saved_is_refused(tmp_path, state, error, text):
    with pytest.raises(error, match=text):
        checkpoint.save(tmp_path / "1", state)
    assert not (tmp_path / "1").exists()
