"""``bias="joint"``: weight and bias are one matrix, whose last column is that of the bias."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import oracle
import thor_fx
from training import (
    assert_same,
    batches,
    build,
    by_both_doors,
    by_drop_in_door,
    by_functional_door,
    mlp,
    snapshot,
    train,
)

LAMBDA = 0.1
SETTINGS = {"lr": 0.1, "damping": LAMBDA, "momentum": 0.9, "frequency": 2, "bias": "joint"}


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def regression(model):
    def loss_fn(p, *inputs):
        return functional_call(model, p, inputs).sin().sum(-1).mean()

    return loss_fn


def with_ones(rows):
    return torch.cat([rows, torch.ones_like(rows[..., :1])], -1)


def joint_factors(model, *inputs, **options):
    params = {name: p.detach() for name, p in model.named_parameters()}
    return thor_fx.factors(regression(model), params, *inputs, bias="joint", **options)


@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 5)])
def test_the_input_of_a_linear_layer_is_extended_by_one(shape):
    model, x = nn.Linear(5, 4).double(), random(*shape)
    a = with_ones(x.flatten(0, -2))
    pair = joint_factors(model, x)["weight"]
    assert pair.A.shape == (6, 6)
    assert oracle.relative_error(pair.A, a.T @ a / len(a)) < 1e-10


def test_without_a_bias_nothing_is_added():
    assert joint_factors(nn.Linear(5, 4, bias=False).double(), random(7, 5))["weight"].A.shape == (5, 5)


def test_the_update_is_a_dense_solve():
    model, x = nn.Linear(3, 2).double(), random(7, 3)
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss_fn = regression(model)
    step = thor_fx.compile_step(
        loss_fn, thor_fx.thor(lr=1.0, damping=LAMBDA, momentum=0.0, bias="joint"), backend="eager"
    )
    after, _, _ = step(snapshot(params), step.init(params, x), x)
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    gradients = dict(zip(leaves, torch.autograd.grad(loss_fn(leaves, x), leaves.values()), strict=True))
    pair = joint_factors(model, x)["weight"]
    matrix = torch.cat([gradients["weight"], gradients["bias"][:, None]], 1)
    update = oracle.natural_step(pair.A, pair.G, matrix, LAMBDA, LAMBDA)
    assert oracle.relative_error(params["weight"] - after["weight"], update[:, :-1]) < 1e-9
    assert oracle.relative_error(params["bias"] - after["bias"], update[:, -1]) < 1e-9


def test_one_datum_is_exact():
    """``vec([dW, db]) vec([dW, db])^T`` of one example is the Kronecker product of the joint factors."""
    model, x = build(mlp), random(1, 5)
    params = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    gradients = dict(
        zip(params, torch.autograd.grad(regression(model)(params, x), params.values()), strict=True)
    )
    for layer, pair in joint_factors(model, x).items():
        bias = gradients[layer.replace("weight", "bias")]
        vector = torch.cat([gradients[layer], bias[:, None]], 1).flatten()
        assert oracle.relative_error(oracle.kronecker(pair.G, pair.A), torch.outer(vector, vector)) < 1e-10


def test_parts_of_a_packed_projection_have_parts_of_its_bias():
    model = nn.MultiheadAttention(4, 2, batch_first=True).double()
    x, m = random(2, 3, 4), random(2, 5, 4, seed=1)

    def loss_fn(p, x, m):
        return functional_call(model, p, (x, m, m), {"need_weights": False})[0].sin().sum(-1).mean()

    params = {name: p.detach() for name, p in model.named_parameters()}
    pairs = thor_fx.factors(loss_fn, params, x, m, bias="joint")
    for layer, rows in {"in_proj_weight[0:4]": x, "in_proj_weight[4:12]": m}.items():
        a = with_ones(rows.flatten(0, -2))
        assert oracle.relative_error(pairs[layer].A, a.T @ a / len(a)) < 1e-10


class Shared(nn.Module):
    """Two layers that add the same bias."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(5, 4), nn.Linear(4, 4)
        self.two.bias = self.one.bias

    def forward(self, x):
        return self.two(self.one(x).tanh())


def test_a_bias_of_two_layers_stays_on_its_own():
    model = Shared().double()
    report = thor_fx.explain(model, random(7, 5), tx=thor_fx.thor(0.1, 0.1, 0.9, bias="joint"))
    assert [layer.bias for layer in report.coverage.layers.values()] == [None, None]
    assert list(report.coverage.fallback) == ["one.bias"]


def test_both_doors_take_the_same_steps():
    data = batches(4)
    functional = by_both_doors(lambda: build(mlp), data, 1e-10, **SETTINGS)
    raw = by_functional_door(build(mlp), data, **{**SETTINGS, "bias": "raw"})
    assert not torch.allclose(raw[-1]["0.bias"], functional[-1]["0.bias"])


def test_a_bias_in_another_group_of_parameters_is_on_its_own():
    """As many recipes do, to spare biases the weight decay: the weight's own factor is used, then."""
    data = batches(4)
    model = thor_fx.compile(build(mlp), backend="aot_eager")
    groups = [{"params": ["0.bias", "2.bias"]}]
    apart = train(model, thor_fx.Thor(model, params=groups, **SETTINGS), data)
    raw = by_drop_in_door(build(mlp), data, **{**SETTINGS, "bias": "raw"})
    assert_same(apart, raw, rtol=1e-10)


def test_a_frozen_bias_is_left_alone():
    model = build(mlp)
    model[0].bias.requires_grad_(False)
    before = model[0].bias.detach().clone()
    data = batches(3)
    trajectory = by_drop_in_door(model, data, **SETTINGS)
    assert torch.equal(trajectory[-1]["0.bias"], before)
    assert not torch.equal(trajectory[-1]["2.bias"], trajectory[0]["2.bias"])


def test_the_bias_of_a_side_without_products_is_on_its_own():
    model, x = nn.Linear(6, 3).double(), random(7, 6)
    for long_side in ("diagonal", "identity"):
        tx = thor_fx.thor(0.1, 0.1, 0.9, bias="joint", max_dim=4, long_side=long_side)
        report = thor_fx.explain(model, x, tx=tx)
        assert report.coverage.layers["weight"].bias is None
        assert "bias" in report.coverage.fallback
        assert "the bias is on its own" in report.why("weight")


@pytest.mark.parametrize("size", [2, 3, 5])
def test_a_bias_in_the_blocks_of_a_weight_in_another_group_of_parameters(size):
    """Its row and column of the last block are left out, and the block where it is alone."""
    data, settings = batches(4), {**SETTINGS, "max_dim": 2, "block_size": size}
    by_both_doors(lambda: build(mlp), data, 1e-10, **settings)
    model = thor_fx.compile(build(mlp), backend="aot_eager")
    apart = train(model, thor_fx.Thor(model, params=[{"params": ["0.bias", "2.bias"]}], **settings), data)
    raw = by_drop_in_door(build(mlp), data, **{**settings, "bias": "raw"})
    assert_same(apart, raw, rtol=1e-10)


def test_a_loss_with_labels_through_the_drop_in_door():
    model = thor_fx.compile(build(mlp), backend="aot_eager")
    optimizer = thor_fx.Thor(model, **SETTINGS)
    (x, y), *_ = batches(1)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert {layer.bias for layer in optimizer.coverage.layers.values()} == {"0.bias", "2.bias"}
