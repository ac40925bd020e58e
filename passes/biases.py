"""Find the bias that is added to what a weight makes, from its gradient.

The gradient of such a bias is ``sum_r g_r`` over the very cotangents of the weight's site. Then
weight and bias are one matrix with one more column, that of the homogeneous coordinate 1.
"""

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from .gathered import part_of
from .nodes import CASTS, PERMUTES, RESHAPES, arguments, shape, source, target
from .operands import Operand
from .patches import Pixels
from .reindex import Path, simplify, take
from .walk import NoSite, Rule, Site, Walk, unlike

aten = torch.ops.aten


@dataclass(frozen=True)
class Bias:
    """A bias, or the part of one, that belongs to a layer.

    Attributes:
        param: name of the parameter.
        path: where the (E out,) vector lies in the parameter.
    """

    param: str
    path: Path


@dataclass(frozen=True)
class _Sum:
    """A summand of a bias's gradient: the sum of ``cotangent`` over all axes but ``axis``."""

    cotangent: fx.Node
    axis: int
    path: Path


def find_biases(
    layers: dict[str, tuple[Site, ...]], gradients: dict[str, fx.Node], walk: Walk
) -> dict[str, Bias]:
    """The bias of every layer that has one.

    Args:
        layers: sites by layer.
        gradients: of the parameters that may be biases, by name.
        walk: with whatever rules; ours are put in.
    """
    candidates: dict[tuple[tuple[str, int], ...], list[tuple[Bias, int]]] = {}
    for name, gradient in gradients.items():
        for bias, read in _parts(name, gradient, walk).items():
            length = take(bias.path, torch.empty(_sizes(gradient), device="meta")).numel()
            candidates.setdefault(tuple(sorted(read)), []).append((bias, length))
    biases: dict[str, Bias] = {}
    for layer, sites in layers.items():
        read = sorted((_root(site.cotangent.node).name, _feature_axis(site.cotangent)) for site in sites)
        cotangent = part_of(sites[0].cotangent)
        length = cotangent.features * sites[0].groups
        fitting = [bias for bias, size in candidates.get(tuple(read), []) if size == length]
        if fitting and not any(site.flipped for site in sites):
            biases[layer] = fitting[0]
            if cotangent is not sites[0].cotangent:  # the path is that in the part of this rank
                biases[layer] = replace(fitting[0], path=())
    used = list(biases.values())
    return {layer: bias for layer, bias in biases.items() if used.count(bias) == 1}


def _parts(name: str, gradient: fx.Node, walk: Walk) -> dict[Bias, list[tuple[str, int]]]:
    """The parts of a bias, each with the names and axes of the cotangents that are summed in it."""
    try:
        found = list(Walk(name, walk.backward, walk.data, _ENDS).visit(gradient, ()))
    except NoSite:
        return {}
    parts: dict[Bias, list[tuple[str, int]]] = {}
    for item in found:
        bias = Bias(name, simplify(item.path, _sizes(gradient)))
        parts.setdefault(bias, []).append((item.cotangent.name, item.axis))
    return parts


def _sizes(gradient: fx.Node) -> tuple[int, ...]:
    return tuple(int(size) for size in shape(gradient))


def _sum(_walk: Walk, node: fx.Node, path: Path) -> Iterator[_Sum]:
    summed, axes = arguments(node)[:2]
    dims = len(shape(summed))
    kept = [axis for axis in range(dims) if axis not in {a % dims for a in axes}]
    if len(kept) == 1 and kept[0] in {1, dims - 1}:
        yield _Sum(_root(summed), 1 if kept[0] == 1 and dims > 2 else -1, path)
        return
    raise unlike(node)


def _getitem(_walk: Walk, node: fx.Node, path: Path) -> Iterator[_Sum]:
    operation, position = arguments(node)
    if target(operation) is not aten.convolution_backward.default or position != 2:
        raise unlike(node)
    yield _Sum(_root(source(operation)), 1, path)


def _root(node: fx.Node) -> fx.Node:
    """The node that a chain of views and casts starts from: the same for all readers of one value."""
    while target(node) in CASTS | RESHAPES | PERMUTES:
        node = source(node)
    return node


def _feature_axis(cotangent: Operand) -> int:
    return 1 if isinstance(cotangent, Pixels) else -1


_ENDS: dict[Any, Rule] = {aten.sum.dim_IntList: _sum, operator.getitem: _getitem}
