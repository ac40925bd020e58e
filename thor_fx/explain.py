"""What is preconditioned, what is not, and why."""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import networkx as nx
import torch
from torch import fx, nn

from .costs import Cost, cost
from .flops import count_flops
from .graphs.networks import to_networkx
from .layers import Coverage, Layer, coverage
from .loss_functions import loss_function
from .parameters import trainable
from .passes import Site, canonicalize, find_sites, pipeline
from .passes.layout import Rules
from .passes.likelihoods import UnknownLossError
from .passes.sites import SiteReport
from .passes.survey import chosen, directions, survey
from .thor import DEFAULTS
from .trace import trace_step
from .transform import Transform


@dataclass(frozen=True)
class Report:
    """The coverage of a model; ``print(report)`` shows it as a table.

    Attributes:
        coverage: every parameter, in exactly one place.
        sites: every use of a preconditioned weight.
        terms: ``n``, the terms that the loss averages over, as read off the graph; None without sites.
        step: the step graph.
        shapes: the shape of every parameter.
        lines: the line of Python that uses a parameter, by parameter, as far as it is known.
        costs: what every layer adds to a step, by layer.
        plain_flops: floating-point operations of forward and backward alone.
        estimator: where the rows of ``G`` come from.
    """

    coverage: Coverage
    sites: tuple[Site, ...]
    terms: int | None
    step: fx.GraphModule
    shapes: Mapping[str, tuple[int, ...]]
    lines: Mapping[str, str] = field(default_factory=dict)
    costs: Mapping[str, Cost] = field(default_factory=dict)
    plain_flops: int = 0
    estimator: str = "empirical"

    @property
    def graph(self) -> nx.DiGraph:
        """The step graph as a ``networkx.DiGraph`` with :class:`thor_fx.graphs.Facts` on the nodes."""
        return to_networkx(self.step, self.sites)

    @property
    def cost(self) -> Cost:
        """What all layers add to a step."""
        return sum(self.costs.values(), start=Cost())

    def why(self, param: str) -> str:
        """How one parameter is treated, the reason, and the line that uses it.

        Raises:
            KeyError: the model has no parameter of this name.
        """
        if param not in self.shapes:
            raise KeyError(f"no parameter {param!r}; there are {sorted(self.shapes)}")
        line = self.lines.get(param)
        return self._treatment(param) + (f"\n  used at {line}" if line else "")

    def _treatment(self, param: str) -> str:
        found = self.coverage
        layers = [layer for layer in found.layers.values() if param in layer.params]
        if layers:
            texts = [describe(layer, param) for layer in layers]
            notes = dict.fromkeys(note for layer in layers for note in layer.notes)
            return "\n  ".join(["preconditioned: " + "; ".join(texts), *notes])
        if param in found.norms:
            return "elementwise rule: scale or shift of a normalisation layer"
        if param in found.fallback:
            return f"first-order rule: {found.fallback[param]}"
        if param in found.unused:
            return "not trained: the loss does not depend on it"
        return "frozen"

    def __str__(self) -> str:
        header = ("parameter", "shape", "bytes", "MFLOP", "treatment")
        rows = [header, *(self._row(name) for name in self.shapes)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(header) - 1)]
        lines = []
        for name, shape, size, flops, how in rows:
            left = f"{name:<{widths[0]}}  {shape:>{widths[1]}}"
            lines.append(f"{left}  {size:>{widths[2]}}  {flops:>{widths[3]}}  {how}")
        likelihood = [] if self.estimator == "empirical" else [f"fisher: {self.estimator}"]
        return "\n".join([*lines, self.summary, *likelihood])

    def to_dict(self) -> dict[str, Any]:
        """Everything but the graph, in types that JSON knows."""
        params = {name: self._facts(name) for name in self.shapes}
        total = asdict(self.cost) | {"plain_flops": self.plain_flops}
        numbers = sum(math.prod(shape) for shape in self.shapes.values())
        return {
            "parameters": params,
            "numbers": numbers,
            "preconditioned_numbers": self.preconditioned,
            "loss_terms": self.terms,
            "terms_from": self.coverage.terms,
            "fisher": self.estimator,
            "cost": total,
        }

    def _facts(self, name: str) -> dict[str, Any]:
        layers = {n: layer for n, layer in self.coverage.layers.items() if name in layer.params}
        return {
            "shape": list(self.shapes[name]),
            "treatment": self._treatment(name),
            "used_at": self.lines.get(name),
            "layers": {
                n: {
                    "kind": layer.kind,
                    "A": str(layer.input),
                    "G": str(layer.output),
                    "rows": str(layer.rows),
                    "uses": layer.uses,
                    **asdict(self.costs[n]),
                }
                for n, layer in layers.items()
            },
        }

    def diff(self, other: "Report") -> str:
        """What is different in another report: lines that were (``-``) and are (``+``); empty if nothing is.

        Args:
            other: of another model, other settings or another version; this one is the old one.
        """
        before, after = str(self).splitlines(), str(other).splitlines()
        lines = difflib.unified_diff(before, after, "before", "after", n=0, lineterm="")
        return "\n".join(line for line in lines if not line.startswith("@@"))

    def _row(self, name: str) -> tuple[str, str, str, str, str]:
        layers = [layer.name for layer in self.coverage.layers.values() if layer.param == name]
        total = sum((self.costs[layer] for layer in layers if layer in self.costs), start=Cost())
        how = self._treatment(name).replace("\n  ", "; ")
        shape = "x".join(map(str, self.shapes[name]))
        if not layers:
            return name, shape, "", "", how
        return name, shape, readable(total.factor_bytes), f"{total.factor_flops / 1e6:,.3g}", how

    @property
    def summary(self) -> str:
        """Two lines: the share of parameters that are preconditioned, and what a factor step adds."""
        sizes = {name: math.prod(shape) for name, shape in self.shapes.items()}
        share = self.preconditioned / max(1, sum(sizes.values()))
        terms = "unknown (no site)" if self.terms is None else f"{self.terms} (rows of {self.coverage.terms})"
        total = self.cost
        ratio = f" ({total.factor_flops / self.plain_flops:+.0%})" if self.plain_flops else ""
        return (
            f"{share:.1%} of {sum(sizes.values()):,} parameters preconditioned; loss terms n = {terms}\n"
            f"a factor step adds {readable(total.factor_bytes)} of factors and "
            f"{total.factor_flops / 1e6:,.3g} MFLOP{ratio}; inverses keep {readable(total.state_bytes)}, "
            f"preconditioning takes {total.step_flops / 1e6:,.3g} MFLOP on every step"
        )

    @property
    def preconditioned(self) -> int:
        """How many numbers have a Kronecker pair."""
        layers = self.coverage.layers.values()
        return sum(layer.groups * layer.out * layer.in_ for layer in layers)


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
    rules, inverse = (DEFAULTS.rules, DEFAULTS.inverse) if tx is None else (tx.rules, tx.inverse)
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
    return Report(found, sites.sites, terms, step, shapes, sites.lines, costs, count_flops(step), estimator)


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


def describe(layer: Layer, param: str) -> str:
    """One layer in words, as it looks from one of its parameters."""
    if param == layer.bias:
        return f"last column of {layer.name}"
    uses = f" in {layer.uses} uses" if layer.uses > 1 else ""
    part = layer.name.removeprefix(layer.param)
    joint = " with bias" if layer.bias is not None else ""
    shared = ", reduced over positions" if layer.sharing == "reduce" else ""
    sides = f"A {layer.input}{joint}, G {layer.output}"
    return f"{part + ' ' if part else ''}{layer.kind}, {sides}, rows {layer.rows}{uses}{shared}"


def readable(count: int) -> str:
    """Bytes in a unit that fits."""
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.3g} {unit}"
