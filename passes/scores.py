"""Cotangents of a model's output that stand for the curvature of its likelihood.

Let the loss be ``L = sum_r w_r NLL_r(z_r)`` over the rows of an output (:mod:`thor_fx.passes.heads`), let
``H_r`` be the Hessian of ``NLL_r`` and ``n`` the graph's :class:`~thor_fx.passes.outputs.Terms`. The
cotangents made here are those of single terms, times what makes terms of unequal weight equal::

    c_r = sqrt(n w_r) s_r        with   E[s_r s_r^T] = H_r   and   E[s_r s_q^T] = 0 for r != q

so that, with ``J_r = dz_r/dtheta``, the generalised Gauss-Newton matrix of ``L`` is::

    (1/n) E[(sum_r J_r^T c_r) (sum_r J_r^T c_r)^T] = sum_r w_r J_r^T H_r J_r

*sampled*: ``s_r`` is the score ``dNLL/dz`` of one label that is drawn from the model's own predictive
distribution (Martens & Grosse 2015, section 5). *exact*: the expectation becomes a sum over directions
``k``, one backward pass each: ``s_r^k = sqrt(p_k) (p - e_k)`` for C classes, and the unit vectors times
``sqrt(H)`` elsewhere. Rows of one datum may influence each other, so they take turns: with T positions
there are T times as many directions, each zero in all positions but one.

The weights: where all heads are categorical, ``sum_r w_r = 1``, whatever the loss is multiplied by.
Elsewhere they are those of the loss itself, divided by its scale: what one unit of ``z`` is worth is
nothing that could be normalised away. Either way ``G`` carries no loss scale. Of a negative weight (a
policy gradient's) the absolute value counts.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor, fx

from .heads import Head
from .operands import widened

Directions = list[dict[int, Tensor]]
"""For every direction the cotangents of heads, by number; there is none where it is zero."""


def cotangents(heads: Sequence[Head], estimator: Literal["sampled", "exact"], *values: Tensor) -> Directions:
    """The cotangents of all heads, direction by direction.

    Args:
        heads: the outputs.
        estimator: how the curvature is estimated.
        *values: ``n``, then those of the nodes of every head.
    """
    terms, *rest = values
    given = iter(rest)
    own = [[next(given) for _ in head.nodes] for head in heads]
    roots = [(widened(terms) * w).sqrt() for w in _weights(heads, own)]
    if estimator == "sampled":
        found = [root * sampled(head, v[0]) for head, root, v in zip(heads, roots, own, strict=True)]
        return [{i: _like(c, v[1]) for i, (c, v) in enumerate(zip(found, own, strict=True))}]
    result: Directions = []
    for i, (head, root, v) in enumerate(zip(heads, roots, own, strict=True)):
        result += [{i: _like(root * score, v[1])} for score in exact(head, v[0])]
    return result


def sampled(head: Head, output: Tensor) -> Tensor:
    """The score of one label per row, drawn from the predictive distribution: the shape of ``output``."""
    z = widened(output)
    # NOTE: rand and not bernoulli, which Inductor may read before it is sampled (torch 2.11, 2.13)
    if head.kind == "categorical":
        p = z.softmax(_axis(head)).movedim(_axis(head), -1)
        return (p - _drawn(p)).movedim(-1, _axis(head))
    if head.kind == "bernoulli":
        p = z.sigmoid()
        return p - (torch.rand_like(p) < p).to(p.dtype)
    if head.kind == "gaussian":
        return torch.randn_like(z)
    assert head.sampler is not None, "a custom likelihood brings its sampler"
    score: Any = head.sampler(output)
    if not isinstance(score, Tensor) or score.shape != output.shape:
        got = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
        raise ValueError(
            f"likelihood(z) must return scores of the shape of z, {tuple(output.shape)}: got {got}"
        )
    return widened(score)


def _drawn(p: Tensor) -> Tensor:
    """One-hot rows, drawn by the inverse of the cumulative distribution: (..., C)."""
    cumulative = p.cumsum(-1)
    total = cumulative[..., -1:]
    label = (cumulative < torch.rand_like(total) * total).sum(-1, keepdim=True)
    return (label == torch.arange(p.shape[-1], device=p.device)).to(p.dtype)


def exact(head: Head, output: Tensor) -> Iterator[Tensor]:
    """Scores whose outer products add up to the Hessian of every row, :func:`count` of them."""
    z = widened(output)
    positions, features = sizes(head, output)
    if head.axis is None:
        number = torch.arange(len(z), device=z.device) % positions
        yield from (_root_of_curvature(head, z) * (number == t).to(z.dtype) for t in range(positions))
        return
    axis = _axis(head)
    place = _positions(head, z)
    number = torch.arange(features, device=z.device).reshape([-1 if a == axis else 1 for a in range(z.dim())])
    p = z.softmax(axis) if head.kind == "categorical" else _root_of_curvature(head, z)
    for t, k in product(range(positions), range(features)):
        unit = (number == k).to(p.dtype)
        score = p.narrow(axis, k, 1).sqrt() * (p - unit) if head.kind == "categorical" else p * unit
        yield score if positions == 1 else score * (place == t).to(p.dtype)


def sizes(head: Head, output: Tensor) -> tuple[int, int]:
    """How many positions a datum has, and how many elements a row."""
    if head.axis is None:
        return head.positions or 1, 1
    axis = _axis(head)
    rest = [size for a, size in enumerate(output.shape) if a != axis][1:]
    positions = 1
    for size in rest:
        positions *= size
    return positions * (head.positions or 1), output.shape[axis]


def _positions(head: Head, z: Tensor) -> Tensor:
    """The number of every row's position; broadcasts against ``z``."""
    axis = _axis(head)
    rest = [size for a, size in enumerate(z.shape) if a != axis]
    if head.positions is not None:
        ids = torch.arange(rest[0], device=z.device) % head.positions
    else:
        ids = torch.arange(sizes(head, z)[0], device=z.device).reshape([1, *rest[1:]])
    return ids.unsqueeze(axis)


def _root_of_curvature(head: Head, z: Tensor) -> Tensor:
    if head.kind == "gaussian":
        return torch.ones_like(z)
    p = z.sigmoid()
    return (p * (1 - p)).sqrt()


def _axis(head: Head) -> int:
    assert head.axis is not None, "an output of one axis has no classes"
    return head.axis % len(head.output.meta["val"].shape)


def _weights(heads: Sequence[Head], own: list[list[Tensor]]) -> list[Tensor]:
    normalised = all(head.weights.relative for head in heads)
    found = []
    for head, (z, _, *rest) in zip(heads, own, strict=True):
        given = rest[: len(head.weights.nodes)]
        weights = head.weights.read(z, head.axis, *given)
        if head.weights.scaled and not normalised:
            weights = weights / _scale(head, rest)
        found.append(weights)
    if not normalised:
        return found
    total = torch.stack([weights.sum() for weights in found]).sum()
    return [torch.where(total > 0, weights / total, torch.zeros_like(weights)) for weights in found]


def _scale(head: Head, values: list[Tensor]) -> Tensor | float:
    return widened(values[-1]).abs() if isinstance(head.scale, fx.Node) else head.scale


def _like(value: Tensor, cotangent: Tensor) -> Tensor:
    """The value as the backward expects it: shape, dtype and order of axes of the cotangent."""
    value = value.expand(cotangent.shape).to(cotangent.dtype)
    if cotangent.is_contiguous():
        return value.contiguous()
    order = sorted(range(cotangent.dim()), key=cotangent.stride, reverse=True)
    back = sorted(range(len(order)), key=order.__getitem__)
    return value.permute(order).contiguous().permute(back)
