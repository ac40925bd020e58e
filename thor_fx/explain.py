"""What is preconditioned, what is not, and why."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from .layers import Coverage, Layer, coverage
from .parameters import trainable
from .passes import Site, canonicalize, find_sites, pipeline
from .trace import trace_step


@dataclass(frozen=True)
class Report:
    """The coverage of a model; ``print(report)`` shows it as a table.

    Attributes:
        coverage: every parameter, in exactly one place.
        sites: every use of a preconditioned weight.
        terms: ``n``, the terms that the loss averages over, as read off the graph; None without sites.
        step: the step graph.
        shapes: the shape of every parameter.
    """

    coverage: Coverage
    sites: tuple[Site, ...]
    terms: int | None
    step: fx.GraphModule
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def graph(self) -> nx.DiGraph:
        """The step graph as a ``networkx.DiGraph``: operator, shape and dtype on the nodes."""
        return to_networkx(self.step)

    def why(self, param: str) -> str:
        """How one parameter is treated, and the reason.

        Raises:
            KeyError: the model has no parameter of this name.
        """
        found = self.coverage
        layers = [layer for layer in found.layers.values() if layer.param == param]
        if layers:
            return "preconditioned: " + "; ".join(_describe(layer) for layer in layers)
        if param in found.norms:
            return "elementwise rule: scale or shift of a normalisation layer"
        if param in found.fallback:
            return f"first-order rule: {found.fallback[param]}"
        if param in found.unused:
            return "not trained: the loss does not depend on it"
        if param in found.frozen:
            return "frozen"
        raise KeyError(f"no parameter {param!r}; there are {sorted(self.shapes)}")

    def __str__(self) -> str:
        rows = [(name, "x".join(map(str, shape)), self.why(name)) for name, shape in self.shapes.items()]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        lines = [f"{name:<{widths[0]}}  {shape:>{widths[1]}}  {how}" for name, shape, how in rows]
        return "\n".join([*lines, self.summary])

    @property
    def summary(self) -> str:
        """One line: the share of parameters that are preconditioned, and the loss terms."""
        sizes = {name: math.prod(shape) for name, shape in self.shapes.items()}
        kronecker = sum(layer.out * layer.in_ for layer in self.coverage.layers.values())
        share = kronecker / max(1, sum(sizes.values()))
        terms = "unknown (no site)" if self.terms is None else f"{self.terms} (rows of {self.coverage.terms})"
        return f"{share:.1%} of {sum(sizes.values()):,} parameters preconditioned; loss terms n = {terms}"


def explain(target: nn.Module | Callable[..., Any], *example: Any) -> Report:
    """Trace a model or loss function once and say what becomes of every parameter.

    Args:
        target: a module, called with ``*example``; or ``loss_fn``, with ``params, *batch``.
        *example: the arguments.

    Returns:
        A report to print or to ask.

    Raises:
        TypeError: ``target`` is neither, or ``params`` are missing or not floating-point.
        ValueError: nothing in it is differentiable.

    Example:
        >>> report = explain(torch.nn.Linear(3, 2, bias=False), torch.ones(5, 3))
        >>> print(report)
        weight  2x3  preconditioned: A 3x3, G 2x2, rows 5
        100.0% of 6 parameters preconditioned; loss terms n = 5 (rows of weight)
    """
    if isinstance(target, nn.Module):
        params: Any = dict(target.named_parameters())
        loss_fn, batch = _sum_of_outputs(target), example
    elif callable(target):
        if not example:
            raise TypeError("explain(loss_fn, params, *batch) needs params")
        loss_fn, params, batch = target, example[0], example[1:]
    else:
        raise TypeError(f"explain takes a module or a loss function, got {type(target).__name__}")
    step = pipeline.run(trace_step(loss_fn, params, *batch), [canonicalize])
    sites = find_sites(step)
    frozen = tuple(name for name, p in params.items() if not trainable(p))
    terms = None if sites.nearest is None else int(sites.nearest.activation.rows)
    shapes = {name: tuple(p.shape) for name, p in params.items()}
    return Report(coverage(sites, frozen), sites.sites, terms, step, shapes)


def to_networkx(gm: fx.GraphModule) -> nx.DiGraph:
    """A graph as a ``networkx.DiGraph`` with an edge from every value to its users."""
    graph = nx.DiGraph()
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        facts = {"shape": tuple(value.shape), "dtype": value.dtype} if isinstance(value, Tensor) else {}
        graph.add_node(node.name, op=node.op, operator=str(node.target), **facts)
        graph.add_edges_from((source.name, node.name) for source in node.all_input_nodes)
    return graph


def _sum_of_outputs(model: nn.Module) -> Callable[..., Any]:
    def loss_fn(params: Mapping[str, Tensor], *args: Any) -> Tensor:
        leaves = pytree.tree_leaves(functional_call(model, dict(params), args))
        parts = [leaf.sum() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        return torch.stack(parts).sum()

    return loss_fn


def _describe(layer: Layer) -> str:
    uses = f" in {layer.uses} uses" if layer.uses > 1 else ""
    part = layer.name.removeprefix(layer.param)
    sides = f"A {layer.in_}x{layer.in_}, G {layer.out}x{layer.out}"
    return f"{part + ' ' if part else ''}{sides}, rows {layer.rows}{uses}"
