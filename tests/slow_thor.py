"""THOR in eager mode with its whole state in plain dicts: :class:`thor_fx.Thor` agrees with it at any time.

Whatever a user may do between two steps is a method here, and what it does to the state is written out. The
factors come from hooks (:mod:`hooks`), one dense inverse at a time.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hooks import Seen, factors_by_hooks, uses_by_hooks
from oracle import Pair, damped

Setting = dict[str, float]
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm2d)


class SlowThor:
    """The optimizer of a model whose weights are used by modules that hooks know.

    Attributes:
        settings: ``lr``, ``damping`` and ``momentum`` by name of parameter; what has none is not trained.
        inverses: by layer, those of ``A`` and ``G``; of a convolution with groups, one pair for each.
        moving: the heavy ball, by parameter.
        uses: what hooks have seen since the last step, by layer; collected in passes that are ``wanted``.
        known: the layers that any pass with factors has seen: without inverses, they stand still.
        overdue: a factor step had no factors.
    """

    def __init__(self, model: nn.Module, frequency: int, **setting: float) -> None:
        self.model, self.frequency = model, frequency
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        self.settings: dict[str, Setting] = {name: dict(setting) for name in trained}
        self.norms = {
            f"{name}.{part}"
            for name, module in model.named_modules()
            if isinstance(module, NORMS)
            for part, _ in module.named_parameters(recurse=False)
        }
        self.weights = [
            f"{name}.weight"
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | nn.Embedding | nn.Conv1d | nn.Conv2d)
        ]
        self.steps = self.skipped = 0
        self.inverses: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self.kinds: dict[str, list[str]] = {}
        self.moving: dict[str, Tensor] = {}
        self.terms = 1.0
        self.known: set[str] = set()
        self.seen: set[str] = set()
        self.wanted, self.overdue = True, False
        self.uses: dict[str, list[Seen]] = {}
        self.collected = 0.0

    def backward(self, loss: Callable[[], Tensor], n: float) -> None:
        """One backward pass of a loss of ``n`` terms, in the mode that the model is in."""
        found = uses_by_hooks(self.model, loss)
        if self.wanted and self.model.training:
            self._compile(found)
            self.collected += n
            for name, uses in found.items():
                self.uses.setdefault(name, []).extend(uses)

    def _compile(self, weights: Iterable[str]) -> None:
        trained = {name for name, p in self.model.named_parameters() if p.requires_grad}
        self.known |= trained.intersection(weights)
        self.seen |= trained

    def forget(self) -> None:
        """Factors that no step has used go with the gradients."""
        self.uses, self.collected = {}, 0.0

    def step(self) -> None:
        """Update in place, or leave everything as it is where something is not finite."""
        gradients = {
            n: p.grad for n, p in self.model.named_parameters() if n in self.settings and p.grad is not None
        }
        if not gradients:
            return
        pairs = {n: factors_by_hooks(u, self.collected) for n, u in self.uses.items() if n in self.settings}
        kinds = {name: [seen.kind for seen in self.uses[name]] for name in pairs}
        standing = {name for name in self.known & gradients.keys() if name not in self.inverses}
        due = self.overdue or self.steps % self.frequency == 0
        self.overdue = due and not pairs
        if not due:
            pairs = {name: pair for name, pair in pairs.items() if name in standing}
        before = self.inverses, self.terms, self.moving
        self.inverses = {**self.inverses, **{n: self._inverted(n, pair) for n, pair in pairs.items()}}
        self.kinds |= kinds
        self.terms = self.collected if pairs else self.terms
        self.moving = self.moving | {n: self._moved(n, g) for n, g in gradients.items()}
        counted = all(bool(self.moving[name].isfinite().all()) for name in gradients)
        if counted:
            self._apply(gradients.keys())
        else:
            self.inverses, self.terms, self.moving = before
            self.skipped += 1
        unknown = (gradients.keys() - self.seen) | (self.known & gradients.keys() - self.inverses.keys())
        self.steps += counted  # one that is skipped is taken again
        self.wanted = self.overdue or bool(unknown) or self.steps % self.frequency == 0
        self.forget()

    @torch.no_grad()
    def _apply(self, names: Any) -> None:
        for name, p in self.model.named_parameters():
            if name in names:
                p.sub_(self.settings[name]["lr"] * self.moving[name])

    def _inverted(self, name: str, pair: Pair) -> list[tuple[Tensor, Tensor]]:
        lam = self.settings[name]["damping"]
        grouped = pair.G.dim() == 3
        sides = zip(pair.A, pair.G, strict=True) if grouped else [(pair.A, pair.G)]
        return [tuple(torch.linalg.inv(damped(_dense(side), lam)) for side in both) for both in sides]

    def _moved(self, name: str, gradient: Tensor) -> Tensor:
        update = gradient.clone()  # later passes add to the gradient in place
        if name in self.inverses:
            update = self._preconditioned(name, gradient)
        elif name in self.known:
            update = torch.zeros_like(gradient)  # a layer without factors stands still
        elif name in self.norms and name in self.seen:
            update = gradient / (gradient**2 / self.terms + self.settings[name]["damping"])
        old = self.moving.get(name)
        return update if old is None else self.settings[name]["momentum"] * old + update

    def _preconditioned(self, name: str, gradient: Tensor) -> Tensor:
        inverses, kinds = self.inverses[name], set(self.kinds[name])
        if not kinds & {"linear", "convolution"}:  # stored as (in, out)
            ((A, G),) = inverses
            return A @ gradient @ G
        parts = gradient.flatten(1).chunk(len(inverses))
        return torch.cat([G @ part @ A for part, (A, G) in zip(parts, inverses, strict=True)]).view_as(
            gradient
        )

    def looked(self) -> None:
        """A forward pass alone: what it uses has a place from now on."""
        if self.wanted and self.model.training:
            self._compile(self.weights)

    def zero_grad(self, to_none: bool) -> None:
        """Of all that is trained; factors go with the gradients."""
        for name, p in self.model.named_parameters():
            if name in self.settings and p.grad is not None:
                p.grad = None if to_none else torch.zeros_like(p)
        self.forget()

    def resume(self) -> None:
        """Go on from a saved state: what a graph has used has to be found again."""
        self.wanted = True
        self.known, self.seen = set(), set()
        self.forget()


def _dense(side: Tensor) -> Tensor:
    return side.diag() if side.dim() == 1 else side
