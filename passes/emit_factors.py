"""Append the Kronecker statistics of every site to a step graph.

With the rows ``a_r`` and ``g_r`` of a layer (``r`` over all uses and positions, ``R`` of them)::

    Factor(layer, "A") = sum_r a_r a_r^T      (in, in)
    Factor(layer, "G") = sum_r g_r g_r^T      (out, out)
    Rows(layer)        = R
    Terms()            = n, the rows of the site nearest the loss

Where a side keeps its mean only, the sum is ``sum_r a_r`` or ``sum_r g_r``, without the outer product.
A layer with E groups (a grouped convolution, experts) has one pair for every group: (E, in, in) and
(E, out, out). How much of a factor is kept, where that is not the whole, is said in
:mod:`thor_fx.passes.sides` and decided in :mod:`thor_fx.passes.layout`.

Sums and not means: they add up over micro-batches, graphs and devices as they are.
``A = Factor/R`` and ``G = n Factor`` (:mod:`thor_fx.factors`). Where a weight is used as ``W`` and as
``W.T``, the uses of the transpose have sums of their own, under a name of their own
(:func:`~thor_fx.passes.layout.transposed`).

Afterwards everything that the graph returned before is computed by the same nodes as before.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from . import switches
from .layout import Rules, Use, arrange, one_hot
from .operands import Matrix, Operand
from .outputs import Factor, OutputDescriptor, Rows, Terms, append, select
from .products import block_grams, gram
from .resample import is_draw, resample, with_copies
from .sides import Side, widen
from .sites import SiteReport
from .splice import Decompositions, Traced, put, splice, trace
from .survey import survey
from .walk import Site


def emit_factors(
    gm: fx.GraphModule,
    *,
    rules: Rules = Rules(),  # noqa: B008 - frozen
    report: SiteReport | None = None,
    decompositions: Decompositions | None = None,
) -> None:
    """Add ``Factor``, ``Rows`` and ``Terms`` outputs to ``gm``, in place.

    Args:
        gm: a step graph or joint graph with descriptors.
        rules: what may be chosen about factors.
        report: what :func:`~thor_fx.passes.survey.survey` says of ``gm``, where the caller knows it already.
        decompositions: the table that ``gm`` was traced with.
    """
    with switches.without(rules.disabled):
        _emit(gm, rules, report or survey(gm, rules), decompositions)


def _emit(
    gm: fx.GraphModule, rules: Rules, report: SiteReport, decompositions: Decompositions | None
) -> None:
    insert = partial(splice, decompositions=decompositions)
    uses = [use for layout in arrange(report, rules).values() for use in layout.uses]
    terms = None
    if report.nearest is not None and report.heads:
        terms = _terms(gm, report.nearest, insert, early=True)
        directions = resample(gm, report, terms, rules, insert)
        uses = [with_copies(use, directions) for use in uses]
    last = {node: position for position, node in enumerate(gm.graph.nodes)}
    new: list[tuple[OutputDescriptor, fx.Node]] = []
    share = _Shared(decompositions)
    for use in uses:
        read = _nodes((*use.activations, *use.cotangents))
        anchor = max((*(site.gradient for site in use.sites), *read), key=last.__getitem__)
        new += _moments(use, anchor, share)
    if report.nearest is not None:
        new.append((Terms(), terms or _terms(gm, report.nearest, insert, early=False)))
    append(gm, new)


def _terms(gm: fx.GraphModule, nearest: Site, insert: Callable[..., fx.Node], *, early: bool) -> fx.Node:
    """The node of ``n``: beside the site nearest the loss or, where draws need it, ``early``."""
    last = {node: position for position, node in enumerate(gm.graph.nodes)}
    rows = nearest.activation
    anchor = max(rows.nodes if early else (nearest.gradient, *rows.nodes), key=last.__getitem__)
    return insert(anchor, terms_of(rows), *rows.nodes)


def drop_factors(gm: fx.GraphModule) -> None:
    """Undo :func:`emit_factors`: the graph is, node for node, what it was before."""
    select(gm, lambda descriptor: not isinstance(descriptor, Factor | Rows | Terms))
    gm.graph.eliminate_dead_code(lambda node: node.is_impure() and not is_draw(node))


class _Shared:
    """Inserts what is not there yet: layers that read the same rows have one factor between them.

    Queries, keys and values of an attention share ``A``; so do the gate and the rise of a gated network. Two
    layers whose results are added up share ``G``. Layers of the same form are traced once.
    """

    def __init__(self, decompositions: Decompositions | None) -> None:
        self._decompositions = decompositions
        self._known: dict[str, fx.Node] = {}
        self._traced: dict[Any, Traced] = {}

    def __call__(
        self, anchor: fx.Node, what: Any, operands: tuple[Operand, ...], function: Callable[..., Tensor]
    ) -> fx.Node:
        """The node of a function of the operands' values, which ``what`` tells from other functions."""
        nodes = _nodes(operands)
        key = repr((what, operands))  # nodes have names of their own; sizes may be symbolic
        if key not in self._known or not switches.is_on("shared_inputs"):
            form = _form(key, nodes)
            again = form in self._traced
            if not again:
                self._traced[form] = trace(function, *nodes, decompositions=self._decompositions)
            self._known[key] = put(anchor, self._traced[form], *nodes, again=again)
        return self._known[key]


