"""Say what becomes of every parameter of a model, what a factor step adds, and why.

The model is traced once; nothing is trained. --html writes one page to open in a browser (the table, the
graph, what every pass did, what steps cost); --svg draws a step. --measure compiles and runs both kinds of
step, and shows their kernels and times.
"""

import argparse
import json
from collections.abc import Mapping
from typing import Any, get_args

from ..cost_table import cost_table
from ..explain import explain
from ..report import Report
from ..step_report import StepKind
from ..step_time import MeasuredStep
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
    parser.add_argument("--costs", action="store_true", help="also what steps cost: operations, bytes, time")
    parser.add_argument("--measure", action="store_true", help="the same, compiled and run")
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
    measured = {kind: report.steps.measured(kind) for kind in get_args(StepKind)} if arguments.measure else {}
    if arguments.json:
        print(json.dumps(_everything(report, measured, costs=arguments.costs), indent=1))
    else:
        print(report if arguments.why is None else report.why(arguments.why))
        if measured or arguments.costs:
            print(f"\n{_costs(report, measured)}")
    if arguments.svg is not None:
        report.draw(arguments.svg, arguments.step)
    if arguments.html is not None:
        report.html(arguments.html, step=arguments.step, measured=measured, title=arguments.target)
    return 0


def _costs(report: Report, measured: Mapping[StepKind, MeasuredStep]) -> str:
    if not measured:
        return str(report.steps)
    table = cost_table([run.cost for run in measured.values()])
    totals = [f"{kind}: {1e3 * run.seconds:.3g} ms, {_kinds(run)}" for kind, run in measured.items()]
    return "\n".join([str(report.steps.predicted), table, *totals])


def _kinds(run: MeasuredStep) -> str:
    calls = sum(kernel.extern for kernel in run.kernels)
    own = [kernel for kernel in run.kernels if "factors" in kernel.phases or "refresh" in kernel.phases]
    fused = len(run.kernels) - calls
    return f"{fused} fused kernels and {calls} calls of libraries, {len(own)} of them for factors"


def _everything(report: Report, measured: Mapping[StepKind, MeasuredStep], *, costs: bool) -> dict[str, Any]:
    found = report.to_dict()
    if costs or measured:
        found["steps"] = report.steps.to_dict(measured)
    return found
