"""Train on handwritten digits with SGD-momentum, AdamW and THOR, and compare.

An auto-encoder and a classifier, on the 1,797 digits that scikit-learn brings along (nothing is
downloaded). Every optimizer starts from the same weights, sees the same batches and has its learning
rate chosen by the same search. Prints a table and saves a picture of the loss against steps and seconds.
"""

import argparse
import importlib.util
import time
from pathlib import Path

import torch

from ..commands.arguments import device, file, positive
from ..inductor import BACKENDS

NEEDS = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}
PICTURES = (".png", ".svg", ".pdf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    out = Path("demo.png")
    parser.add_argument("--out", type=file(*PICTURES), default=out, help=f"the picture ({out})")
    parser.add_argument("--steps", type=positive, default=400, help="steps of every run (400)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and the test set (0)")
    parser.add_argument("--device", type=device, default=torch.device("cpu"), help="e.g. cuda (cpu)")
    parser.add_argument("--backend", choices=BACKENDS, default=BACKENDS[0], help=f"({BACKENDS[0]})")
    parser.add_argument(
        "--threads",
        type=positive,
        default=1,
        help="CPU threads (1: so small a model gains little from more)",
    )
    parser.add_argument(
        "--clip-all",
        action="store_true",
        help="clip the gradients of SGD and AdamW like THOR's updates: tensor by tensor, to norm 1",
    )


def run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    """Run both tasks, print what came out, save the picture."""
    missing = [name for module, name in NEEDS.items() if importlib.util.find_spec(module) is None]
    if missing:
        parser.exit(1, f'the demo needs {" and ".join(missing)}: pip install "thor-fx[examples]"\n')

    from .picture import draw
    from .progress import progress
    from .race import Settings, race
    from .table import describe, tabulate
    from .tasks import TASKS, load

    started = time.perf_counter()
    torch.set_num_threads(arguments.threads)
    settings = Settings(arguments.steps, arguments.seed, arguments.backend, arguments.clip_all)
    digits = load(arguments.seed, arguments.device)
    print(describe(settings, digits, arguments.device, arguments.threads))
    results = {}
    for task in TASKS:
        with progress(task.name, settings.planned_steps) as advance:
            results[task] = race(task, digits, settings, advance)
        print(f"\n{tabulate(task, results[task])}")
    draw(results, arguments.out)
    print(f"\n{time.perf_counter() - started:.0f} s in all. The picture: {arguments.out}")
    return 0
