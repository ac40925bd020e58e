"""``strict=True``: a weight without a Kronecker pair is an error, in both doors."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import thor_fx

SETTINGS: dict[str, Any] = {"lr": 0.05, "damping": 0.1, "momentum": 0.9}


class Positions(nn.Module):
    """A table that is added: a weight of two axes that no product of matrices uses."""

    def __init__(self, *size: int) -> None:
        super().__init__()
        self.fc, self.table = nn.Linear(3, 2), nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x + self.table)


def step_by(door: str, model: nn.Module, x: Tensor, **kwargs: Any) -> Any:
    """The coverage after the first step."""
    if door == "drop-in":
        model = thor_fx.compile(model, backend="aot_eager", **kwargs)
        optimizer = thor_fx.Thor(model, **SETTINGS)
        model(x).square().mean().backward()
        optimizer.step()
        return optimizer.coverage

    def loss_fn(params, x):
        return functional_call(model, dict(params), (x,)).square().mean()

    step = thor_fx.compile_step(loss_fn, thor_fx.thor(**SETTINGS), backend="eager", **kwargs)
    step.init(dict(model.named_parameters()), x)
    return step.coverage


both_doors = pytest.mark.parametrize("door", ["drop-in", "functional"])


@both_doors
def test_a_weight_without_factors_is_named_with_the_reason(door):
    with pytest.raises(thor_fx.CoverageError) as caught:
        step_by(door, Positions(4, 3), torch.randn(5, 4, 3), strict=True)
    first, *reasons = str(caught.value).split("\n")
    assert first.startswith("strict=True, but 1 weights have no Kronecker pair")
    (reason,) = reasons
    assert reason.startswith("  table: its gradient is sum <- ")
    assert reason.endswith("no product of matrices")
    assert isinstance(caught.value, ValueError)


@both_doors
def test_without_strict_it_falls_back(door):
    found = step_by(door, Positions(4, 3), torch.randn(5, 4, 3))
    assert set(found.fallback) == {"table", "fc.bias"}
    assert set(found.layers) == {"fc.weight"}


@both_doors
def test_vectors_alone_are_no_error(door):
    found = step_by(door, Positions(3), torch.randn(5, 4, 3), strict=True)
    assert set(found.fallback) == {"table", "fc.bias"}


@both_doors
def test_frozen_weights_are_no_error(door):
    model = Positions(4, 3)
    model.table.requires_grad_(False)
    assert step_by(door, model, torch.randn(5, 4, 3), strict=True).fallback.keys() == {"fc.bias"}


@pytest.mark.parametrize("strict", [1, None, "yes"])
def test_strict_is_a_bool(strict):
    with pytest.raises(TypeError, match="strict"):
        thor_fx.compile(nn.Linear(2, 2), backend="eager", strict=strict)
    with pytest.raises(TypeError, match="strict"):
        thor_fx.compile_step(lambda params: 0, thor_fx.thor(**SETTINGS), backend="eager", strict=strict)


BREAKS = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


class Aside(nn.Module):
    """A layer that Dynamo is told to leave alone, between two that it compiles."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.aside, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.beside(self.fc(x)).tanh())

    @torch.compiler.disable
    def beside(self, x: Tensor) -> Tensor:
        return self.aside(x)


@BREAKS
def test_a_weight_that_no_graph_uses_is_named_once():
    model = thor_fx.compile(Aside(), backend="aot_eager")
    optimizer = thor_fx.Thor(model, **SETTINGS, frequency=1)
    model(torch.randn(5, 3)).square().mean().backward()
    with pytest.warns(UserWarning, match=r"no compiled graph uses the weights 'aside\.weight': "):
        optimizer.step()
    model(torch.randn(5, 3)).square().mean().backward()
    optimizer.step()  # warnings are errors here
    assert sorted(optimizer.coverage.layers) == ["fc.weight", "head.weight"]


@BREAKS
def test_strict_refuses_a_weight_that_no_graph_uses_before_anything_changes():
    model = Aside()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(thor_fx.CoverageError, match=r"strict=True, .* weights 'aside\.weight'"):
        step_by("drop-in", model, torch.randn(5, 3), strict=True)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


@BREAKS
def test_a_weight_that_was_left_out_is_not_missed():
    model = thor_fx.compile(Aside(), backend="aot_eager", strict=True)
    optimizer = thor_fx.Thor(model, **SETTINGS, layer_filter=lambda name: not name.startswith("aside"))
    model(torch.randn(5, 3)).square().mean().backward()
    optimizer.step()
