"""What compiling costs: our passes by the depth of a model, and a cold compilation beside the stock one.

    python benchmarks/compile_time.py

The passes run on the step graph of a transformer; every pass is timed alone, in seconds of this process.
A cold compilation runs in a process of its own, with Inductor and an empty cache, up to the end of the last
step that compiles: forward and backward of ``torch.compile(model)``, with and without a compiled step of
AdamW; or a factor step and a plain step of ours, with their updates. A second process with the same cache
then does the same. CPU seconds are its own and its compilers'.
"""

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tables import record
from torch import Tensor, fx, nn
from torch.func import functional_call
from workloads import text

import thor_fx
from thor_fx.compile import collector_of
from thor_fx.layers import coverage
from thor_fx.passes import accumulate, canonicalize, emit_factors, run
from thor_fx.passes.layout import Rules
from thor_fx.passes.survey import survey
from thor_fx.update import append_update

HERE = Path(__file__).parent
VOCABULARY, LENGTH, WIDTH, HEADS, BATCH = 64, 16, 32, 4, 4
THOR = {"lr": 1e-6, "damping": 0.03, "momentum": 0.9, "frequency": 2}
PASSES = ("trace", "canonicalize", "survey", "emit_factors", "append_update", "accumulate")


def transformer(layers: int, width: int = WIDTH) -> nn.Module:
    """Token by token, the logits of a vocabulary."""
    torch.manual_seed(0)
    blocks = [
        nn.TransformerEncoderLayer(width, HEADS, 2 * width, 0.0, batch_first=True) for _ in range(layers)
    ]
    parts = [nn.Embedding(VOCABULARY, width), *blocks, nn.Linear(width, VOCABULARY), nn.Flatten(0, 1)]
    return nn.Sequential(*parts)


def example() -> tuple[Tensor, Tensor]:
    return text(BATCH, LENGTH, VOCABULARY)


def loss_of(model: nn.Module) -> Callable[..., Tensor]:
    def loss_fn(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, params, (x,)), y)

    return loss_fn


# --- our passes ------------------------------------------------------------------------------------------


def passes(layers: int) -> dict[str, float]:
    """Seconds of every pass of a factor step, and the nodes of the graph that they start from."""
    model, tx, rules, seconds = transformer(layers), thor_fx.thor(**THOR), Rules(block_size=128), {}
    params = {name: p.detach() for name, p in model.named_parameters()}

    def timed(name: str, function: Callable[..., Any], *args: Any) -> Any:
        gc.collect()  # else it falls into some pass, and takes longer than that
        before = time.process_time()
        result = function(*args)
        seconds[name] = time.process_time() - before
        return result

    graph: fx.GraphModule = timed("trace", thor_fx.trace_step, loss_of(model), params, *example())
    nodes = len(graph.graph.nodes)
    graph = timed("canonicalize", run, graph, [canonicalize])
    found = coverage(timed("survey", survey, graph, rules), rules)
    whole = timed("emit_factors", run, graph, [partial(emit_factors, rules=rules)])
    timed("append_update", append_update, whole, tx, found, list(params))
    timed("accumulate", accumulate, whole)
    return {"layers": layers, "nodes": nodes, **seconds}


# --- cold compilations -----------------------------------------------------------------------------------


def stock(model: nn.Module, x: Tensor, y: Tensor) -> None:
    F.cross_entropy(torch.compile(model)(x), y).backward()


def stock_adamw(model: nn.Module, x: Tensor, y: Tensor) -> None:
    stock(model, x, y)
    torch.compile(torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-6)).step)()


def drop_in(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    factor_backend: str | None = None,
    update_backend: str | None = None,
    shared_graph: bool = False,
) -> None:
    model = thor_fx.compile(model, factor_backend=factor_backend, shared_graph=shared_graph)
    optimizer = thor_fx.Thor(model, **THOR, backend=update_backend)
    for _ in range(2):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def drop_in_alone(model: nn.Module, x: Tensor, y: Tensor, shared_graph: bool = False) -> None:
    """Forward and backward of both kinds of step, and no update."""
    model = thor_fx.compile(model, shared_graph=shared_graph)
    thor_fx.Thor(model, **THOR)  # says what is to be measured
    for collector_of(model).wanted in (True, False):
        F.cross_entropy(model(x), y).backward()


def functional(model: nn.Module, x: Tensor, y: Tensor, factor_backend: str | None = None) -> None:
    params: Any = dict(model.named_parameters())
    step = thor_fx.compile_step(loss_of(model), thor_fx.thor(**THOR), factor_backend=factor_backend)
    state = step.init(params, x, y)
    for _ in range(2):
        params, state, _ = step(params, state, x, y)


