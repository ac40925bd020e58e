"""Append the Kronecker statistics of every site to a step graph.

With the rows ``a_r`` and ``g_r`` of a layer (``r`` over all uses and positions, ``R`` of them)::

    Factor(layer, "A") = sum_r a_r a_r^T      (in, in)
    Factor(layer, "G") = sum_r g_r g_r^T      (out, out)
    Rows(layer)        = R
    Terms()            = n, the rows of the site nearest the loss

Sums and not means: they add up over micro-batches, graphs and devices as they are.
``A = Factor/R`` and ``G = n Factor`` (:mod:`thor_fx.factors`). Where a weight is used as ``W`` and as
``W.T``, the uses of the transpose have sums of their own, under a name of their own (:func:`transposed`).

Afterwards everything that the graph returned before is computed by the same nodes as before.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, fx

from .outputs import Factor, OutputDescriptor, Rows, Terms, append, select
from .sites import SiteReport, find_sites
from .splice import Decompositions, splice
from .walk import Operand, Site


def emit_factors(
    gm: fx.GraphModule,
    *,
    report: SiteReport | None = None,
    decompositions: Decompositions | None = None,
) -> None:
    """Add ``Factor``, ``Rows`` and ``Terms`` outputs to ``gm``, in place.

    Args:
        gm: a step graph or joint graph with descriptors.
        report: what :func:`find_sites` says of ``gm``, where the caller knows it already.
        decompositions: the table that ``gm`` was traced with.
    """
    report = report or find_sites(gm)
    last = _order(gm)
    insert = partial(splice, decompositions=decompositions)
    new: list[tuple[OutputDescriptor, fx.Node]] = []
    for layer, sites in report.layers.items():
        for name, uses in ((layer, False), (transposed(layer), True)):
            same = [site for site in sites if site.flipped is uses]
            if same:
                new += _moments(name, same, max((s.gradient for s in same), key=last.__getitem__), insert)
    if report.nearest is not None:
        new.append((Terms(), _terms(report.nearest, insert)))
    append(gm, new)


def transposed(layer: str) -> str:
    """What the uses of a layer's transposed matrix are called in descriptors."""
    return f"{layer} (transposed)"


def layer_of(use: str) -> str:
    """The layer whose factors are called ``use``, of its matrix or of the transpose."""
    return use.removesuffix(transposed(""))


def _moments(
    layer: str, sites: list[Site], anchor: fx.Node, insert: Callable[..., fx.Node]
) -> list[tuple[OutputDescriptor, fx.Node]]:
    activations = [site.activation for site in sites]
    cotangents = [site.cotangent for site in sites]
    inputs, gradients = [o.node for o in activations], [o.node for o in cotangents]
    return [
        (Factor(layer, "A"), insert(anchor, second_moment(activations), *inputs)),
        (Factor(layer, "G"), insert(anchor, second_moment(cotangents), *gradients)),
        (Rows(layer), insert(anchor, row_count(activations), *inputs)),
    ]


def drop_factors(gm: fx.GraphModule) -> None:
    """Undo :func:`emit_factors`: the graph is, node for node, what it was before."""
    select(gm, lambda descriptor: not isinstance(descriptor, Factor | Rows | Terms))
    gm.graph.eliminate_dead_code()


def second_moment(operands: list[Operand]) -> Callable[..., Tensor]:
    """A function of the operands' values: the sum of ``x_r x_r^T`` over the rows of all of them."""

    def moment(*values: Tensor) -> Tensor:
        parts = [x.T @ x for x in _all_rows(operands, values)]
        return sum(parts[1:], start=parts[0])

    return moment


def row_count(operands: list[Operand]) -> Callable[..., Tensor]:
    """A function of the operands' values: how many rows they have, as a 0-D tensor."""

    def count(*values: Tensor) -> Tensor:
        rows = sum(x.shape[0] for x in _all_rows(operands, values))
        return torch.full((), rows, dtype=_accumulator(values[0]), device=values[0].device)

    return count


def _terms(nearest: Site, insert: Callable[..., fx.Node]) -> fx.Node:
    return insert(nearest.gradient, row_count([nearest.activation]), nearest.activation.node)


def _all_rows(operands: list[Operand], values: tuple[Tensor, ...]) -> list[Tensor]:
    return [_rows(operand, value) for operand, value in zip(operands, values, strict=True)]


def _rows(operand: Operand, value: Tensor) -> Tensor:
    """The operand as a (rows, features) matrix in the dtype that factors are summed in."""
    if value.dim() == 1:
        value = value.unsqueeze(0)
    value = value.mT if operand.transposed else value
    return value.flatten(0, -2).to(_accumulator(value))


def _accumulator(value: Tensor) -> torch.dtype:
    """Factors are summed in float32, or in float64 for a float64 model."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def _order(gm: fx.GraphModule) -> dict[fx.Node, int]:
    return {node: position for position, node in enumerate(gm.graph.nodes)}
