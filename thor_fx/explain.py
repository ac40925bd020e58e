"""What is preconditioned, what is not, and why."""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from .costs import cost
from .flops import count_flops
from .layers import coverage
from .loss_functions import loss_function
from .parameters import trainable
from .passes import canonicalize, find_sites, pipeline
from .passes.layout import Rules
from .passes.likelihoods import UnknownLossError
from .passes.sites import SiteReport
from .passes.survey import chosen, directions, survey
from .report import Report, Traced
from .thor import thor
from .trace import trace_step
from .transform import Transform


def explain(
    target: nn.Module | Callable[..., Any], *example: Any, tx: Transform | None = None, **kwargs: Any
) -> Report:
    """Trace a model or loss function once and say what becomes of every parameter.

    A module is traced with its loss, where it returns one (an output called ``loss``, or a first output
    without axes), else with the sum of its outputs; the loss terms are then those of its output.

    Args:
        target: a module, called with ``*example`` and ``**kwargs``; or ``loss_fn``, with
            ``params, *batch``.
        *example: the arguments.
        tx: what to train with: ``thor_fx.thor(...)``; None: with its defaults.
        **kwargs: keyword arguments of a module.

    Returns:
        A report to print or to ask.

    Raises:
        TypeError: ``target`` is neither, or ``params`` are missing or not floating-point.
        ValueError: nothing in it is differentiable, or the estimator of ``tx`` needs a likelihood and
            the loss shows none.

    Example:
        >>> report = explain(torch.nn.Linear(3, 2, bias=False), torch.ones(5, 3))
        >>> print(report)
        parameter  shape  bytes    MFLOP  treatment
        weight       2x3   52 B  0.000165  preconditioned: linear, A 3x3, G 2x2, rows 5
        100.0% of 6 parameters preconditioned; loss terms n = 5 (rows of weight)
        a factor step adds 52 B of factors and 0.000165 MFLOP (+138%); inverses keep 52 B, preconditioning ...
    """
    loss_fn, params, batch, of_module = loss_function(target, *example, **kwargs)
    tx = thor(lr=0.1, damping=0.03, momentum=0.9) if tx is None else tx
    rules, inverse = tx.rules, tx.inverse
    step = pipeline.run(trace_step(loss_fn, params, *batch), [canonicalize])
    sites, estimator = _surveyed(step, rules, inside=not of_module)
    frozen = tuple(name for name, p in params.items() if not trainable(p))
    found = coverage(sites, rules, frozen)
    costs = {
        name: cost(layer, rules.block_size, 8 if params[layer.param].dtype == torch.float64 else 4, inverse)
        for name, layer in found.layers.items()
    }
    terms = None if sites.nearest is None else int(sites.nearest.activation.rows)
    shapes = {name: tuple(p.shape) for name, p in params.items()}
    known = found, sites.sites, terms, step, shapes, sites.lines, costs, count_flops(step), estimator
    return Report(*known, Traced(loss_fn, params, batch, tx))


def _surveyed(step: fx.GraphModule, rules: Rules, *, inside: bool) -> tuple[SiteReport, str]:
    """The sites and the estimator in words; the loss of a module may be outside of what was traced."""
    try:
        report = survey(step, rules)
    except UnknownLossError:
        if inside:
            raise
        named = "it needs likelihood=" if rules.likelihood is None else f"{rules.likelihood}"
        return chosen(find_sites(step), rules), f"{rules.fisher}, of a loss outside of the module: {named}"
    if not report.heads:
        return report, rules.fisher
    heads = " and ".join(dict.fromkeys(str(head) for head in report.heads))
    count = f", {directions(report.heads)} backward passes" if rules.fisher == "exact" else ""
    return report, f"{rules.fisher}, {heads}{count}"
