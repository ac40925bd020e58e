"""What the study asks of an optimizer, and the usual training step around most of them."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import Tensor, nn

Settings = dict[str, Any]


class Trained(Protocol):
    """What an optimizer may ask about what it trains.

    Attributes:
        first_order: names of matrices that Muon leaves to AdamW: embeddings and the last layer.
    """

    @property
    def first_order(self) -> tuple[str, ...]: ...


class Contender(Protocol):
    """A model in training.

    Attributes:
        period: steps after which the work per step repeats.
    """

    period: int

    def step(self, x: Tensor, y: Tensor, rate: float) -> Tensor:
        """Take one step with the learning rate times ``rate``; return the loss before it."""


class Loop:
    """The usual loop around one or several optimizers."""

    def __init__(self, run: nn.Module, optimizers: Iterable[Any], period: int = 1) -> None:
        self.period = period
        self._run, self._optimizers = run, list(optimizers)
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        rates = [(group, name) for group in groups for name in ("lr", "fallback_lr") if group.get(name)]
        self._rates = [(group, name, float(group[name])) for group, name in rates]

    def step(self, x: Tensor, y: Tensor, rate: float, mark: Callable[[], Any] = lambda: None) -> Tensor:
        """Take one step; ``mark`` the end of forward and backward, and that of the update."""
        for group, name, value in self._rates:
            group[name] = value * rate
        loss = self._run(x, y)
        loss.backward()
        mark()
        self.update(rate)
        for optimizer in self._optimizers:
            optimizer.zero_grad()
        mark()
        return loss.detach()

    def update(self, rate: float) -> None:
        for optimizer in self._optimizers:
            optimizer.step()
