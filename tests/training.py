"""Small modules, their batches, and how either door trains them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import thor_fx
from thor_fx.distributed.wrappers import unwrapped

Batch = tuple[Tensor, Tensor]
Parameters = dict[str, Tensor]

IN, HIDDEN, CLASSES, ROWS = 5, 6, 3, 7

# plain torch.compile does the same: a new requires_grad of a parameter is not noticed
unfreezes = pytest.mark.skipif(
    torch.__version__.startswith("2.11"), reason="torch 2.11 runs the old graph for an unfrozen parameter"
)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(IN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES))


def normalised() -> nn.Module:
    return nn.Sequential(
        nn.Linear(IN, HIDDEN), nn.LayerNorm(HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES, bias=False)
    )


class Tied(nn.Module):
    """One weight in two modules, used by three calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.head = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, CLASSES)
        self.left, self.right = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.right.weight = self.left.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x).tanh()
        return self.head(self.right(self.left(self.left(h).tanh()).tanh()).tanh())


class Attention(nn.Module):
    """A sequence of three positions; queries from the last of them, so the packed weight has two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.head = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, CLASSES)
        self.mixer = nn.MultiheadAttention(HIDDEN, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(torch.stack([x, x.roll(1, -1), x.flip(-1)], dim=1)).tanh()  # (batch, 3, hidden)
        mixed, _ = self.mixer(h[:, 2:], h, h, need_weights=False)
        return self.head(mixed[:, 0])


class Checkpointed(nn.Module):
    """A block whose activations are computed again in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, IN), nn.Linear(IN, CLASSES)

    def block(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.block, x, use_reentrant=False))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "normalised": normalised,
    "tied": Tied,
    "attention": Attention,
    "checkpointed": Checkpointed,
}


def build(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model that is the same in every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return make().to(dtype)


def batches(count: int, rows: int = ROWS, dtype: torch.dtype = torch.float64) -> list[Batch]:
    generator = torch.Generator().manual_seed(5)
    return [
        (
            torch.randn(rows, IN, generator=generator, dtype=torch.float64).to(dtype),
            torch.randint(CLASSES, (rows,), generator=generator),
        )
        for _ in range(count)
    ]


def snapshot(params: Mapping[str, Tensor]) -> Parameters:
    return {name: p.detach().clone() for name, p in params.items()}


def classifier_loss(model: nn.Module, scale: float = 1.0) -> Callable[..., Tensor]:
    """``loss_fn(params, x, y)`` for the functional door."""

    def loss_fn(params: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, dict(params), (x,)), y)

    def scaled(params: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return scale * loss_fn(params, x, y)

    return loss_fn if scale == 1.0 else scaled


def compiled(make: Callable[[], nn.Module] = mlp, **kwargs: Any) -> nn.Module:
    """A model behind the drop-in door."""
    return thor_fx.compile(build(make), backend="aot_eager", **kwargs)


def by_functional_door(
    model: nn.Module,
    data: Sequence[Batch],
    backend: str = "eager",
    dynamic: bool | None = None,
    factor_backend: str | None = None,
    disable_passes: Sequence[str] = (),
    **settings: Any,
) -> list[Parameters]:
    """The parameters after every step."""
    loss_fn = classifier_loss(model, settings.get("loss_scale", 1.0))
    how: dict[str, Any] = {"backend": backend, "factor_backend": factor_backend, "dynamic": dynamic}
    how["disable_passes"] = disable_passes
    step = thor_fx.compile_step(loss_fn, thor_fx.thor(**settings), **how)
    params: Mapping[str, Tensor] = snapshot(dict(model.named_parameters()))
    state = step.init(params, *data[0])
    trajectory = []
    for batch in data:
        params, state, _ = step(params, state, *batch)
        trajectory.append(snapshot(params))
    return trajectory


def by_drop_in_door(
    model: nn.Module, data: Sequence[Batch], backend: str = "aot_eager", **settings: Any
) -> list[Parameters]:
    """The parameters after every step."""
    model = thor_fx.compile(model, backend=backend)
    optimizer = thor_fx.Thor(model, **settings)
    return train(model, optimizer, data, settings.get("loss_scale", 1.0))


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Sequence[Batch], scale: float = 1.0
) -> list[Parameters]:
    """The loop that everybody writes; the parameters after every step."""
    trajectory = []
    for x, y in data:
        (scale * F.cross_entropy(model(x), y)).backward()
        optimizer.step()
        optimizer.zero_grad()
        trajectory.append(snapshot(dict(model.named_parameters())))
    return trajectory


def train_by_closures(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Sequence[Batch]
) -> list[Parameters]:
    """The same with ``step(closure)``; in a wrapper, the parameters of the model inside."""
    trajectory = []
    for x, y in data:

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        trajectory.append(snapshot(dict(unwrapped(model).named_parameters())))
    return trajectory


def by_both_doors(
    make: Callable[[], nn.Module], data: Sequence[Batch], rtol: float = 1e-12, **settings: Any
) -> list[Parameters]:
    """The parameters after every step, which are the same through either door.

    ``make`` returns a new model, the same one in every call.
    """
    functional = by_functional_door(make(), data, **settings)
    assert_same(by_drop_in_door(make(), data, **settings), functional, rtol)
    return functional


def assert_same(first: Sequence[Parameters], second: Sequence[Parameters], rtol: float = 1e-12) -> None:
    """Two float64 trajectories agree step by step, relative to the size of each parameter."""
    assert len(first) == len(second) > 0
    for step, (one, other) in enumerate(zip(first, second, strict=True)):
        assert one.keys() == other.keys()
        for name in one:
            error = float((one[name] - other[name]).norm() / other[name].norm())
            assert error <= rtol, f"{name} after step {step}: {error}"


def assert_moved(trajectory: Sequence[Parameters], start: Parameters) -> None:
    """Every parameter has changed in every step, and stayed finite: agreement means something."""
    for before, after in zip([start, *trajectory], trajectory, strict=False):
        for name, value in after.items():
            assert value.isfinite().all(), name
            assert not torch.equal(value, before[name]), name


def identical(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Whether two sets of tensors are equal bit by bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
