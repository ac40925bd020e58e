"""What factors cost, by kind of layer: a factor step over a plain step, in time and in peak memory.

    python benchmarks/layer_cost.py

Every kind runs in two processes of its own, forward and backward without and with factors, compiled,
without the update. Peak memory is what the process holds at most beyond what it held before the step.
"""

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tables import replace_section
from torch import Tensor, nn
from torch.func import functional_call

import thor_fx
from thor_fx.inductor import compile_graph
from thor_fx.passes import canonicalize, emit_factors, run

HERE = Path(__file__).parent
BATCH = 256


class Embedded(nn.Module):
    """Tokens, a table, and the same table as the head."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.table, self.tied = nn.Embedding(4096, 128), tied

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        return x @ self.table.weight.T if self.tied else x


class Experts(nn.Module):
    """Eight matrices, each with rows of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 256, 256) / 16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.weight)


class Recurrent(nn.Module):
    """A cell that is used 16 times."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(128, 128)

    def forward(self, x: Tensor) -> Tensor:
        h = x[:, 0]
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        return h


def image(channels: int, side: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(BATCH, channels, side, side)


def tokens() -> Tensor:
    return torch.randint(4096, (32, 64))


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear 512x512": (lambda: nn.Linear(512, 512), lambda: torch.randn(8 * BATCH, 512)),
    "convolution 3x3, 64 channels": (lambda: nn.Conv2d(64, 64, 3, padding=1), image(64, 16)),
    "convolution 3x3, stride 2": (lambda: nn.Conv2d(64, 128, 3, stride=2, padding=1), image(64, 16)),
    "convolution 7x7, 3 channels": (lambda: nn.Conv2d(3, 64, 7, stride=2, padding=3), image(3, 32)),
    "convolution 1x1": (lambda: nn.Conv2d(64, 128, 1), image(64, 16)),
    "grouped convolution, 8 groups": (lambda: nn.Conv2d(64, 64, 3, padding=1, groups=8), image(64, 16)),
    "depthwise convolution": (lambda: nn.Conv2d(64, 64, 3, padding=1, groups=64), image(64, 16)),
    "transposed convolution": (lambda: nn.ConvTranspose2d(64, 32, 2, stride=2), image(64, 8)),
    "embedding 4096x128": (lambda: Embedded(tied=False), tokens),
    "embedding tied to head": (lambda: Embedded(tied=True), tokens),
    "eight experts 256x256": (Experts, lambda: torch.randn(8, BATCH, 256)),
    "recurrent cell, 16 steps": (Recurrent, lambda: torch.randn(BATCH, 16, 128)),
    "self-attention": (
        lambda: nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True),
        lambda: torch.randn(32, 64, 128),
    ),
}


def measure(kind: str, factors: bool, backend: str, steps: int) -> dict[str, float]:
    """Milliseconds (median) and peak megabytes of one step; called in a process of its own."""
    torch.manual_seed(0)
    make, example = KINDS[kind]
    module, x = make(), example()
    params = {name: p.detach() for name, p in module.named_parameters()}

    def loss_fn(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(module, params, (x,)).square().mean()

    graph = run(thor_fx.trace_step(loss_fn, params, x), [canonicalize, *([emit_factors] if factors else [])])
    fakes = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    step = compile_graph(graph, fakes, backend=backend)
    with torch.no_grad():
        step(*params.values(), x)
        times = [milliseconds(step, *params.values(), x) for _ in range(steps)]
        peaks = [peak_megabytes(step, *params.values(), x) for _ in range(steps)]
    return {"ms": statistics.median(times), "mb": statistics.median(peaks)}


def milliseconds(function: Callable[..., object], *args: Tensor) -> float:
    before = time.perf_counter()
    function(*args)
    return 1e3 * (time.perf_counter() - before)


def peak_megabytes(function: Callable[..., object], *args: Tensor) -> float:
    """What the process holds at most during a call, beyond what it held before."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # give back what earlier calls have freed
    start = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    function(*args)
    return max(0.0, resident("VmHWM") - start)


def resident(field: str) -> float:
    """Megabytes of this process, from Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def measure_apart(kind: str, backend: str, steps: int, threads: int) -> list[dict[str, float]]:
    """The plain step and the factor step, each in a process of its own."""
    settings = ["--backend", backend, "--steps", str(steps), "--threads", str(threads)]
    results = []
    for factors in ("0", "1"):
        command = [sys.executable, __file__, "--one", kind, "--factors", factors, *settings]
        results.append(json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout))
    return results


def row(kind: str, options: argparse.Namespace) -> str:
    plain, factor = measure_apart(kind, options.backend, options.steps, options.threads)
    ratio = factor["ms"] / plain["ms"]
    more = factor["mb"] / max(1.0, plain["mb"])
    return (
        f"| {kind} | {plain['ms']:.1f} | {factor['ms']:.1f} | {ratio:.2f} "
        f"| {plain['mb']:.0f} | {factor['mb']:.0f} | {more:.2f} |"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--kind", action="append", choices=KINDS, help="may be repeated; all of them")
    parser.add_argument("--backend", default="inductor", choices=("inductor", "eager"))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--print", action="store_true", help="print only; leave README.md as it is")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--factors", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.one:
        print(json.dumps(measure(options.one, bool(options.factors), options.backend, options.steps)))
        return
    head = [
        f"torch {torch.__version__}, {options.threads} thread(s), backend {options.backend}.",
        "",
        "| kind | plain ms | factor ms | ratio | plain MB | factor MB | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows = [row(kind, options) for kind in options.kind or KINDS]
    text = "\n".join([*head, *rows])
    print(text)
    if not options.print:
        readme = HERE / "README.md"
        readme.write_text(replace_section(readme.read_text(), "layer-cost", f"{text}\n"))


if __name__ == "__main__":
    main()
