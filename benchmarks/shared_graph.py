"""Steps of ``thor_fx.compile(model, shared_graph=True)`` beside those of two graphs, in turns.

    python benchmarks/shared_graph.py

Milliseconds of forward and backward, medians over all rounds, on one thread: what a plain step pays for
running the graph of a factor step, and a factor step for asking. Updates are not in it: they are the same.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from compile_time import VOCABULARY, transformer
from torch import Tensor, nn
from workloads import text

import thor_fx
from thor_fx.compile import collector_of


def step(model: nn.Module, batch: tuple[Tensor, Tensor], measures: bool | None) -> None:
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


def measure(
    layers: int, width: int, length: int, batch: int, rounds: int, backend: str = "inductor"
) -> dict[str, tuple[float, float | None]]:
    """By way of compiling: milliseconds of a plain step and of a factor step."""
    data, build = text(batch, length, VOCABULARY), partial(transformer, layers, width)
    ways: list[tuple[str, nn.Module, list[bool | None]]] = [
        ("torch.compile", torch.compile(build(), backend=backend), [None]),
        ("two graphs", thor_fx.compile(build(), backend=backend), [False, True]),
        ("shared_graph=True", thor_fx.compile(build(), backend=backend, shared_graph=True), [False, True]),
    ]
    steps = {(name, kind): partial(step, model, data, kind) for name, model, kinds in ways for kind in kinds}
    for function in 3 * list(steps.values()):
        function()
    times = [{key: milliseconds(function) for key, function in steps.items()} for _ in range(rounds)]
    found = {key: statistics.median(one[key] for one in times) for key in steps}
    return {name: (found[name, kinds[0]], found.get((name, True))) for name, _, kinds in ways}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    for name, default in {"layers": 4, "width": 128, "length": 64, "batch": 8, "rounds": 40}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    torch.set_num_threads(1)
    found = measure(**vars(parser.parse_args(arguments)))
    print("| | plain step, ms | factor step, ms |\n| --- | --- | --- |")
    for name, (plain, factor) in found.items():
        print(f"| {name} | {plain:.2f} | {'-' if factor is None else f'{factor:.2f}'} |")


if __name__ == "__main__":
    main()
