"""A rank that is lost ends the run of all, soon and with a reason; a restart continues from a checkpoint."""

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import losing_once
import losing_ranks
from losing_ranks import EXIT_CODE, FOREVER, LOST_BEFORE, TIMEOUT
from ranks import launched

if not torch.distributed.is_available():
    pytest.skip("no torch.distributed here", allow_module_level=True)

from thor_fx.distributed import checkpoint
from thor_fx.distributed.collectives import World
from thor_fx.distributed.faults import waiting_for_others

EXAMPLE = Path(__file__).parents[1] / "examples" / "ddp_digits.py"
EPOCHS, STEPS_PER_EPOCH = 3, 11
BOUND = 120
"""Seconds; to import torch and to compile takes most of them where other tests run beside."""

NOTE = r"Rank 0 was waiting for the other ranks \(2 in all\) in step {}, and one of them has ended or did not"


def losing(door: str, how: str) -> str:
    """The error text of a launch that has to fail, in time."""
    assert TIMEOUT.total_seconds() < BOUND < FOREVER
    start = time.monotonic()
    done = launched(Path(losing_ranks.__file__), [door, how], 2, timeout=BOUND)
    assert done.returncode != 0
    assert time.monotonic() - start < BOUND
    return done.stderr


@pytest.mark.parametrize("door", ["ddp", "group", "functional"])
def test_a_rank_that_ends_ends_the_run_and_is_named(door):
    text = losing(door, "ends")
    assert re.search(rf"rank +: 1 \(local_rank: 1\)\n +exitcode +: {EXIT_CODE}", text), text
    assert re.search("RuntimeError: .*gloo.*(reset|closed) by peer", text), text
    if door != "ddp":  # there torch waits in backward, and a step is not reached
        assert re.search(NOTE.format(LOST_BEFORE), text), text


def test_a_rank_that_hangs_ends_the_run_after_the_timeout():
    text = losing("group", "hangs")
    assert re.search(rf"Timed out waiting {TIMEOUT.seconds}000ms", text), text
    assert re.search(NOTE.format(LOST_BEFORE), text), text


def noted(error: RuntimeError, world: World | None) -> list[str]:
    with pytest.raises(RuntimeError) as caught, waiting_for_others(world, "in step 3"):
        raise error
    assert caught.value is error
    return getattr(error, "__notes__", [])


def test_errors_of_collectives_are_explained_and_no_others():
    world = World("0", 2, 0, None)
    (note,) = noted(torch.distributed.DistBackendError("NCCL error"), world)
    assert re.match(NOTE.format(3), note)
    assert len(noted(RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error"), world)) == 1
    assert noted(RuntimeError("The size of tensor a (3) must match"), world) == []
    assert noted(RuntimeError("gloo"), None) == []


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("uninterrupted")
    done = launched(EXAMPLE, arguments(folder), 2, timeout=BOUND)
    assert done.returncode == 0, done.stderr
    return folder


def arguments(folder: Path) -> list[str]:
    return ["aot_eager", "--checkpoints", str(folder), "--epochs", str(EPOCHS)]


@pytest.mark.parametrize("lost_in", [f"step {STEPS_PER_EPOCH + 4}", "save 2"])
def test_a_restart_continues_from_the_last_checkpoint(uninterrupted, tmp_path, monkeypatch, lost_in):
    monkeypatch.setenv("LOST_IN", lost_in)
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # docs/distributed.md says why
    script, given = Path(losing_once.__file__), [str(EXAMPLE), *arguments(tmp_path)]
    done = launched(script, given, 2, timeout=BOUND, options=["--max-restarts=1"])
    assert done.returncode == 0, done.stderr
    told = [line.partition(": loss")[0] for line in done.stdout.splitlines()]
    assert told == ["epoch 1", f"resumed from {tmp_path / '1'}", "epoch 2", "epoch 3"]
    assert checkpoint.newest(tmp_path) == tmp_path / str(EPOCHS)
    assert_equal(*(checkpoint.load(folder / str(EPOCHS)) for folder in (tmp_path, uninterrupted)))


def assert_equal(one: Any, other: Any) -> None:
    """Parameters and state are the same, bit by bit."""
    assert one["epochs"] == other["epochs"] == EPOCHS
    pairs = zip(*map(pytree.tree_leaves, (one, other)), strict=True)
    for mine, theirs in pairs:
        if isinstance(mine, torch.Tensor):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
        else:
            assert mine == theirs
