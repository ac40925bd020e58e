"""How long a refresh takes on this device, by block size.

Inverted are the factors of a real model, cut into blocks, all blocks of one size in one batched call.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import blocks
from .inverses.cholesky import damped_inverse

REPEATS = 5
ENOUGH = 0.5  # seconds: what takes longer is not repeated further


@dataclass(frozen=True, eq=False)
class Inversion:
    """All damped inverses of a refresh at one block size; call it to compute them once.

    Attributes:
        block_size: side of the blocks.
        stacks: the blocks, (N, b, b) for every ``b`` that occurs.
        strengths: a damping for each block, (N, 1, 1).
    """

    block_size: int
    stacks: tuple[Tensor, ...]
    strengths: tuple[Tensor, ...]

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.stacks[0].device

    def __call__(self) -> None:
        """Compute the inverses; on a GPU: start to."""
        for stack, strength in zip(self.stacks, self.strengths, strict=True):
            damped_inverse(stack, strength)


Timer = Callable[[Inversion], float]
"""Says how many milliseconds an inversion takes."""


def inversion(factors: Iterable[Tensor], block_size: int) -> Inversion:
    """What is inverted when factors, each (L, d, d), are cut into blocks.

    The damping is the mean eigenvalue of each block, so that no inversion ends early.
    """
    alike: dict[tuple[int, torch.dtype], list[Tensor]] = {}
    for matrices in factors:
        for part in blocks.diagonal_blocks(matrices, block_size):  # (L, F, b, b)
            alike.setdefault((part.shape[-1], part.dtype), []).append(part.flatten(0, 1))
    stacks = tuple(torch.cat(parts) for parts in alike.values())
    return Inversion(block_size, stacks, tuple(map(_mean_eigenvalue, stacks)))


def _mean_eigenvalue(stack: Tensor) -> Tensor:
    mean = stack.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    return torch.where(mean > 0, mean, torch.ones_like(mean))


def milliseconds(work: Inversion) -> float:
    """The shortest of a few runs after one to warm up, by the clock on the wall; waits for the device."""
    _timed(work)
    runs = [_timed(work)]
    while len(runs) < REPEATS and sum(runs) < ENOUGH:
        runs.append(_timed(work))
    return 1000 * min(runs)


def _timed(work: Inversion) -> float:
    _wait_for(work.device)
    start = time.perf_counter()
    work()
    _wait_for(work.device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
