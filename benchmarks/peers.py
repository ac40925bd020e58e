"""Other people's second-order optimizers, built as the study of convergence builds them."""

import importlib.util
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from contenders import DAMPING, FREQUENCY, LR, MOMENTUM, Contender, Entrant, Looped, Mark
from from_study import OPTIMIZERS, WithLoss
from torch import Tensor, nn
from workloads import Batch, Workload

INTERVALS = ("precondition_frequency", "factor_update_steps", "inv_update_steps")
SAME = {"lr": LR, "adamw_lr": LR, "damping": DAMPING, **dict.fromkeys(INTERVALS, FREQUENCY)}
"""What all contenders share, by the names that packages have for it."""


@dataclass(frozen=True)
class Parted:
    """Which matrices Muon leaves to AdamW."""

    first_order: tuple[str, ...]


def parted(model: nn.Module) -> Parted:
    """Embeddings and the last linear layer."""
    linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    tables = [name for name, m in model.named_modules() if isinstance(m, nn.Embedding)]
    return Parted(tuple(f"{name}.weight" for name in (*tables, *linears[-1:])))


def peer(name: str, label: str, *, lead: int = 0, further: Mapping[str, Any] | None = None) -> Entrant:
    """The optimizer of the study that goes by ``name``, with our learning rate, damping and interval."""
    entry = OPTIMIZERS[name]
    start = entry.space.setting("", (0, 0))
    settings = {**start, **{key: value for key, value in SAME.items() if key in start}, **(further or {})}

    def make(model: WithLoss, workload: Workload, batch: Batch, backend: str) -> Contender:
        # a maker may take its settings apart
        return Looped(entry.make(model, parted(model), dict(settings), backend), name != "muon", lead)

    return Entrant(label, "peers", make, partial(_missing, entry.needs))


def _missing(needs: tuple[str, ...], workload: Workload) -> str | None:
    return None if all(map(importlib.util.find_spec, needs)) else "not installed"


class Curvlinops:
    """The factors of K-FAC and nothing else, anew in every step: it is no optimizer."""

    second_order, lead = False, 0

    def __init__(self, model: WithLoss) -> None:
        self._model = model
        covered = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        self._weights = [module.weight for module in covered]

    def step(self, x: Tensor, y: Tensor, mark: Mark) -> None:
        from curvlinops import KFACLinearOperator

        KFACLinearOperator(
            self._model.net, nn.CrossEntropyLoss(), self._weights, [(x, y)],
            fisher_type="empirical", check_deterministic=False,
        ).compute_kronecker_factors()  # fmt: skip
        mark()


class Asdl:
    """ASDL's K-FAC in front of SGD with momentum; ``settings`` are further ones of its configuration.

    Its hooks are there in curvature steps only, which are eager; in other steps the model is compiled. One
    call does forward, backward and preconditioning, so a step has one mark.
    """

    second_order, lead = True, 0

    def __init__(self, model: WithLoss, terms: int, backend: str, settings: Mapping[str, Any]) -> None:
        from asdl import FISHER_EMP, KfacGradientMaker, PreconditioningConfig
        from asdl.precondition import natural_gradient

        if not torch.cuda.is_available():  # its marks for a profiler of GPUs are errors in torch without CUDA
            natural_gradient.nvtx = SimpleNamespace(range=nullcontext)
        config = PreconditioningConfig(
            preconditioner_upd_interval=FREQUENCY,
            data_size=terms,
            damping=DAMPING,
            ignore_modules=[nn.Embedding],  # it has no inverses of theirs
            **settings,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one for every module that it does not cover
            self._maker = KfacGradientMaker(model.net, config, fisher_type=FISHER_EMP)
        self._loss, self._eager = model.loss, model.net
        self._compiled = torch.compile(model.net, backend=backend)
        self._sgd = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, fused=True)

    def step(self, x: Tensor, y: Tensor, mark: Mark) -> None:
        run = self._eager if self._maker.do_update_curvature() else self._compiled
        outputs = self._maker.setup_model_call(run, x)
        self._maker.setup_loss_call(self._loss, outputs, y)
        self._maker.forward_and_backward()
        self._sgd.step()
        self._sgd.zero_grad()
        mark()


def asdl(label: str, **settings: Any) -> Entrant:
    """ASDL's K-FAC with our learning rate, damping and interval."""

    def make(model: WithLoss, workload: Workload, batch: Batch, backend: str) -> Contender:
        return Asdl(model, workload.terms, backend, settings)

    return Entrant(label, "peers", make, partial(_missing, ("asdl",)))


FACTORS_ALONE = "curvlinops, factors alone"

PEERS = (
    peer("muon", "Muon (torch.optim) + AdamW"),
    peer("soap", "SOAP"),
    # its steps count from 1
    peer("shampoo", "Distributed Shampoo", lead=1),
    peer("kfac", "kfac-pytorch"),
    peer("kfac", "kfac-pytorch, factors every step", further={"factor_update_steps": 1}),
    asdl("ASDL, K-FAC"),
    # an average of factors: without one, it inverts whenever it measures
    asdl("ASDL, K-FAC, factors every step", curvature_upd_interval=1, ema_decay=0.1),
    Entrant(
        FACTORS_ALONE,
        "peers",
        lambda model, workload, batch, backend: Curvlinops(model),
        partial(_missing, ("curvlinops",)),
    ),
)
