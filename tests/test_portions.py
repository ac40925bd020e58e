"""On a CPU the layers of one shape are updated in portions, which changes no update."""

import pytest
import torch
from torch import nn

import thor_fx
from thor_fx import portions as module
from thor_fx.layers import Layer
from thor_fx.portions import portions
from training import CLASSES, HIDDEN, IN, assert_moved, assert_same, batches, build, by_both_doors, snapshot

SETTINGS = {"lr": 0.05, "damping": 0.1, "momentum": 0.9, "frequency": 2}
ONE_LAYER = HIDDEN * HIDDEN * 8  # bytes in float64


def deep() -> nn.Module:
    """Three layers of one shape between two others."""
    hidden = [part for _ in range(3) for part in (nn.Linear(HIDDEN, HIDDEN), nn.Tanh())]
    return nn.Sequential(nn.Linear(IN, HIDDEN), nn.Tanh(), *hidden, nn.Linear(HIDDEN, CLASSES))


def trajectory(**settings):
    return by_both_doors(lambda: build(deep), batches(4), **{**SETTINGS, **settings})


@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize(
    "settings",
    [
        {"block_size": 4},
        {"block_size": None, "bias": "joint"},
        {"max_dim": 5},
        {"inverse": "eigen", "block_size": 4},
        {"inverse": "ekfac", "block_size": 4},
        {"inverse": "eva", "frequency": 1},
        {"step_norm": "orthogonal"},
        {"factor_decay": 0.9},
    ],
    ids=str,
)
def test_portions_change_no_update(settings, at_once, monkeypatch):
    together = trajectory(**settings)
    assert_moved(together, snapshot(dict(build(deep).named_parameters())))
    monkeypatch.setattr(module, "PORTION", at_once * ONE_LAYER)
    assert_same(trajectory(**settings), together, rtol=1e-11)


def test_layers_are_taken_in_order_until_a_portion_is_full(monkeypatch):
    layers = covered(deep(), HIDDEN)
    for limit, sizes in ((3, [3]), (2.9, [2, 1]), (2, [2, 1]), (1.9, [1, 1, 1]), (0.1, [1, 1, 1])):
        monkeypatch.setattr(module, "PORTION", limit * ONE_LAYER)
        found = portions(layers, torch.zeros((), dtype=torch.float64))
        assert [len(few) for few in found] == sizes
        assert [layer for few in found for layer in few] == layers


def test_a_device_other_than_the_cpu_takes_all_at_once(monkeypatch):
    monkeypatch.setattr(module, "PORTION", 1)
    layers = covered(deep(), HIDDEN)
    assert portions(layers, torch.zeros((), device="meta")) == [layers]


def covered(net: nn.Module, width: int) -> list[Layer]:
    """The square layers of a net of one width."""
    params = {name: p.detach() for name, p in net.named_parameters()}

    def loss_fn(p, x):
        return torch.func.functional_call(net, p, (x,)).mean()

    report = thor_fx.explain(loss_fn, params, torch.randn(2, IN), tx=thor_fx.thor(0.1, 0.1, 0.9))
    return [layer for layer in report.coverage.layers.values() if layer.out == layer.in_ == width]
