"""All of the study that knows thor_fx: how it trains, and where its two searches start.

The dictionaries ``fixed`` and ``values`` hold keyword arguments of :class:`thor_fx.Thor`.
"""

from typing import Any

from networks import WithLoss
from search import Space
from tasks import Task
from torch import Tensor

import thor_fx

INTERVAL = 10  # as everybody's

THOR = Space(
    lr={"": 0.03, "autoencoder": 0.003},
    knob="damping",
    values={"": (0.03, 0.3)},
    fixed={"momentum": 0.9, "frequency": INTERVAL},
)

# NOTE: [To adapt] the recommended preset is still being written; these are its nearest relatives that exist.
RECOMMENDED = Space(
    lr={"": 0.03, "autoencoder": 0.003},
    knob="damping",
    values={"": (0.03, 0.3)},
    fixed={"momentum": 0.9, "frequency": INTERVAL, "damping_rule": "pi", "block_size": None, "bias": "joint"},
)


class DropIn:
    """The drop-in door: ``thor_fx.compile`` and ``thor_fx.Thor`` in the usual loop."""

    def __init__(self, model: WithLoss, settings: dict[str, Any], backend: str) -> None:
        self.period = settings.get("frequency", INTERVAL)
        self._lr = settings["lr"]
        self._run = thor_fx.compile(model, backend=backend)
        self._optimizer = thor_fx.Thor(self._run, **settings)

    def step(self, x: Tensor, y: Tensor, rate: float) -> Tensor:
        for group in self._optimizer.param_groups:
            group["lr"] = self._lr * rate
        loss = self._run(x, y)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.detach()


def thor(model: WithLoss, task: Task, settings: dict[str, Any], backend: str) -> DropIn:
    return DropIn(model, settings, backend)
