"""What compiling costs: our passes by the depth of a model, and a cold compilation beside the stock one.

    python benchmarks/compile_time.py

The passes run on the step graph of a transformer; every pass is timed alone, in seconds of this process.
A cold compilation runs in a process of its own, with Inductor and an empty cache, up to the end of the last
step that compiles: forward and backward of ``torch.compile(model)``, or a factor step and a plain step.
"""

import argparse
import json
import os
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
from tables import replace_section
from torch import Tensor, fx, nn
from torch.func import functional_call
from workloads import text

import thor_fx
from thor_fx.layers import coverage
from thor_fx.passes import accumulate, canonicalize, emit_factors, run
from thor_fx.passes.layout import Rules
from thor_fx.passes.survey import survey
from thor_fx.update import append_update

HERE = Path(__file__).parent
VOCABULARY, LENGTH, WIDTH, HEADS, BATCH = 64, 16, 32, 4, 4
THOR = {"lr": 1e-6, "damping": 0.03, "momentum": 0.9, "frequency": 2}
PASSES = ("trace", "canonicalize", "survey", "emit_factors", "append_update", "accumulate")


def transformer(layers: int) -> nn.Module:
    """Token by token, the logits of a vocabulary."""
    torch.manual_seed(0)
    blocks = [
        nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, 0.0, batch_first=True) for _ in range(layers)
    ]
    parts = [nn.Embedding(VOCABULARY, WIDTH), *blocks, nn.Linear(WIDTH, VOCABULARY), nn.Flatten(0, 1)]
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


def drop_in(model: nn.Module, x: Tensor, y: Tensor) -> None:
    model = thor_fx.compile(model)
    optimizer = thor_fx.Thor(model, **THOR)
    for _ in range(2):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def functional(model: nn.Module, x: Tensor, y: Tensor) -> None:
    params: Any = dict(model.named_parameters())
    step = thor_fx.compile_step(loss_of(model), thor_fx.thor(**THOR))
    state = step.init(params, x, y)
    for _ in range(2):
        params, state, _ = step(params, state, x, y)


WAYS: dict[str, tuple[str, Callable[[nn.Module, Tensor, Tensor], None]]] = {
    "stock": ("torch.compile, forward and backward", stock),
    "drop_in": ("thor_fx, drop-in: both kinds of step and of update", drop_in),
    "functional": ("thor_fx, functional: both kinds of step", functional),
}


def compilation(way: str, layers: int) -> float:
    """Seconds until all is compiled; called in a process of its own."""
    model, batch = transformer(layers), example()
    before = time.perf_counter()
    WAYS[way][1](model, *batch)
    return time.perf_counter() - before


def compilation_apart(way: str, layers: int) -> float:
    command = [sys.executable, __file__, "--one", way, "--deep", str(layers)]
    with tempfile.TemporaryDirectory() as empty:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": empty}
        done = subprocess.run(command, env=environment, capture_output=True, check=True, text=True)
    return float(done.stdout)


# --- the report ------------------------------------------------------------------------------------------


def report(layers: Sequence[int], deep: int) -> dict[str, Any]:
    passes(min(layers))  # what is imported on the way
    return {
        "torch": torch.__version__,
        "passes": [passes(count) for count in layers],
        "deep": deep,
        "cold": {way: compilation_apart(way, deep) for way in WAYS} if deep else {},
    }


def markdown(result: dict[str, Any]) -> str:
    names = ["layers", "nodes", *PASSES]
    lines = [f"torch {result['torch']}. Seconds of every pass on a factor step of a transformer:", ""]
    lines += [f"| {' | '.join(names)} |", f"| {' | '.join('---' for _ in names)} |"]
    for row in result["passes"]:
        values = [str(row[name]) if name in {"layers", "nodes"} else f"{row[name]:.2f}" for name in names]
        lines.append(f"| {' | '.join(values)} |")
    if result["cold"]:
        lines += ["", f"Cold compilation of {result['deep']} layer(s):", "", "| | seconds |", "| --- | --- |"]
        lines += [f"| {WAYS[way][0]} | {seconds:.1f} |" for way, seconds in result["cold"].items()]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 32], help="of the passes")
    parser.add_argument("--deep", type=int, default=2, help="layers of the cold compilations; 0: none")
    parser.add_argument("--print", action="store_true", help="print only; leave results and README.md")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.one:
        print(compilation(options.one, options.deep))
        return
    result = report(options.layers, options.deep)
    table = markdown(result)
    print(table)
    if not options.print:
        results, readme = HERE / "results", HERE / "README.md"
        (results / "compile-time.json").write_text(json.dumps(result, indent=1) + "\n")
        (results / "compile-time.md").write_text(table + "\n")
        readme.write_text(replace_section(readme.read_text(), "compile-time", f"{table}\n"))


if __name__ == "__main__":
    main()