def _form(key: str, nodes: list[fx.Node]) -> tuple[str, ...]:
    """What tells apart functions of nodes whose names do not matter, but whose values' form does."""
    places = {node.name: f"%{i}" for i, node in reversed(list(enumerate(nodes)))}
    plain = re.sub(r"\w+", lambda word: places.get(word[0], word[0]), key)
    values = [node.meta["val"] for node in nodes]
    return plain, *(f"{tuple(v.shape)} {v.stride()} {v.dtype} {v.device}" for v in values)


def _moments(use: Use, anchor: fx.Node, share: _Shared) -> list[tuple[OutputDescriptor, fx.Node]]:
    new: list[tuple[OutputDescriptor, fx.Node]] = []
    a, g = use.activations, use.cotangents
    if use.input.kind != "identity":
        new.append((Factor(use.name, "A"), share(anchor, use.input, a, moment(a, use.input))))
    if use.output.kind != "identity":
        new.append((Factor(use.name, "G"), share(anchor, use.output, g, moment(g, use.output))))
    return [*new, (Rows(use.name), share(anchor, "rows", a, row_count(a)))]


def _nodes(operands: tuple[Operand, ...]) -> list[fx.Node]:
    return [node for operand in operands for node in operand.nodes]


def moment(operands: tuple[Operand, ...], side: Side) -> Callable[..., Tensor]:
    """A function of the operands' values: what ``side`` keeps of the sum of ``x_r x_r^T`` over all rows."""

    def second(*values: Tensor) -> Tensor:
        given = _values(operands, values)
        found = _whole_rows(operands, given, side)
        if found is None:
            parts = [_part(operand, side, own) for operand, own in zip(operands, given, strict=True)]
            found = sum(parts[1:], start=parts[0])
        if not side.joint:
            return found
        count = row_count(operands)(*values)
        if side.kind == "mean":
            return _extended(found, count)
        totals = [operand.total(*own) for operand, own in zip(operands, given, strict=True)]
        border = _bordered if side.kind == "dense" else _bordered_blocks
        return border(found, sum(totals[1:], start=totals[0]), count)

    return second


def _part(operand: Operand, side: Side, values: list[Tensor]) -> Tensor:
    """What one use adds to the factor."""
    if side.kind == "mean":
        return operand.total(*values)
    if one_hot(operand):
        return widen(operand.squares(*values), Side(operand.features, "diagonal"), side)
    if side.kind == "dense":
        return operand.gram(*values)
    return operand.squares(*values) if side.kind == "diagonal" else operand.blocks(side.block, *values)


def _whole_rows(operands: tuple[Operand, ...], given: list[list[Tensor]], side: Side) -> Tensor | None:
    """All uses in one product, where their rows are plain matrices: a cell of a recurrent net, say."""
    plain = all(isinstance(operand, Matrix) and not operand.grouped for operand in operands)
    if len(operands) < 2 or not plain or side.kind not in {"dense", "blocks"}:
        return None
    x = torch.cat([operand.read(*own) for operand, own in zip(operands, given, strict=True)])
    return gram(x) if side.kind == "dense" else block_grams(x, side.block)


def _bordered(gram: Tensor, total: Tensor, count: Tensor) -> Tensor:
    """The moment of rows with a 1 behind their features: (..., F + 1, F + 1)."""
    right = _extended(total, count).unsqueeze(-2)
    return torch.cat([torch.cat([gram, total.unsqueeze(-1)], -1), right], -2)


def _bordered_blocks(blocks: Tensor, total: Tensor, count: Tensor) -> Tensor:
    """The same in blocks: the 1 joins the last block, or where that is full, is a block of its own."""
    size = blocks.shape[-1]
    place = total.shape[-1] % size
    last = blocks[..., -1:, :place, :place] if place else blocks.new_zeros(*blocks.shape[:-3], 1, 0, 0)
    border = _bordered(last, total[..., None, total.shape[-1] - place :], count)
    rest = size - place - 1
    whole = blocks[..., :-1, :, :] if place else blocks
    return torch.cat([whole, torch.nn.functional.pad(border, (0, rest, 0, rest))], -3)


def _extended(total: Tensor, count: Tensor) -> Tensor:
    """The sum of rows with a 1 behind their features: (..., F + 1)."""
    return torch.cat([total, count.expand(total.shape[:-1]).unsqueeze(-1)], -1)


def row_count(operands: tuple[Operand, ...]) -> Callable[..., Tensor]:
    """A function of the operands' values: how many rows they have, 0-D or (E,)."""

    def count(*values: Tensor) -> Tensor:
        given = zip(operands, _values(operands, values), strict=True)
        counts = [operand.count(*own) for operand, own in given]
        return sum(counts[1:], start=counts[0])

    return count


def terms_of(operand: Operand) -> Callable[..., Tensor]:
    """A function of an operand's values: all of its rows, over all groups, 0-D."""

    def terms(*values: Tensor) -> Tensor:
        count = operand.count(*values)
        return count.sum() if count.dim() else count

    return terms


def _values(operands: tuple[Operand, ...], values: tuple[Tensor, ...]) -> list[list[Tensor]]:
    given = iter(values)
    return [[next(given) for _ in operand.nodes] for operand in operands]
