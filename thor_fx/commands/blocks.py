"""Find the block size that THOR's rule gives for a model, and print both curves.

The factors of one batch are inverted at every candidate: how long that takes, and which share of the factors
loses less than 1% by the cut. Where the curves cross is what block_size="auto" chooses.
"""

import argparse
import json

from ..block_size import block_size_report
from ..loss_functions import loss_function
from .arguments import file
from .target import add_target, load


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_target(parser)
    parser.add_argument("--out", type=file(".png", ".svg", ".pdf"), help="a picture of both curves")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    """Measure, print, draw."""
    loss_fn, params, batch, _ = loss_function(*load(parser, arguments))
    try:
        report = block_size_report(loss_fn, params, *batch)
        if arguments.out is not None:
            report.draw(arguments.out)
    except (ValueError, ImportError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    print(json.dumps(report.to_dict(), indent=1) if arguments.json else report)
    return 0
