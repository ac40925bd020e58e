"""Kronecker factors of a layer, from the sums that a factor step returns.

Let the loss average over ``n`` terms, let ``a_r`` be the input and ``g_r = dL/ds_r`` the gradient of
the pre-activation in row ``r`` of ``R``, and let the loss carry the scale ``s``. Then::

    A = (1/R) sum_r a_r a_r^T            G = (n / s^2) sum_r g_r g_r^T

``n`` undoes the mean in the loss: ``n g_r`` are the gradients of single terms. For a plain Linear
``R = n``, and these are ``E[a a^T]`` and ``E[g g^T]`` (Martens & Grosse 2015, eq. 1; for weights
that are shared over positions, the *expand* setting of Eschenhagen et al. 2023, eq. 11).

A weight that is used as ``W`` and as ``W.T`` (a tied auto-encoder) has two Kronecker products in its
block: ``A (x) G`` of the first and, with the sides exchanged, ``G' (x) A'`` of the second. Their sum is
approximated by one, as factored damping does (Martens & Grosse 2015, section 6.3)::

    (A + G'/pi) (x) (G + pi A')     with     pi^2 = (tr G tr G') / (tr A tr A')

where ``pi`` is what makes the superfluous cross terms smallest in trace norm.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from .arguments import check_integer, check_number
from .capture import LossFn
from .linalg import trace
from .passes import canonicalize, emit_factors, outputs, pipeline
from .passes.emit_factors import transposed
from .passes.outputs import Factor, Rows, Terms
from .trace import trace_step


class Moments(NamedTuple):
    """What one factor step measures of one layer.

    Attributes:
        activations: ``sum_r a_r a_r^T``, shape (in, in).
        cotangents: ``sum_r g_r g_r^T``, shape (out, out).
        rows: ``R``, 0-D.
    """

    activations: Tensor
    cotangents: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Kronecker:
    """The factor pair of one layer: its curvature block is approximately ``A (x) G``.

    Attributes:
        A: shape (in, in).
        G: shape (out, out).
        rows: ``R``, the rows that ``A`` averages over.
        n: the terms that the loss averages over.
        kind: the kind of layer.
        groups: number of independent factor pairs; 1 for all but grouped layers.
    """

    A: Tensor
    G: Tensor
    rows: int
    n: int
    kind: str = "linear"
    groups: int = 1


def input_factor(moments: Moments) -> Tensor:
    """``A``, shape (in, in)."""
    return moments.activations / moments.rows


def output_factor(moments: Moments, terms: Tensor | float, loss_scale: float) -> Tensor:
    """``G``, shape (out, out)."""
    return moments.cotangents * (terms / loss_scale**2)


def factor_pair(
    moments: Mapping[str, Moments], layer: str, terms: Tensor | float, loss_scale: float
) -> tuple[Tensor, Tensor]:
    """``A`` (in, in) and ``G`` (out, out) of a layer, over all of its uses."""
    a, g = input_factor(moments[layer]), output_factor(moments[layer], terms, loss_scale)
    other = moments.get(transposed(layer))
    if other is None:
        return a, g
    other_a, other_g = input_factor(other), output_factor(other, terms, loss_scale)
    square = (trace(g) * trace(other_g)) / (trace(a) * trace(other_a))
    pi = torch.where(square.isfinite() & (square > 0), square, torch.ones_like(square)) ** 0.5
    return a + other_g / pi, g + pi * other_a


def kronecker(
    moments: Mapping[str, Moments], terms: Tensor | float, loss_scale: float = 1.0
) -> dict[str, Kronecker]:
    """The factor pairs of all layers, by name."""
    result = {}
    for name in moments:
        if name.endswith(transposed("")):
            continue  # part of its layer
        a, g = factor_pair(moments, name, terms, loss_scale)
        rows = sum(int(moments[use].rows) for use in (name, transposed(name)) if use in moments)
        result[name] = Kronecker(a, g, rows, int(terms))
    return result


def moments_of(results: Mapping[Any, Any]) -> dict[str, Moments]:
    """Sort what a factor graph returns (values or nodes, by descriptor) by layer."""
    layers = [descriptor.layer for descriptor in results if isinstance(descriptor, Rows)]
    return {
        layer: Moments(results[Factor(layer, "A")], results[Factor(layer, "G")], results[Rows(layer)])
        for layer in layers
    }


def flat_moments(moments: Mapping[str, Moments]) -> dict[Any, Tensor]:
    """The inverse of :func:`moments_of`."""
    return {
        descriptor: value
        for name, m in moments.items()
        for descriptor, value in zip((Factor(name, "A"), Factor(name, "G"), Rows(name)), m, strict=True)
    }


def factors(
    loss_fn: LossFn,
    params: Mapping[str, Tensor],
    *batch: Any,
    batch_size: int | None = None,
    loss_scale: float = 1.0,
) -> dict[str, Kronecker]:
    """The Kronecker factors of every layer on one batch: undamped and not cut into blocks.

    Args:
        loss_fn: ``loss_fn(params, *batch)``, returns a scalar loss or ``(loss, aux)``.
        params: floating-point tensors by name.
        *batch: tensors and nests of tensors.
        batch_size: terms ``n`` that the loss averages over; None: the rows of the site nearest the
            loss. A loss that is a *sum* over ``n`` terms is ``n`` times their mean: also pass
            ``loss_scale=n``.
        loss_scale: what ``loss_fn`` multiplies the mean loss by.

    Returns:
        ``Kronecker(A, G, rows, n, kind, groups)`` by name of layer, in the definitions at the top of
        :mod:`thor_fx.factors`. A layer is called as its parameter, with ``[start:stop]`` behind it
        where a part of the parameter has factors of its own.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: an argument has a wrong value, or the loss does not depend on ``params``.

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> f = factors(lambda p, x: (x @ p["w"]).mean(), {"w": torch.ones(2, 1)}, x)
        >>> f["w"].A
        tensor([[ 5.,  7.],
                [ 7., 10.]])
        >>> f["w"].G, f["w"].rows, f["w"].n
        (tensor([[1.]]), 2, 2)
    """
    check_integer("batch_size", batch_size, optional=True)
    check_number("loss_scale", loss_scale, positive=True)
    graph = pipeline.run(trace_step(loss_fn, params, *batch), [canonicalize, emit_factors])
    results = run_graph(graph, params, *batch)
    terms = results[Terms()] if batch_size is None and Terms() in results else batch_size or 1
    return kronecker(moments_of(results), terms, loss_scale)


def run_graph(gm: fx.GraphModule, params: Mapping[str, Tensor], *batch: Any) -> dict[Any, Tensor]:
    """Interpret a graph made by :func:`~thor_fx.trace.trace_step`; its results by descriptor."""
    leaves = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
    with torch.no_grad():
        values = gm(*params.values(), *leaves)
    return dict(zip(outputs.output_nodes(gm), values, strict=True))
