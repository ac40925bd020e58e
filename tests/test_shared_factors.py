"""Layers that read the same rows have one product between them."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import thor_fx
from models import random
from thor_fx.passes import Factor, Rows, canonicalize, emit_factors, outputs, run
from thor_fx.passes.splice import trace
from training import CLASSES, HIDDEN, IN, assert_same, batches, build, by_both_doors, train

SETTINGS = {"lr": 0.05, "damping": 0.1, "momentum": 0.9, "frequency": 2}
EXACT = {"fisher": "exact", "likelihood": "categorical"}


class Gated(nn.Module):
    """Gate and rise share their input; the two that are added up share their cotangent."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.rise = nn.Linear(IN, HIDDEN), nn.Linear(IN, HIDDEN)
        self.left, self.right = nn.Linear(HIDDEN, CLASSES), nn.Linear(IN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(self.gate(x).sigmoid() * self.rise(x)) + self.right(x)


def emitted() -> torch.fx.GraphModule:
    model = build(Gated)
    ((x, y),) = batches(1)

    def loss_fn(params, x, y):
        return F.cross_entropy(torch.func.functional_call(model, dict(params), (x,)), y)

    gm = thor_fx.trace_step(loss_fn, dict(model.named_parameters()), x, y)
    return run(gm, [canonicalize, emit_factors])


def test_one_product_for_one_set_of_rows():
    nodes = outputs.output_nodes(emitted())
    a = {name: nodes[Factor(f"{name}.weight", "A")] for name in ("gate", "rise", "left", "right")}
    g = {name: nodes[Factor(f"{name}.weight", "G")] for name in a}
    assert a["gate"] is a["rise"] is a["right"]
    assert a["left"] is not a["gate"]
    assert g["left"] is g["right"]
    assert len({*g.values()}) == 3
    assert nodes[Rows("gate.weight")] is nodes[Rows("rise.weight")]


def test_what_differs_in_what_is_kept_is_not_shared():
    """A bias in one of two layers: the rows of the other have no 1 behind them."""
    params = {"w": random(1, torch.float64, 4, 3), "v": random(2, torch.float64, 4, 3)}
    params["b"] = random(3, torch.float64, 4)

    def loss_fn(p, x):
        return ((x @ p["w"].T + p["b"]).sin() * (x @ p["v"].T).cos()).sum(-1).mean()

    found = thor_fx.factors(loss_fn, params, random(4, torch.float64, 6, 3), bias="joint")
    assert found["w"].A.shape == (4, 4)
    assert found["v"].A.shape == (3, 3)
    assert torch.equal(found["w"].A[:3, :3], found["v"].A)


@pytest.mark.parametrize("settings", [{}, {"bias": "joint"}, {"factor_decay": 0.9}, EXACT])
def test_both_doors_agree_where_factors_are_shared(settings):
    by_both_doors(lambda: build(Gated), batches(5), **SETTINGS, **settings)


def test_sums_over_micro_batches_are_not_added_twice():
    """Three leaves receive one tensor: each has to add up by itself."""

    def trained(parts: int):
        model = thor_fx.compile(build(Gated), backend="aot_eager")
        optimizer = thor_fx.Thor(model, **SETTINGS)
        trajectory = []
        for x, y in batches(3, rows=8):
            for one, target in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (F.cross_entropy(model(one), target) / parts).backward()
            optimizer.step()
            optimizer.zero_grad()
            trajectory.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return trajectory

    assert_same(trained(4), trained(1), rtol=1e-10)
    model = thor_fx.compile(build(Gated), backend="aot_eager")
    assert_same(train(model, thor_fx.Thor(model, **SETTINGS), batches(3, rows=8)), trained(1))


class Deep(nn.Module):
    """Layers of one form."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(IN, IN) for _ in range(depth))
        self.head = nn.Linear(IN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(x)


def traces(monkeypatch, depth: int) -> int:
    asked = []

    def counted(*args, **kwargs):
        asked.append(args)
        return trace(*args, **kwargs)

    monkeypatch.setattr(importlib.import_module("thor_fx.passes.emit_factors"), "trace", counted)
    model = build(lambda: Deep(depth))

    def loss_fn(params, x, y):
        return F.cross_entropy(torch.func.functional_call(model, dict(params), (x,)), y)

    gm = thor_fx.trace_step(loss_fn, dict(model.named_parameters()), *batches(1)[0])
    run(gm, [canonicalize, emit_factors])
    return len(asked)


def test_layers_of_one_form_are_traced_once(monkeypatch):
    assert traces(monkeypatch, 12) == traces(monkeypatch, 3) > 0


@pytest.mark.parametrize("settings", [{}, EXACT, {"rows": 0.5}])
def test_both_doors_agree_on_layers_of_one_form(settings):
    by_both_doors(lambda: build(lambda: Deep(5)), batches(4), **SETTINGS, **settings)
