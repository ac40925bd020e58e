"""What grows in a long training: memory, tensors, compiled graphs, the time of a step.

    python benchmarks/long_run.py [--steps 20000] [--shapes 1000] [--backend aot_eager]

Both doors train a small model on sequences, first on batches of one shape, then on as many different shapes
(batch x length) as asked, and look at themselves ten times. Blocks of memory are counted by Python, after a
collection; tensors by the garbage collector, graphs by Dynamo.
"""

import argparse
import array
import gc
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.func import functional_call

import thor_fx

LOOKS, IN, HIDDEN, CLASSES = 10, 6, 8, 3
SETTINGS: dict[str, Any] = {"lr": 0.01, "damping": 0.1, "momentum": 0.9, "frequency": 5, "factor_decay": 0.9}

Batch = tuple[Tensor, Tensor]
Step = Callable[[Tensor, Tensor], Any]


@dataclass(frozen=True)
class Look:
    """What there is after some steps.

    Attributes:
        steps: taken.
        blocks: of memory that Python has allocated.
        resident: bytes of the process.
        tensors: that live.
        graphs: that Dynamo has compiled.
        milliseconds: the median step since the last look.
    """

    steps: int
    blocks: int
    resident: int
    tensors: int
    graphs: int
    milliseconds: float


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES))


def loss_of(logits: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.mean(1), y)


def drop_in(backend: str, _first: Batch) -> Step:
    model = thor_fx.compile(net(), backend=backend)
    optimizer = thor_fx.Thor(model, **SETTINGS)

    def step(x: Tensor, y: Tensor) -> None:
        loss_of(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def functional(backend: str, first: Batch) -> Step:
    model = net()

    def loss_fn(params: Any, x: Tensor, y: Tensor) -> Tensor:
        return loss_of(functional_call(model, params, (x,)), y)

    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    compiled = thor_fx.compile_step(loss_fn, thor_fx.thor(**SETTINGS), backend=backend)
    state = compiled.init(params, *first)

    def step(x: Tensor, y: Tensor) -> None:
        nonlocal params, state
        params, state, _ = compiled(params, state, x, y)

    return step


DOORS = {"drop-in": drop_in, "functional": functional}


def batches(shapes: int) -> Iterator[Batch]:
    """One shape, or so many in an order without a pattern, but that those with a side of 1 come first."""
    generator = torch.Generator().manual_seed(1)
    sides = int(shapes**0.5) + 1
    pairs = list(itertools.product(range(1, sides + 1), repeat=2))[:shapes] if shapes > 1 else [(8, 5)]
    places = torch.randperm(len(pairs), generator=generator).tolist()
    for place in itertools.cycle(sorted(places, key=lambda place: 1 not in pairs[place])):
        rows, length = pairs[place]
        x = torch.randn(rows, length, IN, generator=generator)
        yield x, torch.randint(CLASSES, (rows,), generator=generator)


def look(steps: int, times: list[float]) -> tuple[float, ...]:
    """The fields of a :class:`Look`: objects of its own would be found by the next one."""
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    tensors = sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())
    graphs = counters["stats"]["unique_graphs"]
    return steps, sys.getallocatedblocks(), resident, tensors, graphs, 1000 * statistics.median(times)


def watched(door: str, backend: str, steps: int, shapes: int) -> list[Look]:
    """Train; the looks are at equal distances."""
    counters.clear()
    data = batches(shapes)
    step, times = DOORS[door](backend, next(data)), list[float]()
    kept = array.array("d", itertools.repeat(0.0, LOOKS * len(fields(Look))))  # here from the first look on
    for taken, batch in enumerate(itertools.islice(data, steps), start=1):
        start = time.perf_counter()
        step(*batch)
        times.append(time.perf_counter() - start)
        place, rest = divmod(taken, steps // LOOKS)
        if rest == 0:
            kept[place - 1 :: LOOKS] = array.array("d", look(taken, times))
            times.clear()
    return [Look(*map(int, each[:-1]), each[-1]) for each in (kept[place::LOOKS] for place in range(LOOKS))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--shapes", type=int, default=1000)
    parser.add_argument("--backend", default="aot_eager")
    parser.add_argument("--json", metavar="FILE", type=Path)
    args = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}
    for door in DOORS:
        for what, steps, shapes in (("steps", args.steps, 1), ("shapes", args.shapes, args.shapes)):
            looks = watched(door, args.backend, steps, shapes)
            found[f"{door} {what}"] = [asdict(each) for each in looks]
            print(f"{door}, {steps} steps of {shapes} shapes")
            print("   steps        blocks  resident MB  tensors  graphs  median ms")
            for each in looks:
                sizes = f"{each.blocks:13d} {each.resident / 1e6:12.1f}"
                print(
                    f"{each.steps:8d} {sizes} {each.tensors:8d} {each.graphs:7d} {each.milliseconds:10.2f}",
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
