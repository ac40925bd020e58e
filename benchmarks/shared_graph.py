"""Steps of ``thor_fx.compile(model, shared_graph=True)`` beside those of two graphs, in turns.

    python benchmarks/shared_graph.py

Milliseconds of forward and backward, medians over all rounds, on one thread: what a plain step pays for
running the graph of a factor step, and a factor step for asking. Factors are those of ``thor_fx.Thor`` as it
is by default, or of one block size. Updates are not in it: they are the same.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from workloads import WORKLOADS, Batch

import thor_fx
from thor_fx.compile import collector_of

Times = dict[tuple[str, str], float]
"""By way of compiling and kind of step: milliseconds."""


def step(model: nn.Module, batch: Batch, measures: bool | None) -> None:
    """Forward and backward, with or without factors; None: a model that has none."""
    if measures is not None:
        collector_of(model).clear()
        collector_of(model).wanted = measures
    model.zero_grad()
    x, y = batch
    F.cross_entropy(model(x), y).backward()


def milliseconds(function: Callable[[], None]) -> float:
    before = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - before)


def ours(model: nn.Module, backend: str, block_size: int | None, *, shared: bool) -> nn.Module:
    """With an optimizer, which says what is to be measured."""
    model = thor_fx.compile(model, backend=backend, shared_graph=shared)
    thor_fx.Thor(model, lr=0.1, damping=0.1, momentum=0.9, block_size=block_size)
    return model


def measure(
    build: Callable[[], nn.Module],
    batch: Batch,
    rounds: int,
    block_size: int | None = 128,
    backend: str = "inductor",
) -> Times:
    two, one = (ours(build(), backend, block_size, shared=shared) for shared in (False, True))
    steps = {
        ("torch.compile", "plain"): partial(step, torch.compile(build(), backend=backend), batch, None),
        ("two graphs", "plain"): partial(step, two, batch, False),
        ("shared graph", "plain"): partial(step, one, batch, False),
        ("two graphs", "factor"): partial(step, two, batch, True),
        ("shared graph", "factor"): partial(step, one, batch, True),
    }
    for function in 3 * list(steps.values()):
        function()
    times = [{key: milliseconds(function) for key, function in steps.items()} for _ in range(rounds)]
    return {key: statistics.median(one[key] for one in times) for key in steps}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--models", nargs="+", choices=WORKLOADS, default=["mlp", "cnn", "transformer"])
    parser.add_argument("--block-size", type=int, default=128, help="of the factors; 0: whole ones")
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    head: list[str] = []
    for name in options.models:
        work = WORKLOADS[name]
        found = measure(work.build, work.batch(), options.rounds, options.block_size or None)
        if not head:
            head = ["model", *(f"{way}, {kind} step" for way, kind in found)]
            print(f"| {' | '.join(head)} |\n| {' | '.join(['---', *(len(found) * ['---:'])])} |")
        print(f"| {name} | {' | '.join(f'{ms:.2f}' for ms in found.values())} |", flush=True)


if __name__ == "__main__":
    main()
