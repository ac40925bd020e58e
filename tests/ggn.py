"""Slow, dense curvature of a likelihood, in float64: Jacobians by autograd, row by row. No product code.

A network is ``net(tap, params, *inputs) -> z``. Where it uses a weight it calls ``tap(name, a, s)`` with the
layer's input and output, and goes on with what that returns.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Pair(NamedTuple):
    A: Tensor
    G: Tensor


def plain(_name, _a, s):
    return s


def hessian(loss, z: Tensor) -> Tensor:
    """Of ``loss(z)``, (numel, numel)."""
    found = torch.autograd.functional.hessian(loss, z.detach())
    return found.reshape(z.numel(), z.numel())


def jacobian(z: Tensor, leaf: Tensor) -> Tensor:
    """``dz/dleaf``: (numel of z, numel of leaf)."""
    rows = [
        torch.autograd.grad(entry, leaf, retain_graph=True, allow_unused=True)[0] for entry in z.flatten()
    ]
    return torch.stack([torch.zeros(leaf.numel()).to(z) if row is None else row.flatten() for row in rows])


def dense(net, params, loss, *inputs) -> dict[str, Tensor]:
    """``J^T H J`` of every parameter, where ``loss(z)`` is the loss as a function of the output."""
    leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    z = net(plain, leaves, *inputs)
    h = hessian(loss, z)
    return {name: (j := jacobian(z, leaf)).T @ h @ j for name, leaf in leaves.items()}


def factors(net, params, loss, *inputs, sharing="expand") -> dict[str, Pair]:
    """``A = mean a a^T``; ``G = sum_r J_r^T H J_r`` with ``J_r = dz/ds_r``, over all rows of all uses.

    Under "reduce" the first axis is the batch, and one row is a datum: ``a`` averaged, ``J`` summed.
    """
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def tap(name, a, s):
        zero = torch.zeros_like(s, requires_grad=True)
        seen.setdefault(name, []).append((a.detach(), zero))
        return s + zero

    leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    z = net(tap, leaves, *inputs)
    h = hessian(loss, z)
    found = {}
    for name, uses in seen.items():
        a = [_by_datum(use[0]) for use in uses]  # (B, positions, in)
        j = [_by_datum(jacobian(z, zero).reshape(-1, *zero.shape), 1) for _, zero in uses]
        if sharing == "reduce":
            a = [torch.stack([part.mean(1) for part in a]).mean(0)]
            j = [torch.stack([part.sum(2) for part in j]).sum(0)]
        rows = torch.cat([part.flatten(0, -2) for part in a])
        blocks = torch.cat([part.flatten(1, -2) for part in j], 1)  # (numel of z, rows, out)
        A = rows.T @ rows / len(rows)
        G = sum(blocks[:, r].T @ h @ blocks[:, r] for r in range(blocks.shape[1]))
        found[name] = Pair(A, G)
    return found


def _by_datum(value: Tensor, first: int = 0) -> Tensor:
    """(B, positions, features), behind ``first`` axes."""
    if value.dim() - first == 2:
        return value.unsqueeze(first + 1)
    return value.flatten(first + 1, -2)
