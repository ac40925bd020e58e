"""Slow, obvious versions of what the product computes. They share no code with it.

Everything here is float64, one thing at a time: loops over rows, dense matrices, ``torch.linalg``.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad, vmap

from models import Case


class Use(NamedTuple):
    """One use of a weight: activations ``a_r`` (rows, in) and gradients ``g_r = dL/ds_r`` (rows, out).

    Of a layer with groups: (groups, rows, in) and (groups, rows, out).
    """

    a: Tensor
    g: Tensor


class Pair(NamedTuple):
    """``A = (1/R) sum a a^T`` (in, in), ``G = n sum g g^T`` (out, out), and ``R``."""

    A: Tensor
    G: Tensor
    rows: int


def loss_and_gradients(case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    """By autograd on ``case.forward``; a parameter that the loss does not depend on has no gradient."""
    loss, leaves, _ = _run(case)
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return loss.detach(), {name: g for name, g in zip(leaves, found, strict=True) if g is not None}


def uses(case: Case) -> dict[str, list[Use]]:
    """Activations and cotangents of every use, by layer: ``dL/ds`` by a zero that is added to ``s``."""
    loss, _, seen = _run(case)
    found: dict[str, list[Use]] = {}
    for layer, activation, zero in seen:
        (g,) = torch.autograd.grad(loss, zero, retain_graph=True)
        a = activation.detach()
        first = 1 if layer in case.groups else 0
        rows = Use(a.flatten(first, -2), g.flatten(first, -2)) if g.dim() > 1 else Use(a[None], g[None])
        found.setdefault(layer, []).append(rows)
    return found


def factors(case: Case, n: int | None = None) -> dict[str, Pair]:
    """The factor pairs of a case, row by row. ``n`` is ``case.terms`` unless given."""
    pairs = {name: pair(found, case.terms if n is None else n) for name, found in uses(case).items()}
    layers = [name for name in pairs if name in case.layers]
    return {name: both_ways(pairs[name], pairs.get(f"{name} (transposed)")) for name in layers}


def both_ways(straight: Pair, transpose: Pair | None) -> Pair:
    """One pair for ``W`` and ``W.T``: ``(A + G'/pi) (x) (G + pi A')``, ``pi^2 = tr G tr G' / tr A tr A'``."""
    if transpose is None:
        return straight
    trace_a, trace_g = straight.A.trace() * transpose.A.trace(), straight.G.trace() * transpose.G.trace()
    pi = (trace_g / trace_a).sqrt()
    rows = straight.rows + transpose.rows
    return Pair(straight.A + transpose.G / pi, straight.G + pi * transpose.A, rows)


def pair(found: list[Use], n: float) -> Pair:
    """One factor pair from all uses of a weight; of a layer with groups, a stack of pairs."""
    if found[0].a.dim() == 3:
        groups = [pair([Use(use.a[e], use.g[e]) for use in found], n) for e in range(len(found[0].a))]
        return Pair(torch.stack([p.A for p in groups]), torch.stack([p.G for p in groups]), groups[0].rows)
    a_rows = [a for use in found for a in use.a]
    g_rows = [g for use in found for g in use.g]
    A = sum(torch.outer(a, a) for a in a_rows) / len(a_rows)
    G = n * sum(torch.outer(g, g) for g in g_rows)
    return Pair(A, G, len(a_rows))


def kept(expected: Tensor, like: Tensor) -> Tensor:
    """What a product that keeps diagonals (an embedding's ``A``) has of a factor."""
    return expected if like.dim() == expected.dim() else expected.diagonal(dim1=-2, dim2=-1)


def _run(case: Case) -> tuple[Tensor, dict[str, Tensor], list[tuple[str, Tensor, Tensor]]]:
    seen: list[tuple[str, Tensor, Tensor]] = []

    def tap(layer: str, activation: Tensor, preactivation: Tensor) -> Tensor:
        zero = torch.zeros_like(preactivation, requires_grad=True)
        seen.append((layer, activation, zero))
        return preactivation + zero

    leaves = {name: p.detach().clone().requires_grad_() for name, p in case.params.items()}
    return case.forward(tap, leaves, *case.batch), leaves, seen


# --- dense curvature -------------------------------------------------------------------------------


def per_example_gradients(loss_fn, params: Mapping[str, Tensor], *batch: Tensor) -> dict[str, Tensor]:
    """``dL_i/dp`` of every example alone, (examples, *shape); ``loss_fn`` gets batches of one."""

    def of_one(p: dict[str, Tensor], *example: Tensor) -> Tensor:
        return loss_fn(p, *(e[None] for e in example))

    plain = {name: p.detach() for name, p in params.items()}
    return vmap(grad(of_one), in_dims=(None, *[0] * len(batch)))(plain, *batch)


def empirical_fisher(gradients: Tensor) -> Tensor:
    """``(1/n) sum_i vec(g_i) vec(g_i)^T`` of per-example gradients (n, ...), dense."""
    flat = gradients.flatten(1)
    return sum(torch.outer(g, g) for g in flat) / len(flat)


def kronecker(left: Tensor, right: Tensor) -> Tensor:
    """The dense Kronecker product, written out."""
    return torch.cat([torch.cat([entry * right for entry in row], dim=1) for row in left], dim=0)


def natural_step(A: Tensor, G: Tensor, gradient: Tensor, damp_a: float, damp_g: float) -> Tensor:
    """``(G + d_g I)^-1 (x) (A + d_a I)^-1`` times ``vec(gradient)`` (out, in), by one dense solve."""
    dense = kronecker(damped(G, damp_g), damped(A, damp_a))  # vec runs over rows of the (out, in) matrix
    return torch.linalg.solve(dense, gradient.flatten()).view_as(gradient)


def damped(matrix: Tensor, damping: float) -> Tensor:
    return matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest entry of ``expected``."""
    scale = expected.abs().max().item()
    difference = (got - expected).abs().max().item()
    return difference / scale if scale else difference
