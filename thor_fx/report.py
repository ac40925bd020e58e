"""What :func:`thor_fx.explain` says of a model: a table, reasons, graphs, costs, pictures."""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import networkx as nx
from torch import fx

from .capture import LossFn
from .costs import Cost
from .graphs import draw, to_networkx
from .layers import Coverage, Layer
from .page import Page, write_page
from .passes import Site, emit_factors, pipeline
from .passes.layout import Rules
from .passes.phases import mark
from .plots import as_svg
from .step_report import StepKind, StepReport, step_report
from .step_time import MeasuredStep
from .transform import Params, Transform
from .units import scaled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Traced(NamedTuple):
    """What a report was made of: a loss function, its arguments, and what it is trained with."""

    loss_fn: LossFn
    params: Params
    batch: Sequence[Any]
    tx: Transform


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
        traced: what was traced.
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
    traced: Traced | None = field(default=None, repr=False)

    @property
    def graph(self) -> "nx.DiGraph[str]":
        """The factor step up to its update, as a ``networkx.DiGraph``: :meth:`network`."""
        return self.network()

    def network(self, step: StepKind = "factor") -> "nx.DiGraph[str]":
        """A step up to its update as a ``networkx.DiGraph``, with :class:`thor_fx.graphs.Facts` on the nodes.

        Args:
            step: ``"factor"`` or ``"plain"``.

        Raises:
            ValueError: there is no such step.
        """
        if step not in get_args(StepKind):
            raise ValueError(f"step must be one of {list(get_args(StepKind))}, got {step!r}")
        rules = Rules() if self.traced is None else self.traced.tx.rules
        passes: list[pipeline.Pass] = (
            [mark] if step == "plain" else [partial(emit_factors, rules=rules), mark]
        )
        gm = pipeline.run(self.step, passes)
        return to_networkx(gm, self.sites)

    @cached_property
    def steps(self) -> StepReport:
        """Both kinds of step as :func:`thor_fx.compile_step` compiles them, their costs and their kernels.

        Nothing is compiled before somebody asks for kernels, or for measured times.
        The rates of the machine are measured, in a second or two.

        Raises:
            ValueError: the loss shows no likelihood, and the estimator needs one.
        """
        if self.traced is None:
            raise ValueError("this report was made by hand: thor_fx.explain makes one that knows its steps")
        return step_report(*self.traced)

    def draw(self, path: str | Path, step: StepKind = "factor") -> None:
        """Draw a step up to its update into an ``.svg`` file: :func:`thor_fx.graphs.draw`.

        Raises:
            ValueError: ``path`` does not end in ``.svg``.
        """
        draw(self.network(step), path, title=f"A {step} step")

    def html(
        self,
        path: str | Path,
        *,
        step: StepKind = "factor",
        measured: Mapping[StepKind, MeasuredStep] | None = None,
        plots: Mapping[str, "Figure | str"] | None = None,
        title: str = "thor_fx",
    ) -> None:
        """Write one page with everything, to open in a browser; it needs no network.

        Args:
            path: an ``.html`` file.
            step: the kind of step whose graph is shown.
            measured: ``report.steps.measured(kind)`` by kind: adds kernels and times.
            plots: what else to show, by title: figures of :mod:`thor_fx.plots`, or SVG text.
            title: of the page.

        Raises:
            ValueError: ``path`` does not end in ``.html``, or see :attr:`steps`.
        """
        steps, known = self.steps, measured or {}
        page = Page(
            title,
            [self._row(name) for name in self.shapes],
            f"{self.summary}\n{steps.predicted}",
            self.network(step),
            stages=steps.stages["factor"],
            steps=[known[kind].cost if kind in known else cost for kind, cost in steps.costs.items()],
            kernels={kind: run.kernels for kind, run in known.items()},
            plots={name: as_svg(plot) for name, plot in (plots or {}).items()},
        )
        write_page(path, page)

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
        return name, shape, scaled(total.factor_bytes, "B"), f"{total.factor_flops / 1e6:,.3g}", how

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
            f"a factor step adds {scaled(total.factor_bytes, 'B')} of factors and "
            f"{total.factor_flops / 1e6:,.3g} MFLOP{ratio}; inverses keep {scaled(total.state_bytes, 'B')}, "
            f"preconditioning takes {total.step_flops / 1e6:,.3g} MFLOP on every step"
        )

    @property
    def preconditioned(self) -> int:
        """How many numbers have a Kronecker pair."""
        layers = self.coverage.layers.values()
        return sum(layer.groups * layer.out * layer.in_ for layer in layers)


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
