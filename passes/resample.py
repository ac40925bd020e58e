"""Put other cotangents in the place of the loss's, and repeat the backward below them.

The backward below ``dL/dz``, the cotangent of a model's output, is linear in it. So cotangents ``c`` that
are computed from ``z`` (:mod:`thor_fx.passes.scores`) and copies of the nodes between ``dL/dz`` and the
cotangents of the sites give what the sites' cotangents would be for another loss; activations stay.

Afterwards everything that the graph returned before is computed by the same nodes as before.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map_only

from .layout import Rules, Use
from .nodes import downstream, upstream
from .operands import Operand, Pooled
from .outputs import KEY, Loss, Mutation, Output, output_nodes
from .scores import cotangents
from .sites import SiteReport, seeds
from .splice import another

DRAW = "thor_fx draws"
Insert = Callable[..., Any]
Copies = Mapping[fx.Node, fx.Node]


def resample(
    gm: fx.GraphModule, report: SiteReport, terms: fx.Node, rules: Rules, insert: Insert
) -> list[Copies]:
    """Insert the cotangents of all heads, and what they reach, in place.

    Args:
        gm: a step graph or joint graph.
        report: its sites and heads.
        terms: the node of ``n``.
        rules: which estimator.
        insert: ``insert(anchor, function, *nodes)``: :func:`~thor_fx.passes.splice.splice`.

    Returns:
        For every direction, what stands for each node of the backward that was copied.
    """
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    heads = report.heads
    values = [terms, *(node for head in heads for node in head.nodes)]
    results = [
        n for d, n in output_nodes(gm).items() if n is not None and isinstance(d, Loss | Output | Mutation)
    ]
    # NOTE: behind all of forward, so that the model's own random draws come first
    anchor = max([*values, *upstream(results)], key=order.__getitem__)
    assert rules.fisher != "empirical", "the empirical Fisher needs no other cotangents"
    directions = insert(anchor, partial(cotangents, heads, rules.fisher), *values)
    for node in gm.graph.nodes:
        if node not in order:
            node.meta[DRAW] = True
    last = {node: i for i, node in enumerate(gm.graph.nodes)}
    start = max((c for row in directions for c in row.values()), key=last.__getitem__)
    starts = [head.cotangent for head in heads]
    wanted = upstream(node for site in report.sites for node in site.cotangent.nodes)
    region = [n for n in gm.graph.nodes if n in downstream(starts) & wanted and n not in starts]
    blocked = downstream(seeds(gm))
    copier = _Copier(region, blocked, start, last, insert)
    return [copier.copy({heads[i].cotangent: c for i, c in row.items()}) for row in directions]


def is_draw(node: fx.Node) -> bool:
    """Whether a node was inserted for the cotangents of a likelihood: nobody misses a draw of it."""
    return DRAW in node.meta


@dataclass
class _Copier:
    """Copies a part of the backward, as often as asked.

    Attributes:
        region: the nodes to copy, in order.
        backward: all of backward: what of it has no copy counts as zero.
        cursor: the last node that was inserted.
        order: of the nodes before anything was copied.
        insert: see :func:`resample`.
    """

    region: Sequence[fx.Node]
    backward: set[fx.Node]
    cursor: fx.Node
    order: Mapping[fx.Node, int]
    insert: Insert

    def __post_init__(self) -> None:
        self._position = self.order[self.cursor]
        self._zeros: dict[fx.Node, fx.Node] = {}

    def copy(self, starts: Copies) -> Copies:
        copies = dict(starts)
        for node in self.region:
            if not any(source in copies for source in node.all_input_nodes):
                continue
            if self.order[node] > self._position:
                self.cursor, self._position = node, self.order[node]
            inputs = {source: self._stand_in(source, copies) for source in node.all_input_nodes}
            with node.graph.inserting_after(self.cursor):
                self.cursor = copies[node] = node.graph.node_copy(node, inputs.__getitem__)
            self.cursor.meta = {key: value for key, value in node.meta.items() if key != KEY}
            # NOTE: values of their own, for tracers tell tensors apart by identity
            if "val" in node.meta:
                self.cursor.meta["val"] = tree_map_only(torch.Tensor, another, node.meta["val"])
        return copies

    def _stand_in(self, source: fx.Node, copies: Copies) -> fx.Node:
        if source in copies or source not in self.backward:
            return copies.get(source, source)
        if source not in self._zeros:
            self.cursor = self._zeros[source] = self.insert(self.cursor, torch.zeros_like, source)
        return self._zeros[source]


def with_copies(use: Use, directions: Sequence[Copies]) -> Use:
    """A use whose cotangents are those of all directions; their outer products add up."""
    found = [_mapped(operand, copies) for copies in directions for operand in use.cotangents]
    cotangents = tuple(operand for operand in found if operand is not None)
    assert cotangents, f"no cotangent of {use.name} comes from the model's output"
    return replace(use, cotangents=cotangents)


def _mapped(operand: Operand, copies: Copies) -> Operand | None:
    """The operand read from copies; None if it has none: it is zero then."""
    if isinstance(operand, Pooled):
        parts = tuple(part for old in operand.parts if (part := _mapped(old, copies)) is not None)
        return replace(operand, node=parts[0].node, parts=parts) if parts else None
    if not any(node in copies for node in operand.nodes):
        return None
    changed: dict[str, Any] = {}
    for field in fields(operand):
        value = getattr(operand, field.name)
        if isinstance(value, fx.Node):
            changed[field.name] = copies.get(value, value)
        elif isinstance(value, Operand):
            changed[field.name] = _mapped(value, copies) or value
    return replace(operand, **changed)
