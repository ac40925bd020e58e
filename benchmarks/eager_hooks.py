"""K-FAC as one writes it by hand: forward and backward hooks, eager tensors, a loop over layers.

It computes what :class:`thor_fx.Thor` computes with its defaults (``tests/test_benchmarks.py``), for
models of ``nn.Linear``, ``nn.Embedding`` (whose ``A`` is a diagonal) and ``nn.LayerNorm``, each called at
most once per step::

    A = (1/R) sum_r a_r a_r^T    G = n sum_r g_r g_r^T    by blocks of 128
    U = (G + lambda I)^-1 (dL/dW) (A + lambda I)^-1       LayerNorm: g / (g^2/n + lambda)
    m = momentum m + U           W = W - lr m

What it lacks: guards against non-finite gradients and failed factorisations, and everything that is
no default. Hooks are attached for factor steps only, so a plain step costs what the model costs.
"""

from collections.abc import Iterator
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn


class EagerKfac:
    """An optimizer with hooks on every ``nn.Linear`` and ``nn.Embedding`` of ``model``.

    Args:
        terms: ``n``, how many terms the loss averages over.
        frequency: factors and inverses are renewed in step 0 and every ``frequency`` steps.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        damping: float,
        momentum: float,
        *,
        terms: int,
        frequency: int,
        block_size: int = 128,
    ) -> None:
        self._lr, self._damping, self._momentum = lr, damping, momentum
        self._terms, self._frequency, self._block_size = terms, frequency, block_size
        self.param_groups: list[dict[str, Any]] = []  # nobody schedules its rates
        self._params = list(model.parameters())
        self._moving = [torch.zeros_like(p) for p in self._params]
        self._linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
        self._embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
        self._norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
        self._factors: dict[tuple[nn.Module, str], Tensor] = {}
        self._inverses: dict[tuple[nn.Module, str], list[Tensor]] = {}
        self._frequencies: dict[nn.Module, Tensor] = {}
        self._hooks: list[Any] = []
        self._step = 0
        self._attach()

    @torch.no_grad()
    def step(self) -> None:
        if self._hooks:
            self._detach()
            self._refresh()
        updates = self._updates()
        torch._foreach_mul_(self._moving, self._momentum)
        torch._foreach_add_(self._moving, updates)
        torch._foreach_add_(self._params, self._moving, alpha=-self._lr)
        self._step += 1
        if self._step % self._frequency == 0:
            self._attach()

    def zero_grad(self) -> None:
        for parameter in self._params:
            parameter.grad = None

    # --- factors ---------------------------------------------------------------------------------

    def _attach(self) -> None:
        self._hooks = [linear.register_forward_hook(self._save_factors) for linear in self._linears]
        self._hooks += [m.register_forward_hook(self._save_frequencies) for m in self._embeddings]

    def _detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @torch.no_grad()
    def _save_factors(self, linear: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> None:
        a_RI = inputs[0].flatten(0, -2)
        self._factors[linear, "A"] = (a_RI.T @ a_RI).div_(len(a_RI))
        output.register_hook(partial(self._save_output_factor, linear))

    @torch.no_grad()
    def _save_frequencies(self, embedding: nn.Embedding, inputs: tuple[Tensor], output: Tensor) -> None:
        counts = torch.bincount(inputs[0].flatten(), minlength=embedding.num_embeddings)
        self._frequencies[embedding] = counts.to(output.dtype) / inputs[0].numel()
        output.register_hook(partial(self._save_output_factor, embedding))

    @torch.no_grad()
    def _save_output_factor(self, module: nn.Module, cotangent: Tensor) -> None:
        g_RO = cotangent.flatten(0, -2)
        self._factors[module, "G"] = (g_RO.T @ g_RO).mul_(self._terms)

    # --- refresh ---------------------------------------------------------------------------------

    def _refresh(self) -> None:
        """Invert the damped blocks of all factors, equal sizes in one batched call."""
        blocks = [
            (key, factor[start : start + self._block_size, start : start + self._block_size])
            for key, factor in self._factors.items()
            for start in range(0, len(factor), self._block_size)
        ]
        self._inverses = {key: [] for key in self._factors}
        by_size = sorted(blocks, key=lambda block: len(block[1]))
        for _, members in groupby(by_size, key=lambda block: len(block[1])):
            keys, stack = zip(*members, strict=True)
            for key, inverse in zip(keys, self._invert(torch.stack(stack)), strict=True):
                self._inverses[key].append(inverse)
        for inverses in self._inverses.values():  # sorting is stable: only the smaller rest is out of place
            inverses.sort(key=len, reverse=True)
        self._factors.clear()

    def _invert(self, matrices: Tensor) -> Tensor:
        matrices.diagonal(dim1=-2, dim2=-1).add_(self._damping)
        return torch.cholesky_inverse(torch.linalg.cholesky(matrices))

    # --- update ----------------------------------------------------------------------------------

    def _updates(self) -> list[Tensor]:
        new = {linear.weight: self._precondition(linear) for linear in self._linears}
        new |= {m.weight: self._precondition_table(m) for m in self._frequencies}
        new |= {p: self._elementwise(p.grad) for norm in self._norms for p in norm.parameters()}
        return [new.get(p, p.grad) for p in self._params]

    def _precondition(self, linear: nn.Linear) -> Tensor:
        left = _multiply(self._inverses[linear, "G"], linear.weight.grad)
        return _multiply(self._inverses[linear, "A"], left.T).T

    def _precondition_table(self, embedding: nn.Module) -> Tensor:
        scaled = embedding.weight.grad / (self._frequencies[embedding] + self._damping)[:, None]
        return _multiply(self._inverses[embedding, "G"], scaled.T).T

    def _elementwise(self, gradient: Tensor) -> Tensor:
        return gradient / (gradient**2 / self._terms + self._damping)


def _multiply(blocks: list[Tensor], x: Tensor) -> Tensor:
    """Block-diagonal times dense."""
    if len(blocks) == 1:
        return blocks[0] @ x
    return torch.cat([block @ rows for block, rows in zip(blocks, _rows(blocks, x), strict=True)])


def _rows(blocks: list[Tensor], x: Tensor) -> Iterator[Tensor]:
    return iter(x.split([len(block) for block in blocks]))
