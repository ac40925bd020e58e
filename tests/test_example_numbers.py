"""Examples that write their own loops end where plain eager loops over the same batches end.

The programs run as they stand, for eleven steps, of which the first and the last have factors. The plain
loops are eager, and share no code with the product: :mod:`eager_steps` with the factors of :mod:`hooks`. For
the differential equation, whose derivatives hooks cannot see, the chain rule is written out here. All is in
float64: in float32, orthogonal steps are rounded to bfloat16. Errors are relative to how far a parameter has
come.
"""

import copy
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping
from math import pi
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import thor_fx
from eager_steps import Slow, slowly
from oracle import Pair
from thor_fx.presets import RECOMMENDED
from training import Parameters, snapshot

EXAMPLES = Path(__file__).parents[1] / "examples"
STEPS = 11
RTOL = 1e-10


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.set_default_dtype(torch.float64)
        yield
    torch.set_default_dtype(before)


Run = Callable[[str, str], dict[str, Any]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs an example with these arguments, and returns its names."""

    def ran(name: str, arguments: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [name, "aot_eager", *arguments.split()])
        return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name=name)

    return ran


def assert_same_end(found: Mapping[str, Tensor], expected: Parameters, start: Parameters) -> None:
    assert found.keys() == expected.keys() == start.keys()
    errors = {n: float((found[n] - p).norm() / (p - start[n]).norm()) for n, p in expected.items()}
    assert max(errors.values()) < RTOL, errors


def test_a_residual_net(run: Run, monkeypatch: pytest.MonkeyPatch):
    """Of BatchNorm, the running statistics too."""
    compile_, begun = thor_fx.compile, []

    def recorded(model: nn.Module, **how: Any) -> nn.Module:
        begun.append((copy.deepcopy(model), torch.get_rng_state()))
        return compile_(model, **how)

    monkeypatch.setattr(thor_fx, "compile", recorded)
    example = run("conv_digits", "--epochs 1")
    ((plain, random_state),) = begun
    start = snapshot(dict(plain.named_parameters()))
    torch.set_rng_state(random_state)
    x, y = example["x"], example["y"]
    data = [(x[batch], y[batch]) for batch in torch.randperm(1500).split(128)[:-1]]
    assert len(data) == STEPS
    expected = slowly(plain, data, lr=0.02, **RECOMMENDED)[-1]
    assert_same_end(snapshot(dict(example["model"].named_parameters())), expected, start)
    for name, statistic in plain.named_buffers():
        torch.testing.assert_close(example["model"].get_buffer(name), statistic, rtol=RTOL, atol=0)


def test_a_small_gpt(run: Run):
    example = run("char_gpt", f"--steps {STEPS}")
    torch.manual_seed(0)
    plain = example["GPT"](len(example["letters"]))
    start = snapshot(dict(plain.named_parameters()))
    _, *data = (example["batch_of"](example["train"]) for _ in range(1 + STEPS))  # init takes the first
    expected = slowly(plain, data, lr=0.01, **RECOMMENDED)[-1]
    assert_same_end(example["params"], expected, start)


# --- a differential equation -------------------------------------------------------------------------------


class Taylor:
    """A net of ``Linear`` and ``Tanh``, and its second derivatives by the chain rule, written out.

    Attributes:
        uses: by weight, what it was multiplied with, and the product.
    """

    def __init__(self, net: nn.Sequential) -> None:
        self.net = net
        self.uses: dict[str, list[tuple[Tensor, Tensor]]] = {f"{i}.weight": [] for i in range(0, len(net), 2)}

    def times_weight(self, i: int, a: Tensor) -> Tensor:
        s = a @ self.net[i].weight.T
        self.uses[f"{i}.weight"].append((a.detach(), s))
        return s

    def value(self, x: Tensor) -> Tensor:
        for i, module in enumerate(self.net):
            x = self.times_weight(i, x) + module.bias if isinstance(module, nn.Linear) else x.tanh()
        return x

    def second_derivative(self, x: Tensor, direction: Tensor) -> Tensor:
        """Two equal first derivatives go along: in ``jvp`` of ``jvp`` each is a use of the weights."""
        one = other = direction.expand_as(x)
        both: Tensor | None = None
        for i, module in enumerate(self.net):
            if isinstance(module, nn.Linear):
                x = self.times_weight(i, x) + module.bias
                one, other = self.times_weight(i, one), self.times_weight(i, other)
                both = None if both is None else self.times_weight(i, both)
            else:
                x = x.tanh()
                slope = 1 - x.square()
                bend = -2 * x * slope * one * other
                one, other, both = slope * one, slope * other, bend if both is None else bend + slope * both
        return both

    def pairs(self, residuals: Tensor) -> dict[str, Pair]:
        """Gauss-Newton factors of half the sum of squares, with the rows of all uses."""
        return {name: self._pair(uses, residuals) for name, uses in self.uses.items()}

    def _pair(self, uses: list[tuple[Tensor, Tensor]], residuals: Tensor) -> Pair:
        inputs, products = zip(*uses, strict=True)
        cotangents = torch.autograd.grad(residuals.sum(), products, retain_graph=True, allow_unused=True)
        known = [(a, g) for a, g in zip(inputs, cotangents, strict=True) if g is not None]
        a, g = (torch.cat(rows) for rows in zip(*known, strict=True))
        return Pair(a.T @ a / len(a), g.T @ g, len(a))


# torch makes its rules of forward mode by torch.jit.script, which it calls deprecated
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_a_differential_equation(run: Run):
    """Biases belong to values and not to derivatives, and stay on their own."""
    example = run("poisson", f"--steps {STEPS}")
    net, inside, edge = (example[name] for name in ("net", "inside", "edge"))
    source = 2 * pi**2 * (pi * inside).sin().prod(1, keepdim=True)
    slow = Slow(net, **{**RECOMMENDED, "bias": "raw"})
    for step in range(STEPS):
        taylor = Taylor(net)
        equation = source + sum(taylor.second_derivative(inside, direction) for direction in torch.eye(2))
        boundary = taylor.value(edge)
        loss = equation.square().mean() + 10 * boundary.square().mean()
        gradients = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
        scaled = equation * (2 / len(inside)) ** 0.5, boundary * (20 / len(edge)) ** 0.5
        slow.o["lr"] = 0.06 * (1 - step / STEPS)
        named = dict(zip(slow.params, gradients, strict=True))
        slow.add(slow.change(named, taylor.pairs(torch.cat(scaled)), terms=len(inside)))
    assert_same_end(example["params"], slow.params, example["start"])
