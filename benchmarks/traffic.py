"""What ranks really send, counted, beside what the model of ``scaling.py`` says.

    python benchmarks/traffic.py

Runs 2 and 4 ranks of this machine, with an update that is interpreted: every collective of a step is then an
operator that can be counted with the bytes that it is given. The model counts the same from the shapes of the
layers alone: gradients in every step; triangles of factors, and counts, in a factor step; with work sharing
the inverses or the preconditioned gradients. What a ring moves through a rank is ``2 (W-1)/W`` of what is
all-reduced, ``(W-1)/W`` of what is reduce-scattered, all that is broadcast, and of an exchange what a rank
does not keep.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from from_study import classifier
from scaling import SHARINGS, Setting, bytes_of_counts, bytes_of_factors, shares_of, sides_of
from tables import record
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from workloads import WORKLOADS

import thor_fx
from thor_fx.distributed.inverse_packing import packed_numbers
from thor_fx.inverses import METHODS
from thor_fx.layers import Coverage, Layer

HERE = Path(__file__).parent
MODELS, RANKS = ("mlp", "cnn", "transformer"), (2, 4)
FLOAT32 = 4  # bytes of a number
BLOCK_SIZE = 128
THOR: dict[str, Any] = {"lr": 1e-6, "damping": 0.03, "momentum": 0.9, "frequency": 2}


class Counting(TorchDispatchMode):
    """Counts collectives and the bytes that they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives = self.bytes = 0
        self.moved = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "_c10d_functional" and "wait" not in func.name():
            sent: Tensor = args[0]
            self.collectives += 1
            self.bytes += sent.numel() * sent.element_size()
            self.moved += sent.element_size() * moved(func.name().split("::")[1], sent.numel(), args)
        return func(*args, **(kwargs or {}))


def moved(collective: str, given: int, args: Sequence[Any]) -> float:
    """How many of the numbers that a collective is given pass through this rank, on a ring."""
    others = (dist.get_world_size() - 1) / dist.get_world_size()
    if collective == "all_to_all_single":
        return given - args[2][dist.get_rank()]
    return given * {"all_reduce": 2 * others, "reduce_scatter_tensor": others, "broadcast": 1.0}[collective]


@dataclass(frozen=True)
class Sent:
    """Of one step of one rank.

    Attributes:
        collectives: how many.
        measured: bytes that they were given.
        expected: bytes that the model says.
        moved: bytes that pass through the rank, on a ring.
    """

    collectives: int
    measured: int
    expected: int
    moved: float


def expected(found: Coverage, params: Mapping[str, Tensor], sharing: str) -> tuple[int, int]:
    """Bytes of a plain step and of a factor step, of the first rank."""
    plain = FLOAT32 * sum(p.numel() for p in params.values())
    if sharing == "gradient":
        plain += FLOAT32 * sum(params[name].numel() for name in found.preconditioned)
    layers = list(found.layers.values())
    sent = bytes_to_owners(layers) if sharing == "gradient" else bytes_of_factors(sides_of(layers))
    factor = plain + sent + bytes_of_counts(layers)
    if sharing == "inverse":
        numbers = sum(packed_numbers(METHODS["cholesky"], layer, BLOCK_SIZE) for layer in layers)
        factor += FLOAT32 * numbers + sum(_attempts(layer) for layer in layers)
    return plain, factor


def _attempts(layer: Layer) -> int:
    """Bytes that say how the attempts to invert the blocks of a layer have ended: one each."""
    return layer.groups * METHODS["cholesky"].units((layer.input, layer.output), BLOCK_SIZE)


def bytes_to_owners(layers: Sequence[Layer]) -> int:
    """Bytes of factors that one rank each reads: what is added up, and what the first rank hands on."""
    ranks = dist.get_world_size()
    buckets = shares_of(layers, BLOCK_SIZE, ranks, Setting())
    handed_on = [shares for shares in buckets if not shares.in_place]
    numbers = sum(ranks * shares.piece for shares in buckets)
    numbers += sum(shares.held(reader, by=0) for shares in handed_on for reader in range(ranks))
    return FLOAT32 * numbers


def count(name: str, sharing: str) -> dict[str, Any]:
    """One factor step and one plain step, behind one of each that compile; called by all ranks."""
    torch.manual_seed(0)
    workload = WORKLOADS[name]
    x, y = workload.batch()
    model = thor_fx.compile(classifier(workload.build()), backend="aot_eager")
    sharers = {"process_group": dist.group.WORLD, "work_sharing": sharing}
    optimizer = thor_fx.Thor(model, **THOR, block_size=BLOCK_SIZE, **sharers)
    steps = []
    for _ in range(2 * THOR["frequency"]):
        model(x, y).backward()
        with Counting() as counted:
            optimizer.step()
        optimizer.zero_grad()
        steps.append(counted)
    assert optimizer.coverage is not None, "a step was taken"
    plain, factor = expected(optimizer.coverage, dict(model.named_parameters()), sharing)
    kinds = zip(("factor", "plain"), steps[-2:], (factor, plain), strict=True)
    rows = {kind: asdict(Sent(c.collectives, c.bytes, want, c.moved)) for kind, c, want in kinds}
    return {"model": name, "ranks": dist.get_world_size(), "sharing": sharing, **rows}


def on_ranks(models: Sequence[str], size: int) -> list[dict[str, Any]]:
    """Counts of all models and work sharings, as rank 0 has them."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "counted.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
        command += [__file__, "--one", str(result), "--models", *models]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{size} ranks failed:\n{done.stderr}")
        return list(json.loads(result.read_text()))


def one_rank(models: Sequence[str], result: Path) -> None:
    dist.init_process_group("gloo")
    found = [count(name, sharing) for name in models for sharing in SHARINGS]
    if dist.get_rank() == 0:
        result.write_text(json.dumps(found))
    dist.destroy_process_group()


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [f"torch {torch.__version__}, gloo, float32, blocks of {BLOCK_SIZE}."]
    lines += ["MB that the first rank gives to collectives, and that a ring would move through it:", ""]
    step = "by the model | on a ring | collectives"
    lines.append(f"| model | ranks | work sharing | plain step | {step} | factor step | {step} |")
    lines.append(f"| --- | ---: | --- |{8 * ' ---: |'}")
    for row in rows:
        kinds = [row["plain"], row["factor"]]
        cells = " | ".join(
            " | ".join(f"{k[what] / 1e6:.4f}" for what in ("measured", "expected", "moved"))
            + f" | {k['collectives']}"
            for k in kinds
        )
        lines.append(f"| {row['model']} | {row['ranks']} | {row['sharing']} | {cells} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--models", nargs="+", choices=WORKLOADS, default=list(MODELS))
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument("--print", action="store_true", help="print only; leave results and README.md")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one is not None:
        one_rank(options.models, options.one)
        return
    rows = [row for size in options.ranks for row in on_ranks(options.models, size)]
    table = markdown(rows)
    print(table)
    if not options.print:
        record(HERE / "results", "traffic", f"{table}\n", json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
