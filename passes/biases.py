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

from .axes import Axis, axes_of, merged
from .gathered import part_of
from .members import Apart
from .nodes import arguments, shape, source, target
from .operands import Matrix, Operand
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


Features = tuple[str, Axis]
"""A node, and the axes of it that are groups and features."""


@dataclass(frozen=True)
class _Sum:
    """A summand of a bias's gradient: the sum of a cotangent over all of its axes but ``features``."""

    features: Features
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
    candidates: dict[tuple[Features, ...], list[tuple[Bias, int]]] = {}
    for name, gradient in gradients.items():
        for bias, read in _parts(name, gradient, walk).items():
            length = take(bias.path, torch.empty(_sizes(gradient), device="meta")).numel()
            candidates.setdefault(tuple(sorted(read)), []).append((bias, length))
    biases: dict[str, Bias] = {}
    for layer, sites in layers.items():
        found = [_features(part_of(site.cotangent)) for site in sites]
        read = sorted(features for features in found if features is not None)
        cotangent = part_of(sites[0].cotangent)
        length = cotangent.features * sites[0].groups
        fitting = [bias for bias, size in candidates.get(tuple(read), []) if size == length]
        if fitting and None not in found and not any(site.flipped for site in sites):
            biases[layer] = fitting[0]
            if cotangent is not sites[0].cotangent:  # the path is that in the part of this rank
                biases[layer] = replace(fitting[0], path=())
    used = list(biases.values())
    return {layer: bias for layer, bias in biases.items() if used.count(bias) == 1}


def _parts(name: str, gradient: fx.Node, walk: Walk) -> dict[Bias, list[Features]]:
    """The parts of a bias, each with what of the cotangents is summed in it."""
    try:
        found = list(Walk(name, walk.backward, walk.data, _ENDS).visit(gradient, ()))
    except NoSite:
        return {}
    parts: dict[Bias, list[Features]] = {}
    for item in found:
        bias = Bias(name, simplify(item.path, _sizes(gradient)))
        parts.setdefault(bias, []).append(item.features)
    return parts


def _sizes(gradient: fx.Node) -> tuple[int, ...]:
    return tuple(int(size) for size in shape(gradient))


def _sum(_walk: Walk, node: fx.Node, path: Path) -> Iterator[_Sum]:
    summed, axes = arguments(node)[:2]
    dims = len(shape(summed))
    gone = {axis % dims for axis in axes} or set(range(dims))
    places = [axis for axis in range(dims) if axis not in gone]
    kept = _lying(summed, *places) if places else None
    if kept is None:
        raise unlike(node)
    yield _Sum(kept, path)


def _getitem(_walk: Walk, node: fx.Node, path: Path) -> Iterator[_Sum]:
    operation, position = arguments(node)
    if target(operation) is not aten.convolution_backward.default or position != 2:
        raise unlike(node)
    kept = _lying(source(operation), 1)
    if kept is None:
        raise unlike(node)
    yield _Sum(kept, path)


def _features(cotangent: Operand) -> Features | None:
    """Which axes of what a cotangent is a view of are its groups and its features."""
    if isinstance(cotangent, Apart):
        return _features(cotangent.inner)
    if isinstance(cotangent, Pixels):
        return _lying(cotangent.node, 1)
    last = -2 if isinstance(cotangent, Matrix) and cotangent.transposed else -1
    grouped = isinstance(cotangent, Matrix) and cotangent.grouped
    return _lying(cotangent.node, *([0] if grouped else []), last)


def _lying(node: fx.Node, *places: int) -> Features | None:
    root, axes = axes_of(node)
    found = [axes[place] for place in places]
    known = [axis for axis in found if axis is not None]
    return (root.name, merged(known)) if len(known) == len(found) else None


_ENDS: dict[Any, Rule] = {aten.sum.dim_IntList: _sum, operator.getitem: _getitem}