WAYS: dict[str, tuple[str, Callable[[nn.Module, Tensor, Tensor], None]]] = {
    "stock": ("torch.compile, forward and backward", stock),
    "stock_adamw": ("the same and AdamW's step", stock_adamw),
    "drop_in": ("thor_fx, drop-in: both kinds of step and of update", drop_in),
    "functional": ("thor_fx, functional: both kinds of step", functional),
    "drop_in_updates_interpreted": (
        'drop-in, Thor(backend="aot_eager")',
        partial(drop_in, update_backend="aot_eager"),
    ),
    "drop_in_alone": ("drop-in, forward and backward of both kinds", drop_in_alone),
    "drop_in_shared_alone": (
        "drop-in, shared_graph=True, forward and backward of both kinds",
        partial(drop_in_alone, shared_graph=True),
    ),
    "drop_in_shared": ("drop-in, shared_graph=True", partial(drop_in, shared_graph=True)),
    "drop_in_shared_updates_interpreted": (
        'drop-in, shared_graph=True and Thor(backend="aot_eager")',
        partial(drop_in, shared_graph=True, update_backend="aot_eager"),
    ),
    "drop_in_interpreted": (
        'drop-in, factor_backend="aot_eager"',
        partial(drop_in, factor_backend="aot_eager"),
    ),
    "drop_in_all_interpreted": (
        'drop-in, factor_backend="aot_eager" and Thor(backend="aot_eager")',
        partial(drop_in, factor_backend="aot_eager", update_backend="aot_eager"),
    ),
    "functional_interpreted": (
        'functional, factor_backend="aot_eager"',
        partial(functional, factor_backend="aot_eager"),
    ),
}


def cpu_seconds() -> float:
    """Of this process, and of the compilers that it has called."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def compilation(way: str, layers: int, width: int) -> dict[str, float]:
    """Seconds until all is compiled, and those of the CPU; called in a process of its own."""
    model, batch = transformer(layers, width), example()
    before, cpu_before = time.perf_counter(), cpu_seconds()
    WAYS[way][1](model, *batch)
    return {"seconds": time.perf_counter() - before, "cpu": cpu_seconds() - cpu_before}


def compilations_apart(way: str, layers: int, width: int) -> dict[str, dict[str, float]]:
    """Of a process that finds an empty cache, and of the next one, which finds what that one left."""
    command = [sys.executable, __file__, "--one", way, "--deep", str(layers), "--width", str(width)]
    with tempfile.TemporaryDirectory() as empty:
        folders = {"TORCHINDUCTOR_CACHE_DIR": empty, "TMPDIR": empty}  # precompiled headers lie in the latter
        environment = {**os.environ, **folders, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        runs = [
            subprocess.run(command, env=environment, capture_output=True, check=True, text=True).stdout
            for _ in range(2)
        ]
    return dict(zip(("cold", "warm"), map(json.loads, runs), strict=True))


# --- the report ------------------------------------------------------------------------------------------


def report(
    layers: Sequence[int], deep: Sequence[int], ways: Sequence[str] = tuple(WAYS), width: int = WIDTH
) -> dict[str, Any]:
    passes(min(layers))  # what is imported on the way
    return {
        "torch": torch.__version__,
        "passes": [passes(count) for count in layers],
        "compilations": [
            {"layers": count, "way": way, **compilations_apart(way, count, width)}
            for count in deep
            for way in ways
        ],
    }


def markdown(result: dict[str, Any]) -> str:
    names = ["layers", "nodes", *PASSES]
    lines = [f"torch {result['torch']}. Seconds of every pass on a factor step of a transformer:", ""]
    lines += [f"| {' | '.join(names)} |", f"| {' | '.join('---' for _ in names)} |"]
    for row in result["passes"]:
        values = [str(row[name]) if name in {"layers", "nodes"} else f"{row[name]:.2f}" for name in names]
        lines.append(f"| {' | '.join(values)} |")
    if result["compilations"]:
        lines += ["", "Compilation, with an empty cache (cold) and in a second process (warm):", ""]
        lines += [
            "| layers | | cold, CPU s | cold, s | warm, CPU s | warm, s |",
            f"| {' | '.join(6 * ['---'])} |",
        ]
    for one in result["compilations"]:
        times = " | ".join(f"{one[run][of]:.1f}" for run in ("cold", "warm") for of in ("cpu", "seconds"))
        lines.append(f"| {one['layers']} | {WAYS[one['way']][0]} | {times} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 32], help="of the passes")
    parser.add_argument("--deep", type=int, nargs="*", default=[2], help="layers of the compilations")
    parser.add_argument("--width", type=int, default=WIDTH, help="of the models of the compilations")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="of compiling")
    parser.add_argument("--print", action="store_true", help="print only; leave results and README.md")
    parser.add_argument("--json", type=Path, help="write there, and leave results and README.md")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.one:
        print(json.dumps(compilation(options.one, *options.deep, options.width)))
        return
    result = report(options.layers, options.deep, options.ways, options.width)
    table = markdown(result)
    print(table)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    elif not options.print:
        record(HERE / "results", "compile-time", f"{table}\n", json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
