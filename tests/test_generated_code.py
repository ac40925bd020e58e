"""What Inductor makes of our graphs: stock code in plain steps, and nothing new in a second process."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import thor_fx
from thor_fx.compile import collector_of
from training import MODELS, batches, build

AOT_ID = re.compile(r"# AOT ID: .*")  # a number that counts the compilations of a process


def generated(model: nn.Module, loss_of: Callable[[nn.Module], Tensor]) -> list[str]:
    """The source of the compiled forward and backward of a model; none of it comes from a cache."""
    no_graphs = torch._inductor.config.patch(fx_graph_cache=False)
    with no_graphs, torch._functorch.config.patch(enable_autograd_cache=False):
        _, sources = run_and_get_code(lambda: loss_of(model).backward())
    return [AOT_ID.sub("", source) for source in sources]


@pytest.mark.inductor
def test_a_plain_step_runs_the_code_that_torch_compile_runs():
    x, y = batches(1, dtype=torch.float32)[0]
    stock, ours, factor = (build(MODELS["normalised"], torch.float32) for _ in range(3))
    for model in (ours, factor):
        thor_fx.compile(model)
        thor_fx.Thor(model, lr=0.1, damping=0.1, momentum=0.9)
    collector_of(ours).wanted = False

    def loss_of(model: nn.Module) -> Tensor:
        return F.cross_entropy(model(x), y)

    expected = generated(torch.compile(stock), loss_of)
    assert len(expected) == 2  # forward and backward
    assert generated(ours, loss_of) == expected
    assert generated(factor, loss_of) != expected, "the code of a factor step is another"


def cached(folder: Path) -> dict[str, dict[str, int]]:
    """What the caches do in a new process, by door."""
    script = Path(__file__).with_name("two_doors.py")
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder)}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, check=True, text=True
    )
    return json.loads(done.stdout)


@pytest.mark.inductor
def test_a_second_process_compiles_nothing(tmp_path):
    first, second = cached(tmp_path), cached(tmp_path)
    graphs = {"drop-in": 6, "functional": 2}  # forward and backward and update of two kinds; two whole steps
    for door, expected in graphs.items():
        assert first[door]["fxgraph_miss"] == second[door]["fxgraph_hit"] == expected
        assert first[door]["autograd_miss"] == second[door]["autograd_hit"] > 0
        for result in ("fxgraph_miss", "fxgraph_bypass", "autograd_miss", "autograd_bypass"):
            assert second[door][result] == 0, f"{door}: {result}"


def printed(seed: int) -> dict[str, list[str]]:
    """The code of the graphs that are compiled in a new process, where sets have an order of their own."""
    script = Path(__file__).with_name("printed_graphs.py")
    environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, check=True, text=True
    )
    return json.loads(done.stdout)


def test_every_process_makes_the_same_graphs():
    """Or else no cache would find them."""
    one, other = printed(1), printed(2)
    for case, graphs in one.items():
        assert len(graphs) >= 2, "at least a plain step and a factor step"
        assert graphs == other[case], case
