"""What every optimisation of a factor step is worth: each is switched off in turn, and the step measured."""

import argparse
import contextlib
import logging
import statistics
import time

import torch
from torch import nn
from torch.func import functional_call
from torch.profiler import profile

import thor_fx
from thor_fx.passes.switches import OPTIMISATIONS
from thor_fx.step_report import step_report

LOG = logging.getLogger("thor_fx.passes")
MOVES_NOTHING = (
    "view",
    "reshape",
    "permute",
    "transpose",
    "expand",
    "t.default",
    "squeeze",
    "slice",
    "detach",
)
THOR = {"lr": 0.01, "damping": 0.1, "momentum": 0.9, "frequency": 1, "factor_decay": 0.9}


class Net(nn.Module):
    """A convolution, two layers that read the same rows, and a last layer."""

    def __init__(self, channels, width):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, padding=1)
        self.gate, self.rise = nn.Linear(64 * channels, width), nn.Linear(64 * channels, width)
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        features = self.conv(x).relu().flatten(1)
        return self.head(nn.functional.silu(self.gate(features)) * self.rise(features))


@contextlib.contextmanager
def stages():
    """The stages of all graphs that are made inside."""
    seen, handler, level = [], logging.Handler(), LOG.level
    handler.emit = lambda record: seen.append(record.args[0])
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    yield seen
    LOG.setLevel(level)
    LOG.removeHandler(handler)


def operators(seen):
    """How many operators the graphs of a factor step have when all passes are over."""
    plain = [one.before for one in seen]
    ends = [one.after for one in seen if one.name != "canonicalize" and one.after not in plain]
    return [line for code in ends for line in code.splitlines() if " = torch.ops." in line]


def calls(seen):
    """How many of them compute something: what an interpreted step calls, as nothing is fused."""
    return sum(not any(f".{name}" in line for name in MOVES_NOTHING) for line in operators(seen))


def kernels(model, batch, settings, disabled):
    """How many kernels Inductor makes of the whole step, calls of libraries among them."""
    loss_fn, params, tx = loss_of(model), dict(model.named_parameters()), thor_fx.thor(**settings)
    return len(step_report(loss_fn, params, batch, tx, disable_passes=disabled).kernels("factor"))


def loss_of(model):
    def loss_fn(params, x, y):
        return nn.functional.cross_entropy(functional_call(model, params, (x,)), y)

    return loss_fn


def functional_step(model, batch, settings, backend, disabled):
    """Loss, gradients, factors and update in one graph."""
    tx = thor_fx.thor(**settings)
    step = thor_fx.compile_step(loss_of(model), tx, backend=backend, disable_passes=disabled)
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = step.init(params, *batch)

    def run():
        nonlocal params, state
        params, state, _ = step(params, state, *batch)

    return run


def drop_in_step(model, batch, settings, backend, disabled):
    """The same in graphs of their own: forward, backward with factors, and update."""
    model = thor_fx.compile(model, backend=backend, disable_passes=disabled)
    opt = thor_fx.Thor(model, **settings)

    def run():
        nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
        opt.step()
        opt.zero_grad()

    return run


def milliseconds(run, repeats):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def peak(run):
    """The most bytes that a step allocates beyond what was there before."""
    with profile(profile_memory=True) as profiled:
        run()
    now = most = 0
    for event in sorted(profiled.events(), key=lambda event: event.time_range.end):
        now += event.self_cpu_memory_usage
        most = max(most, now)
    return most


def row(label, make, arguments, repeats):
    model, batch, settings, backend, disabled = arguments
    count = "" if make is drop_in_step and backend == "inductor" else None
    if count is None and backend == "inductor":
        count = kernels(model, batch, settings, disabled)
    with stages() as seen:
        run = make(*arguments)
        run()
    run()
    count = calls(seen) if count is None else count
    numbers = len(operators(seen)), count, milliseconds(run, repeats), peak(run) / 1e6
    print("{:<28}{:>10}{:>10}{:>10.2f}{:>10.1f}".format(label, *numbers), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backend", nargs="?", default="inductor", help="compiles all graphs")
    parser.add_argument("--quick", action="store_true", help="a small model, interpreted, few repeats")
    given = parser.parse_args()
    backend = "aot_eager" if given.quick else given.backend
    rows, channels, width, repeats = (64, 4, 32, 3) if given.quick else (1024, 8, 256, 20)
    settings = THOR | {"block_size": 128 if given.quick else None}  # only whole factors have halves
    batch = torch.randn(rows, 3, 8, 8), torch.randint(10, (rows,))
    print("{:<28}{:>10}{:>10}{:>10}{:>10}".format("factor step", "operators", "kernels", "ms", "peak MB"))
    names = [name for name in OPTIMISATIONS if name != "start_early"]  # is for several ranks
    names = [name for name in names if name != "recompute" or backend == "inductor"]
    off = [("nothing off", []), *((f"without {name}", [name]) for name in names)]
    for label, disabled in [*off, ("without all of these", names)]:
        row(label, functional_step, (Net(channels, width), batch, settings, backend, disabled), repeats)
    row("drop-in, nothing off", drop_in_step, (Net(channels, width), batch, settings, backend, []), repeats)


if __name__ == "__main__":
    main()
