"""The first-order rule of what belongs to no layer."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import thor_fx
from models import random
from thor_fx.adam import adam
from thor_fx.layers import Coverage, Layer
from thor_fx.passes.sides import Side
from thor_fx.routes import NOTHING, by_coverage
from thor_fx.transform import Signals, divide_by, stateless
from training import (
    MODELS,
    Parameters,
    assert_same,
    batches,
    build,
    by_functional_door,
    identical,
    mlp,
    snapshot,
    train,
)

D = torch.float64
SETTINGS = {"lr": 0.02, "damping": 0.1, "momentum": 0.9, "frequency": 3, "fallback": "adamw"}
STEPS = 5


def adamw_beside(make, names: set[str], lr: float, weight_decay: float) -> list[Parameters]:
    """``torch.optim.AdamW`` on some parameters, while the others follow the trajectory of ``thor``."""
    data = batches(STEPS)
    settings = {**SETTINGS, "fallback_lr": lr, "weight_decay": weight_decay}
    found, model = by_functional_door(build(make), data, **settings), build(make)
    params = dict(model.named_parameters())
    optimizer = torch.optim.AdamW([params[name] for name in names], lr=lr, weight_decay=weight_decay)
    expected = []
    for (x, y), after in zip(data, found, strict=True):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        with torch.no_grad():
            for name in params.keys() - names:
                params[name].copy_(after[name])
        expected.append(snapshot(params))
    assert_same(found, expected, rtol=1e-10)
    return found


def test_biases_take_torchs_adamw():
    adamw_beside(mlp, {"0.bias", "2.bias"}, lr=0.01, weight_decay=0.1)


def test_norms_take_it_too():
    adamw_beside(MODELS["normalised"], {"0.bias", "1.weight", "1.bias"}, lr=0.003, weight_decay=0.0)


def test_layers_do_not_notice():
    """Momentum, clips and step length of layers are those without it."""
    data = batches(1)
    (one,) = by_functional_door(build(mlp), data, **SETTINGS)
    (other,) = by_functional_door(build(mlp), data, **{**SETTINGS, "fallback": "sgd"})
    for name in ("0.weight", "2.weight"):
        assert torch.equal(one[name], other[name])
    assert not torch.equal(one["0.bias"], other["0.bias"])


class Table(nn.Module):
    """Nothing has factors: a table that is added, and a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.scale = nn.Parameter(torch.ones(5)), nn.Parameter(torch.full((5, 3), 0.1))

    def forward(self, x):
        return (x + self.table).sin() @ self.scale.sin()


def test_a_model_without_layers_is_adamw():
    data, model = batches(4), build(Table)
    found = by_functional_door(build(Table), data, **SETTINGS, weight_decay=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    assert_same(found, train(model, optimizer, data), rtol=1e-10)


def test_a_learning_rate_of_its_own_by_group_and_by_table():
    data = batches(3)
    table = torch.tensor([0.01, 0.02, 0.04])
    model = thor_fx.compile(build(mlp), backend="aot_eager")
    optimizer = thor_fx.Thor(
        model, **SETTINGS, params=[{"params": ["2.weight", "2.bias"], "fallback_lr": table}]
    )
    found, shown = [], []
    for batch in data:
        found += train(model, optimizer, [batch])
        shown.append(optimizer.param_groups[0]["fallback_lr"])
    assert shown == pytest.approx(table.tolist())
    assert optimizer.param_groups[1]["fallback_lr"] is None
    # the first step of Adam moves by its learning rate
    start = snapshot(dict(build(mlp).named_parameters()))
    for name, lr in (("0.bias", 0.02), ("2.bias", 0.01)):
        assert (found[0][name] - start[name]).abs().tolist() == pytest.approx(
            [lr] * len(start[name]), rel=1e-5
        )


def test_a_parameter_that_gets_a_layer_later_changes_its_rule():
    """A branch that the first steps do not use: its weight is AdamW's until a factor step has seen it."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.extra, self.wide = nn.Linear(5, 5), nn.Linear(5, 5), False
            self.head = nn.Linear(5, 3)

        def forward(self, x):
            h = self.body(x).tanh()
            return self.head(self.extra(h).tanh() if self.wide else h)

    model = thor_fx.compile(build(Branch), backend="aot_eager")
    optimizer = thor_fx.Thor(model, **SETTINGS)
    train(model, optimizer, batches(2))
    model.wide = True
    found = train(model, optimizer, batches(4))
    assert "extra.weight" in optimizer.coverage.layers
    assert "momentum" in optimizer.state[model.extra.weight]
    assert not identical(found[0], found[-1])
    assert all(p.isfinite().all() for p in found[-1].values())


# --- alone -----------------------------------------------------------------------------------------------


def test_adam_is_torchs_adam():
    params = {"w": random(1, D, 3, 4), "b": random(2, D, 3)}
    leaves = {name: nn.Parameter(p.clone()) for name, p in params.items()}
    optimizer, nothing = torch.optim.Adam(list(leaves.values()), lr=0.1), Coverage({}, (), {})
    tx = adam()
    state = tx.init(params, nothing)
    for step in range(6):
        given = {
            name: random(10 * step, D, *p.shape) for name, p in params.items() if name == "w" or step % 2
        }
        for name, leaf in leaves.items():
            leaf.grad = given.get(name)
        optimizer.step()
        new, state = tx.update(given, state, params, Signals(nothing))
        params = {name: p - 0.1 * new[name] if name in new else p for name, p in params.items()}
        for name, p in params.items():
            torch.testing.assert_close(p, leaves[name].detach(), rtol=1e-12, atol=1e-14)
    assert (state.step["w"], state.step["b"]) == (6, 3)


def test_two_ways():
    found = Coverage({"w": Layer("w", "w", Side(4), Side(3), (), (), 1, "6")}, (), {"b": "a bias"})
    given = {"b": torch.ones(3), "w": torch.ones(3, 4)}
    seen = []
    spy = stateless(lambda updates, params, signals: seen.append((set(params), signals.coverage)) or updates)
    for layers, others, expected in (
        (divide_by(2.0), spy, (1.0, 0.5)),
        (NOTHING, divide_by(4.0), (0.25, 1.0)),
    ):
        tx = by_coverage(layers, others)
        new, _ = tx.update(given, tx.init(given, found), given, Signals(found))
        assert list(new) == ["b", "w"]
        assert (new["b"].mean().item(), new["w"].mean().item()) == expected
    ((names, coverage),) = seen
    assert names == {"b"}
    assert coverage.trained == {"b"}
