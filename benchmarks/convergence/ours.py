"""All of the study that knows thor_fx: how it trains, and where its two searches start.

``fixed``, ``knob`` and ``values`` are keyword arguments of :class:`thor_fx.Thor` and :func:`thor_fx.thor`;
besides, ``door`` is ``"drop-in"`` or ``"functional"``, and ``others`` the learning rate of what belongs to
no layer, as a part of ``lr``. With it, what Muon leaves to AdamW is left to AdamW.
"""

from functools import partial

import torch
from loops import Contender, Loop, Settings, Trained
from networks import WithLoss
from search import Space
from torch import Tensor

import thor_fx

INTERVAL = 10  # as everybody's

THOR = Space(
    lr={"": 0.03, "autoencoder": 0.003},
    knob="damping",
    values={"": (0.03, 0.3)},
    fixed={"door": "drop-in", "momentum": 0.9, "frequency": INTERVAL},
)

RECOMMENDED = Space(
    lr={"": 0.02},
    knob="damping",
    values={"": (1.0, 0.3)},
    fixed={"door": "drop-in", "preset": "recommended", "frequency": INTERVAL, "others": 0.2},
)


class Functional:
    """The functional door: loss, gradients and update are one graph, which writes into the parameters."""

    def __init__(self, model: WithLoss, settings: Settings, backend: str, period: int) -> None:
        def loss_fn(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return torch.func.functional_call(model, params, (x, y))

        self.period = period
        self._rate = 0.0
        names = [name for name in ("lr", "fallback_lr") if name in settings]
        rates = {name: partial(self._scheduled, settings[name]) for name in names}
        tx = thor_fx.thor(**{**settings, **rates})
        self._step = thor_fx.compile_step(loss_fn, tx, backend=backend)
        self._params = dict(model.named_parameters())
        self._state: thor_fx.StepState | None = None

    def _scheduled(self, value: float, _: int) -> float:
        return value * self._rate

    def step(self, x: Tensor, y: Tensor, rate: float) -> Tensor:
        self._rate = rate
        if self._state is None:
            self._state = self._step.init(self._params, x, y)
        self._params, self._state, out = self._step(self._params, self._state, x, y)
        return out.loss


def thor(model: WithLoss, task: Trained, settings: Settings, backend: str) -> Contender:
    door = settings.pop("door")
    if "others" in settings:
        settings["fallback_lr"] = settings.pop("others") * settings["lr"]
        settings["layer_filter"] = lambda name: name not in task.first_order
    period = settings.get("frequency", INTERVAL)
    if door == "functional":
        return Functional(model, settings, backend, period)
    run = thor_fx.compile(model, backend=backend)
    return Loop(run, [thor_fx.Thor(run, **settings)], period)
