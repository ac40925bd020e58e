"""Everybody who takes part, as their packages ship them, and where each one's search starts.

None of the peers' code is ours: what is not installed is reported as such. What is special about thor_fx is
in ``ours.py``.
"""

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from loops import Contender, Loop, Settings, Trained
from networks import WithLoss
from ours import RECOMMENDED, THOR, thor
from search import Space
from torch import nn

INTERVAL = 10  # steps between renewals of curvature, wherever an optimizer has such an interval

Make = Callable[[WithLoss, Trained, Settings, str], Contender]
"""``(model, task, settings, backend)``; trains the model's own parameters."""


@dataclass(frozen=True)
class Entry:
    """One optimizer of the study: its row's label, its maker, its search and the modules it needs."""

    label: str
    make: Make
    space: Space
    needs: tuple[str, ...] = ()

    @property
    def installed(self) -> bool:
        return all(importlib.util.find_spec(name) is not None for name in self.needs)


def sgd(model: WithLoss, task: Trained, settings: Settings, backend: str) -> Contender:
    optimizer = torch.optim.SGD(model.parameters(), fused=True, **settings)
    return Loop(torch.compile(model, backend=backend), [optimizer])


def adamw(model: WithLoss, task: Trained, settings: Settings, backend: str) -> Contender:
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **settings)
    return Loop(torch.compile(model, backend=backend), [optimizer])


def muon(model: WithLoss, task: Trained, settings: Settings, backend: str) -> Contender:
    """Muon for hidden weights, of convolutions too; AdamW for embeddings, the last layer and vectors."""
    named = dict(model.named_parameters())
    hidden = {n: p for n, p in named.items() if p.ndim >= 2 and n not in task.first_order}
    others = [p for n, p in named.items() if n not in hidden]
    matrices = Matrices(list(hidden.values()), lr=settings["lr"], weight_decay=settings["weight_decay"])
    rest = torch.optim.AdamW(
        others, lr=settings["adamw_lr"], weight_decay=settings["weight_decay"], fused=True
    )
    return Loop(torch.compile(model, backend=backend), [matrices, rest])


class Matrices(torch.optim.Muon):
    """``torch.optim.Muon`` on matrix views of weights of any number of axes: it takes matrices only."""

    def __init__(self, weights: list[nn.Parameter], **settings: Any) -> None:
        self._weights = weights
        self._views = [nn.Parameter(weight.detach().view(len(weight), -1)) for weight in weights]
        super().__init__(self._views, **settings)

    def step(self, closure: Any = None) -> Any:
        for view, weight in zip(self._views, self._weights, strict=True):
            view.grad = None if weight.grad is None else weight.grad.flatten(1)
        return super().step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for weight in (*self._views, *self._weights):
            weight.grad = None


def soap(model: WithLoss, task: Trained, settings: Settings, backend: str) -> Contender:
    from soap import SOAP

    optimizer = SOAP(model.parameters(), **settings)
    return Loop(torch.compile(model, backend=backend), [optimizer], period=settings["precondition_frequency"])


def shampoo(model: WithLoss, task: Trained, settings: Settings, backend: str) -> Contender:
    """Distributed Shampoo in the form its README gives for users of AdamW: grafted onto Adam."""
    from distributed_shampoo import AdamPreconditionerConfig, DistributedShampoo

    beta2 = settings["beta2"]
    others = {name: value for name, value in settings.items() if name != "beta2"}
    optimizer = DistributedShampoo(
        model.parameters(),
        betas=(0.9, beta2),
        grafting_config=AdamPreconditionerConfig(beta2=beta2, epsilon=1e-8),
        **others,
    )
    return Loop(torch.compile(model, backend=backend), [optimizer], period=settings["precondition_frequency"])


class Kfac(Loop):
    """kfac-pytorch in front of SGD with momentum, as in its examples; eager: its hooks break graphs."""

    def __init__(self, model: WithLoss, settings: Settings) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Apex is missing
            from kfac.preconditioner import KFACPreconditioner

        lr, self._rate = settings["lr"], 0.0
        others = {name: value for name, value in settings.items() if name not in {"lr", "momentum"}}
        self._kfac = KFACPreconditioner(model, lr=lambda step: lr * self._rate, **others)
        sgd = torch.optim.SGD(model.parameters(), lr=lr, momentum=settings["momentum"], fused=True)
        super().__init__(model, [sgd], period=settings["inv_update_steps"])

    def update(self, rate: float) -> None:
        self._rate = rate
        self._kfac.step()
        super().update(rate)


def kfac(model: WithLoss, task: Trained, settings: Settings, backend: str) -> Contender:
    return Kfac(model, settings)


# NOTE: [Where the searches start] The package's own default or its examples' learning rate. The loss of the
# auto-encoder is a sum over 784 pixels, so an update that scales with the gradient starts lower there. The
# search leaves a bad start by itself: see search.py.
OPTIMIZERS = {
    "adamw": Entry(
        "AdamW",
        adamw,
        Space({"": 3e-3}, "betas", {"": ((0.9, 0.999), (0.9, 0.95))}, {"weight_decay": 0.01}),
    ),
    "sgd": Entry(
        "SGD-momentum",
        sgd,
        Space({"": 0.1, "autoencoder": 1e-3}, "momentum", {"": (0.9, 0.98)}),
    ),
    "muon": Entry(
        "Muon (torch.optim) + AdamW",
        muon,
        Space({"": 0.02}, "adamw_lr", {"": (3e-3, 1e-2)}, {"weight_decay": 0.01}),
    ),
    "soap": Entry(
        "SOAP",
        soap,
        Space(
            {"": 3e-3},
            "betas",
            {"": ((0.95, 0.95), (0.9, 0.99))},
            {"weight_decay": 0.01, "precondition_frequency": INTERVAL},
        ),
        needs=("soap",),
    ),
    "shampoo": Entry(
        "Distributed Shampoo",
        shampoo,
        Space(
            {"": 3e-3},
            "beta2",
            {"": (0.999, 0.95)},
            {"weight_decay": 0.01, "precondition_frequency": INTERVAL, "max_preconditioner_dim": 1024},
        ),
        needs=("distributed_shampoo",),
    ),
    "kfac": Entry(
        "kfac-pytorch",
        kfac,
        Space(
            {"": 0.1},
            "damping",
            {"": (0.003, 0.03)},
            {"momentum": 0.9, "factor_update_steps": INTERVAL, "inv_update_steps": INTERVAL},
        ),
        needs=("kfac",),
    ),
    "thor": Entry("thor_fx, THOR preset", thor, THOR),
    "recommended": Entry("thor_fx, recommended", thor, RECOMMENDED),
}
