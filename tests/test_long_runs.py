"""Nothing grows in a long training, whatever the shapes of its batches: ``benchmarks/long_run.py``."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import thor_fx

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "long_run.py"
STEPS, SHAPES = 4000, 100


def run(folder: Path, *arguments: str) -> dict[str, list[dict[str, Any]]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), "--json", str(folder / "looks.json"), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[dict[str, Any]]] = json.loads((folder / "looks.json").read_text())
    return found


@pytest.fixture(scope="module")
def looks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return run(tmp_path_factory.mktemp("long"), "--steps", str(STEPS), "--shapes", str(SHAPES))


@pytest.mark.parametrize("door", ["drop-in", "functional"])
def test_nothing_grows_with_the_number_of_steps(looks, door):
    assert_nothing_grows(looks[f"{door} steps"])


def assert_nothing_grows(found: list[dict[str, Any]]) -> None:
    assert len(found) == 10
    assert len({each["tensors"] for each in found[1:]}) == 1
    assert len({each["graphs"] for each in found}) == 1
    middle, end = (among(found[first : first + 3]) for first in (3, 7))
    # one object in ten steps would be more: what is kept is kept for the same few steps
    assert end["blocks"] - middle["blocks"] < (end["steps"] - middle["steps"]) / 10
    assert end["resident"] - middle["resident"] < 8e6
    early = among(found[1:4])
    assert end["milliseconds"] < 3 * early["milliseconds"]  # other processes are on this machine, too


def among(looks: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of every number: caches fill and empty, so single looks differ by dozens of blocks."""
    return {name: sorted(each[name] for each in looks)[len(looks) // 2] for name in looks[0]}


@pytest.mark.parametrize("door", ["drop-in", "functional"])
def test_shapes_share_a_few_graphs(looks, door):
    assert_few_graphs(looks[f"{door} shapes"])


def assert_few_graphs(found: list[dict[str, Any]]) -> None:
    assert found[-1]["graphs"] <= 10  # of two kinds of step: the first size, all, and sides of 1
    assert len({(each["graphs"], each["tensors"]) for each in found[len(found) // 2 :]}) == 1


def test_a_step_that_needs_a_graph_for_every_size_says_so():
    def loss_fn(params: dict[str, Tensor], x: Tensor) -> Tensor:
        rows = [x[place].sum() for place in range(x.shape[0])]
        return (x @ params["w"]).square().mean() + 0 * torch.stack(rows).sum()

    params: Any = {"w": torch.ones(4, 2)}
    tx = thor_fx.thor(lr=0.01, damping=0.1, momentum=0.9)
    step = thor_fx.compile_step(loss_fn, tx, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=2):
        state = step.init(params, torch.ones(2, 4))
        params, state, _ = step(params, state, torch.ones(3, 4))
        before = params["w"].clone()
        with pytest.raises(Exception, match="fullgraph=True") as caught:
            step(params, state, torch.ones(4, 4))
    assert "2 graphs of this step have been compiled" in caught.value.__notes__[-1]
    assert torch.equal(params["w"], before)
    step(params, state, torch.ones(3, 4))  # and sizes that there are graphs for go on


@pytest.mark.fuzz
@pytest.mark.nightly
def test_nothing_grows_in_the_whole_length(tmp_path: Path):
    for name, found in run(tmp_path).items():
        (assert_few_graphs if name.endswith("shapes") else assert_nothing_grows)(found)
