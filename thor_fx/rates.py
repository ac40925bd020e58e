"""What the machine does in a second, and so the least time that some work can take."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second.

    Attributes:
        flops: floating-point operations of a large matrix product.
        bytes: that a large copy reads and writes.
    """

    flops: float
    bytes: float

    def seconds(self, flops: int, bytes: int) -> float:
        """The least time that work takes: the longer of arithmetic and traffic.

        Example:
            >>> Rates(flops=1e9, bytes=1e8).seconds(3_000_000, 100_000)
            0.003
        """
        return max(flops / self.flops, bytes / self.bytes)


def measured_rates(device: torch.device, scale: int = 1) -> Rates:
    """Measure both rates with the threads there are, the best of several times.

    Args:
        device: where.
        scale: divides the sizes: small ones are measured sooner, and closer to what caches do.
    """
    # NOTE: on a CPU each takes about 10 ms, so that some of them run between the turns of other processes
    side, numbers = (8192, 2**28) if device.type == "cuda" else (768, 2**24)
    side, numbers = max(8, side // scale), max(64, numbers // scale)
    a, b, c = (torch.randn(side, side, device=device) for _ in range(3))
    source, target = (torch.zeros(numbers, device=device) for _ in range(2))
    product = best_seconds(lambda: torch.mm(a, b, out=c), device)
    copying = best_seconds(lambda: target.copy_(source), device)
    return Rates(2 * side**3 / product, 2 * source.nbytes / copying)


def best_seconds(function: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    """The shortest of several runs, after one that does not count."""
    function()
    return min(seconds_of(function, device) for _ in range(repeats))


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """How long one run takes, until the device is done with it."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start
