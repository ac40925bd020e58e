"""Time the steps of a model: AdamW, and THOR's plain and factor steps.

Every step is compiled as a whole; times are medians. With a factor step every --frequency steps, THOR takes
on average what the last line says.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ..inductor import BACKENDS
from ..loss_functions import LossFunction, loss_function
from ..parameters import trainable
from ..rates import seconds_of
from ..step import compile_step
from ..thor import thor
from .arguments import positive
from .target import add_target, load


class Row(NamedTuple):
    """A kind of step: milliseconds of one, and seconds until the first was done, compilation included."""

    name: str
    milliseconds: float
    first_seconds: float | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_target(parser)
    parser.add_argument("--steps", type=positive, default=20, help="of every kind (20)")
    parser.add_argument("--frequency", type=positive, default=100, help="a factor step every ... steps (100)")
    parser.add_argument("--backend", choices=BACKENDS, default=BACKENDS[0], help=f"({BACKENDS[0]})")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    """Time and print."""
    target = loss_function(*load(parser, arguments))
    settings = arguments.backend, arguments.steps, arguments.device
    adamw = _adamw(target, *settings)
    plain, factor = _thor(target, arguments.frequency, *settings)
    every = arguments.frequency
    average = ((every - 1) * plain.milliseconds + factor.milliseconds) / every
    rows = [adamw, plain, factor, Row(f"THOR, frequency={every}", average, None)]
    print(json.dumps([row._asdict() for row in rows], indent=1) if arguments.json else _table(rows))
    return 0


def _adamw(target: LossFunction, backend: str, steps: int, device: torch.device) -> Row:
    loss_fn = torch.compile(target.loss_fn, backend=backend)
    params = {n: p.detach().clone().requires_grad_(trainable(p)) for n, p in target.params.items()}
    optimizer = torch.optim.AdamW([p for p in params.values() if p.requires_grad], lr=0.0)

    def step() -> None:
        out = loss_fn(params, *target.batch)
        (out[0] if isinstance(out, tuple) else out).backward()
        optimizer.step()
        optimizer.zero_grad()

    first = seconds_of(step, device)
    return Row("AdamW", _median(step, steps, device), first)


def _thor(
    target: LossFunction, frequency: int, backend: str, steps: int, device: torch.device
) -> tuple[Row, Row]:
    tx = thor(lr=0.0, damping=0.03, momentum=0.9, frequency=frequency)
    step = compile_step(target.loss_fn, tx, backend=backend)
    params = {n: p.detach().clone().requires_grad_(p.requires_grad) for n, p in target.params.items()}
    started = time.perf_counter()
    state = step.init(params, *target.batch)
    made = time.perf_counter() - started

    def at(number: int) -> Callable[[], Any]:
        return lambda: step(params, state._replace(step=number, ready=number > 0), *target.batch)

    first = made + seconds_of(at(0), device)
    factor = _median(at(0), steps, device)
    plain = factor if frequency == 1 else _median(at(1), steps, device)
    return Row("THOR, plain step", plain, None), Row("THOR, factor step", factor, first)


def _median(step: Callable[[], Any], steps: int, device: torch.device) -> float:
    step()
    return 1000 * statistics.median(seconds_of(step, device) for _ in range(steps))


def _table(rows: Sequence[Row]) -> str:
    width = max(len(row.name) for row in rows)
    return "\n".join([f"{'':<{width}}  ms/step  first step s", *_lines(rows, width)])


def _lines(rows: Sequence[Row], width: int) -> Iterator[str]:
    for name, milliseconds, first in rows:
        yield f"{name:<{width}}  {milliseconds:>7.3g}  {'' if first is None else f'{first:.3g}':>12}".rstrip()
