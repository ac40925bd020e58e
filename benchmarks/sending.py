"""What sending factors costs a factor step of the drop-in door, beside backward and behind it.

    python benchmarks/sending.py

Ten square layers in DistributedDataParallel, on two ranks of this machine, every step a factor step, all
interpreted. Three optimizers take turns:

==========  ======================================================================================
``beside``  the factors of a graph are summed over ranks from when its backward has made them
``behind``  in the update, as where DDP does not say when it averages (``find_unused_parameters``)
``unsent``  factors stay where they are: no way of sending them can take less time
==========  ======================================================================================

The last is for the clock only: every rank then inverts its own factors. Dynamo cuts the model at DDP's
buckets, so there are several graphs, and factors of the last layers are there early.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import thor_fx
from thor_fx.compile import collector_of
from thor_fx.distributed.collectives import World
from thor_fx.distributed.packing import packed_numel

VARIANTS = ("beside", "behind", "unsent")
THOR: dict[str, Any] = {"lr": 1e-6, "damping": 0.03, "momentum": 0.9, "frequency": 1}


class Run:
    """A model with its optimizer, and how it sends factors."""

    def __init__(self, variant: str, width: int, layers: int) -> None:
        torch.manual_seed(0)
        pairs = [layer for _ in range(layers) for layer in (nn.Linear(width, width), nn.Tanh())]
        self.variant, self.seconds = variant, list[float]()
        self.model = DistributedDataParallel(thor_fx.compile(nn.Sequential(*pairs), backend="aot_eager"))
        behind = patch("thor_fx.distributed.peers.averager", lambda *_: None)
        with behind if variant == "behind" else contextlib.nullcontext():
            self.optimizer = thor_fx.Thor(self.model, **THOR)

    def step(self, x: Tensor) -> None:
        stays = patch.object(World, "sum", lambda _, tensor: tensor.clone())
        with stays if self.variant == "unsent" else contextlib.nullcontext():
            self.seconds.append(self._timed(x))

    def _timed(self, x: Tensor) -> float:
        dist.barrier()
        start = time.perf_counter()
        self.model(x).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        dist.barrier()
        return time.perf_counter() - start

    def sent(self) -> int:
        """Numbers of all factors; known after a step."""
        assert self.optimizer.coverage is not None, "a step was taken"
        sums = [sums for layer in self.optimizer.coverage.layers.values() for sums in layer.sums]
        return sum(packed_numel(side) for each in sums for side in (each.input, each.output))


def one_rank(width: int, layers: int, rows: int, rounds: int, result: Path) -> None:
    dist.init_process_group("gloo")
    runs = [Run(variant, width, layers) for variant in VARIANTS]
    x = torch.randn(rows, width)
    for _ in range(rounds + 1):
        for run in runs:
            run.step(x)
    found = {
        "factors_mb": 4e-6 * runs[0].sent(),
        "gradients_mb": 4e-6 * sum(p.numel() for p in runs[0].model.parameters()),
        "graphs": len(collector_of(runs[0].model).graphs),
        "seconds": {run.variant: run.seconds[1:] for run in runs},
    }
    if dist.get_rank() == 0:
        result.write_text(json.dumps(found))
    dist.destroy_process_group()


def on_two_ranks(*settings: int) -> dict[str, Any]:
    """What rank 0 has measured, with the settings of :func:`one_rank`."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "timed.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command += [__file__, "--one", str(result), "--settings", *map(str, settings)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"two ranks failed:\n{done.stderr}")
        return dict(json.loads(result.read_text()))


def markdown(found: dict[str, Any]) -> str:
    sizes = f"{found['factors_mb']:.1f} MB of factors, {found['gradients_mb']:.1f} MB of gradients"
    lines = [f"{sizes}, {found['graphs']} graphs. Seconds of a factor step:", ""]
    lines += ["| factors are | least | median | most |", "| --- | ---: | ---: | ---: |"]
    for variant, seconds in found["seconds"].items():
        numbers = min(seconds), statistics.median(seconds), max(seconds)
        lines.append(f"| {variant} | " + " | ".join(f"{n:.3f}" for n in numbers) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    given = {"type": int, "nargs": 4, "metavar": ("WIDTH", "LAYERS", "ROWS", "ROUNDS")}
    parser.add_argument("--settings", default=[1024, 10, 256, 12], **given)  # type: ignore[arg-type]
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one is not None:
        one_rank(*options.settings, options.one)
    else:
        print(markdown(on_two_ranks(*options.settings)))


if __name__ == "__main__":
    main()
