"""THOR by hooks on an eager model: one dense inverse at a time, and no graph anywhere."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import thor_fx
from oracle import Pair, Use, damped, pair
from training import build, snapshot

SETTINGS: dict[str, Any] = {"lr": 0.05, "damping": 0.1, "momentum": 0.9, "frequency": 2}


class EagerThor:
    """Kronecker factors for the weights of ``nn.Linear``, the gradient for everything else."""

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        damping: float,
        momentum: float,
        frequency: int = 1,
    ) -> None:
        self.model, self.lr, self.damping, self.momentum = model, lr, damping, momentum
        self.frequency, self.steps = frequency, 0
        self.uses: dict[int, list[Use]] = {}
        self.inverses: dict[str, tuple[Tensor, Tensor]] = {}
        self.moving: dict[str, Tensor] = {}
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(self._forward)

    def _forward(self, module: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> None:
        if not output.requires_grad:
            return
        a = inputs[0].detach().to(output.dtype)

        def backward(g: Tensor) -> None:
            wide = torch.float64 if g.dtype == torch.float64 else torch.float32
            use = Use(a.flatten(0, -2).to(wide), g.flatten(0, -2).to(wide))
            self.uses.setdefault(id(module.weight), []).append(use)

        output.register_hook(backward)

    def factors(self, n: float) -> dict[str, Pair]:
        """Of all backward passes since the last step."""
        names = {id(p): name for name, p in self.model.named_parameters() if p.grad is not None}
        return {names[key]: pair(found, n) for key, found in self.uses.items() if key in names}

    def step(self, n: float) -> None:
        """Update in place; ``n`` terms were in the loss."""
        if self.steps % self.frequency == 0:
            for name, (A, G, _) in self.factors(n).items():
                self.inverses[name] = tuple(torch.linalg.inv(damped(m, self.damping)) for m in (A, G))
        for name, p in self.model.named_parameters():
            if p.grad is not None:
                self._move(name, p)
        self.steps += 1

    @torch.no_grad()
    def _move(self, name: str, p: Tensor) -> None:
        update = p.grad
        if name in self.inverses:
            A, G = self.inverses[name]
            update = G @ update @ A
        elif p.dim() == 2:
            update = torch.zeros_like(p)  # a layer without factors stands still
        self.moving[name] = self.momentum * self.moving.get(name, torch.zeros_like(p)) + update
        p -= self.lr * self.moving[name]

    def zero_grad(self) -> None:
        self.model.zero_grad()
        self.uses.clear()


@torch.no_grad()
def errors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative, by name."""
    return {
        name: float((found[name] - p).norm() / p.norm().clamp_min(1e-300)) for name, p in expected.items()
    }


Optimizer = thor_fx.Thor | EagerThor


def both(
    make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64, **settings: Any
) -> Iterator[tuple[nn.Module, Optimizer]]:
    """A model compiled by us with its optimizer, and an eager one with the slow optimizer."""
    settings = {**SETTINGS, **settings}
    model = thor_fx.compile(build(make, dtype), backend="aot_eager")
    yield model, thor_fx.Thor(model, **settings)
    eager = build(make, dtype)
    yield eager, EagerThor(eager, **settings)


def take_step(optimizer: Optimizer, n: float) -> None:
    """Only the slow optimizer has to be told ``n``."""
    optimizer.step() if isinstance(optimizer, thor_fx.Thor) else optimizer.step(n)
    optimizer.zero_grad()


Program = Callable[[nn.Module, Optimizer], None]


def assert_equal_to_hooks(
    make: Callable[[], nn.Module],
    program: Program,
    rtol: float = 1e-10,
    dtype: torch.dtype = torch.float64,
    **settings: Any,
) -> tuple[nn.Module, thor_fx.Thor]:
    """Run a training program with either optimizer; every parameter ends at the same place."""
    start = snapshot(dict(build(make, dtype).named_parameters()))
    (model, optimizer), (eager, slow) = both(make, dtype, **settings)
    for each in ((model, optimizer), (eager, slow)):
        program(*each)
    found, expected = (snapshot(dict(m.named_parameters())) for m in (model, eager))
    assert max(errors(found, expected).values()) <= rtol, errors(found, expected)
    moved = errors(found, start)
    assert min(moved.values()) > 1e3 * rtol, moved
    return model, optimizer
