"""The slow optimizer of :mod:`eager_thor` with running averages, and inverses renewed by hand."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eager_thor import EagerThor
from oracle import damped
from training import Batch, Parameters, snapshot


def blocks_of(matrix: Tensor, size: int | None) -> Tensor:
    """The matrix without what is outside its diagonal blocks."""
    if size is None:
        return matrix
    block = torch.arange(len(matrix)) // size
    return matrix * (block[:, None] == block[None, :])


class AveragedThor(EagerThor):
    """``F = decay F + (1 - decay) F_batch``, divided by ``1 - decay^k``.

    ``after(step)`` names the layers whose inverses are renewed after a step; without it all of them are
    in every factor step, and act in that step.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        decay: float,
        after: Callable[[int], Iterable[str]] | None = None,
        block_size: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(model, **settings)
        self.decay, self.after, self.block_size = decay, after, block_size
        self.sums: dict[str, list[Tensor]] = {}
        self.counts: dict[str, int] = {}

    def renew(self, names: Iterable[str]) -> None:
        for name in names:
            correction = 1 - self.decay ** self.counts[name]
            whole = [blocks_of(s / correction, self.block_size) for s in self.sums[name]]
            self.inverses[name] = tuple(torch.linalg.inv(damped(m, self.damping)) for m in whole)

    def step(self, n: float) -> None:
        step = self.steps
        if step % self.frequency == 0:
            for name, (A, G, _) in self.factors(n).items():
                old = self.sums.get(name, [torch.zeros_like(A), torch.zeros_like(G)])
                pairs = zip(old, (A, G), strict=True)
                self.sums[name] = [self.decay * s + (1 - self.decay) * f for s, f in pairs]
                self.counts[name] = self.counts.get(name, 0) + 1
                if self.after is None or name not in self.inverses:
                    self.renew([name])
        for name, p in self.model.named_parameters():
            if p.grad is not None:
                self._move(name, p)
        self.steps += 1
        if self.after is not None and step > 0:
            self.renew(self.after(step))


def slow_trajectory(model: nn.Module, data: Iterable[Batch], **settings: Any) -> list[Parameters]:
    """The parameters after every step of a classifier."""
    optimizer = AveragedThor(model, **settings)
    found = []
    for x, y in data:
        F.cross_entropy(model(x), y).backward()
        optimizer.step(len(x))
        optimizer.zero_grad()
        found.append(snapshot(dict(model.named_parameters())))
    return found
