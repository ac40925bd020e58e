"""``layer_filter``: weights that a user leaves to the first-order rule."""

import functools
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import thor_fx
from models import random
from thor_fx.passes.survey import FILTERED
from training import (
    CLASSES,
    IN,
    assert_same,
    batches,
    build,
    by_drop_in_door,
    by_functional_door,
    mlp,
    snapshot,
    train,
)

SETTINGS = {"lr": 0.05, "damping": 0.1, "momentum": 0.9, "frequency": 2}
DOORS = by_drop_in_door, by_functional_door


def all_but(*left):
    return lambda name: name not in left


def plain_sgd(names, data):
    """torch's own, for some parameters; the gradients of the others are applied nowhere."""
    model = build(mlp)
    params = dict(model.named_parameters())
    optimizer = torch.optim.SGD([params[name] for name in names], lr=0.05, momentum=0.9)
    for x, y in data:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return snapshot(params)


@pytest.mark.parametrize("door", DOORS)
def test_everything_left_out_is_momentum_sgd(door):
    data = batches(4)
    told = (
        pytest.warns(match="no weight has factors, so all of them take the first-order rule")
        if door is by_drop_in_door
        else nullcontext()
    )
    with told:
        found = door(build(mlp), data, **SETTINGS, layer_filter=lambda _: False)[-1]
    expected = plain_sgd(["0.weight", "0.bias", "2.weight", "2.bias"], data)
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-10, atol=0), name


@pytest.mark.parametrize("left", ["0.weight", "2.weight"])
@pytest.mark.parametrize("bias", ["raw", "joint"])
def test_the_other_layers_step_as_before(left, bias):
    """In the first step, where nothing has moved: also ``n``, which is read at the head, is the same."""
    data = batches(1)
    for door in DOORS:
        whole = door(build(mlp), data, **SETTINGS, bias=bias)[-1]
        found = door(build(mlp), data, **SETTINGS, bias=bias, layer_filter=all_but(left))[-1]
        own = plain_sgd([left], data)
        prefix = left.removesuffix("weight")
        for name, value in found.items():
            expected = own[name] if name == left else whole[name]
            if name.startswith(prefix) and name != left:
                continue  # its bias: joint or not, it follows the weight
            assert torch.allclose(value, expected, rtol=1e-10, atol=0), name
        assert not torch.allclose(found[left], whole[left])


@pytest.mark.parametrize("settings", [{}, {"fisher": "exact", "likelihood": "categorical"}])
def test_both_doors_agree(settings):
    options = {**SETTINGS, **settings, "layer_filter": all_but("2.weight"), "factor_decay": 0.9}
    one, other = (door(build(mlp), batches(5), **options) for door in DOORS)
    assert_same(one, other, rtol=1e-9)


@pytest.mark.parametrize("left", ["0.weight", "2.weight"])
def test_what_is_left_out_has_no_factors_and_the_reason_is_told(left):
    model = thor_fx.compile(build(mlp), backend="aot_eager")
    optimizer = thor_fx.Thor(model, **SETTINGS, layer_filter=all_but(left))
    train(model, optimizer, batches(2))
    other = {"0.weight": "2", "2.weight": "0"}[left]
    assert set(optimizer.coverage.layers) == {f"{other}.weight"}
    assert optimizer.coverage.fallback[left] == FILTERED
    tx = thor_fx.thor(**SETTINGS, layer_filter=all_but(left))
    report = thor_fx.explain(build(mlp), torch.ones(4, IN, dtype=torch.float64), tx=tx)
    assert report.coverage.fallback[left] == FILTERED
    assert FILTERED in report.why(left)
    assert report.costs.keys() == {f"{other}.weight"}


def test_strict_does_not_mind_what_was_asked_for():
    model = thor_fx.compile(build(mlp), backend="aot_eager", strict=True)
    train(model, thor_fx.Thor(model, **SETTINGS, layer_filter=all_but("2.weight")), batches(2))


def test_parts_of_a_tied_weight_go_together():
    params = {"w": random(1, torch.float64, 5, 4), "v": random(2, torch.float64, 3, 5)}

    def loss_fn(p, x):
        return ((x @ p["w"].T).tanh() @ p["w"] @ p["w"].T @ p["v"].T).sin().sum(-1).mean()

    tx = thor_fx.thor(**SETTINGS, layer_filter=all_but("w"))
    report = thor_fx.explain(loss_fn, params, random(3, torch.float64, 6, 4), tx=tx)
    assert set(report.coverage.layers) == {"v"}


def test_a_list_of_names_is_refused():
    with pytest.raises(TypeError, match="layer_filter must be a callable name -> bool, got"):
        thor_fx.thor(**SETTINGS, layer_filter=["2.weight"])


class TwoGraphs(nn.Module):
    """The head is in a graph of its own."""

    def __init__(self, *, broken):
        super().__init__()
        self.broken = broken
        self.body, self.head = nn.Linear(IN, IN), nn.Linear(IN, CLASSES)

    def forward(self, x):
        h = self.body(x).tanh()
        if self.broken:
            torch._dynamo.graph_break()
        return self.head(h)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_graph_in_which_nothing_is_left_still_tells_n():
    options = {**SETTINGS, "layer_filter": all_but("head.weight")}
    broken, whole = (build(functools.partial(TwoGraphs, broken=broken)) for broken in (True, False))
    found = by_drop_in_door(broken, batches(3), **options)
    assert_same(found, by_functional_door(whole, batches(3), **options), rtol=1e-9)
