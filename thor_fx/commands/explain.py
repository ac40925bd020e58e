"""Say what becomes of every parameter of a model, what a factor step adds, and why.

The model is traced once; nothing is trained. --html writes one page to open in a browser (the table, the
graph, what every pass did, kernels); --svg draws the step.
"""

import argparse
import json

from ..explain import explain
from .arguments import file
from .target import add_target, load


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_target(parser)
    parser.add_argument("--html", type=file(".html"), help="write a page with everything")
    parser.add_argument("--svg", type=file(".svg"), help="draw the step")
    parser.add_argument(
        "--step", choices=("factor", "plain"), default="factor", help="the kind that is drawn (factor)"
    )
    parser.add_argument(
        "--why", metavar="PARAMETER", help="how one parameter is treated, and where it is used"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    """Trace, print, write."""
    report = explain(*load(parser, arguments))
    if arguments.why is not None and arguments.why not in report.shapes:
        known = ", ".join(report.shapes)
        parser.error(f"argument --why: no parameter {arguments.why!r}; there are {known}")
    if arguments.json:
        print(json.dumps(report.to_dict(), indent=1))
    else:
        print(report if arguments.why is None else report.why(arguments.why))
    return 0
