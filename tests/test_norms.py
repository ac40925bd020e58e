"""Scales and shifts of normalisation layers are found however spelt; their likes are not taken for them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import thor_fx
from thor_fx.passes import canonicalize, find_sites, run

C, N = 6, 7


class ByHand(nn.Module):
    """``x / sqrt(var)`` with a scale and a shift, in one of four spellings."""

    def __init__(self, spelling: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(C)), nn.Parameter(torch.zeros(C))
        self.spelling = spelling

    def forward(self, x: Tensor) -> Tensor:
        return self.spelling(x - x.mean(-1, keepdim=True)) * self.weight + self.bias


def by_sqrt(x: Tensor) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5)


def by_rsqrt(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool]] = {
    "LayerNorm": (lambda: nn.LayerNorm(C), (C,), True),
    "LayerNorm of two axes": (lambda: nn.LayerNorm((3, C)), (3, C), True),
    "RMSNorm": (lambda: nn.RMSNorm(C), (C,), True),
    "GroupNorm": (lambda: nn.GroupNorm(2, C), (C, 4), True),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(C), (C,), True),
    "BatchNorm1d of sequences": (lambda: nn.BatchNorm1d(C), (C, 5), True),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(C), (C, 3, 4), True),
    "BatchNorm1d, eval": (lambda: nn.BatchNorm1d(C), (C,), False),
    "BatchNorm2d, eval": (lambda: nn.BatchNorm2d(C), (C, 3, 4), False),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(C, affine=True), (C, 5), True),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(C, affine=True), (C, 3, 4), True),
    "by hand, sqrt": (lambda: ByHand(by_sqrt), (C,), True),
    "by hand, rsqrt": (lambda: ByHand(by_rsqrt), (C,), True),
}
HAND = "by hand"


class Normalised(nn.Module):
    """A layer in front of the norm, so that its input is no constant; the norm has a mode of its own."""

    def __init__(self, norm: nn.Module, size: tuple[int, ...]) -> None:
        super().__init__()
        self.inp, self.norm = nn.Linear(size[-1], size[-1], bias=False), norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.inp(x)).tanh()


def build(name: str) -> tuple[nn.Module, Tensor]:
    make, size, training = NORMS[name]
    model = Normalised(make(), size)
    model.norm.train(training)
    return model, torch.randn(N, *size)


def expected(name: str) -> tuple[str, ...]:
    """A shift by hand is a bias like any other: only its scale tells what it belongs to."""
    return ("norm.weight",) if name == "RMSNorm" or name.startswith(HAND) else ("norm.weight", "norm.bias")


@pytest.mark.parametrize("name", NORMS)
def test_undecomposed(name):
    model, x = build(name)

    def loss_fn(params, x):
        return functional_call(model, dict(params), (x,)).square().mean()

    report = find_sites(run(thor_fx.trace_step(loss_fn, dict(model.named_parameters()), x), [canonicalize]))
    assert report.norms == expected(name)
    assert set(report.layers) == {"inp.weight"}
    assert set(report.reasons) == {n for n, _ in model.named_parameters()} - {"inp.weight", *report.norms}


def check_compiled(name: str, backend: str) -> None:
    model, x = build(name)
    compiled = thor_fx.compile(model, backend=backend)
    optimizer = thor_fx.Thor(compiled, lr=0.01, damping=0.1, momentum=0.9)
    compiled(x).square().mean().backward()
    optimizer.step()
    assert set(optimizer.coverage.norms) == set(expected(name))
    assert set(optimizer.coverage.layers) == {"inp.weight"}


@pytest.mark.inductor
@pytest.mark.parametrize("name", NORMS)
def test_decomposed_by_inductor(name):
    check_compiled(name, "inductor")


# --- likes -------------------------------------------------------------------------------------------


class Likes(nn.Module):
    """Parameters that multiply or shift what is no normalised value."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(C, C, bias=False)
        self.prelu = nn.PReLU(C)
        self.layer_scale = nn.Parameter(torch.full((C,), 0.1))
        self.position = nn.Parameter(torch.zeros(4, C))
        self.logit_scale = nn.Parameter(torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x + self.position)
        h = self.prelu(h.flatten(0, 1)).view_as(h)
        return (x + self.layer_scale * h) * self.logit_scale.exp()


REASONS = {
    "prelu.weight": "a vector: its gradient is sum <- ",
    "layer_scale": "a vector: its gradient is sum <- mul <- ",
    "logit_scale": "a vector: its gradient is ",
    "position": "its gradient is sum <- ",
}


def test_what_resembles_a_norm_falls_back_with_a_reason():
    model, x = Likes(), torch.randn(N, 4, C)
    coverage = thor_fx.explain(model, x).coverage
    assert coverage.norms == ()
    assert coverage.fallback.keys() == REASONS.keys()
    for name, start in REASONS.items():
        assert coverage.fallback[name].startswith(start)
        assert coverage.fallback[name].endswith("no product of matrices")


@pytest.mark.inductor
def test_what_resembles_a_norm_falls_back_when_compiled():
    model = thor_fx.compile(Likes())
    optimizer = thor_fx.Thor(model, lr=0.01, damping=0.1, momentum=0.9)
    model(torch.randn(N, 4, C)).square().mean().backward()
    optimizer.step()
    assert optimizer.coverage.norms == ()
    assert optimizer.coverage.fallback.keys() == REASONS.keys()
    assert set(optimizer.coverage.layers) == {"inp.weight"}
