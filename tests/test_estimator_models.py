"""``fisher="exact"`` and ``"sampled"`` on more than a perceptron: positions, shared weights, checkpoints."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import ggn
import oracle
import thor_fx
from nets import (
    IMAGES,
    B,
    C,
    D,
    X,
    assert_pairs,
    bce,
    convolution,
    convolution_params,
    cross_entropy,
    data,
    early_flat_tokens,
    exact,
    flat_tokens,
    mse,
    pooled,
    pooled_params,
    real_convolution,
    recurrent,
    recurrent_params,
    scalars,
    seeded,
    tokens,
    tokens_params,
)
from thor_fx.passes.survey import ELSEWHERE

MODELS = {
    "tokens": (tokens, tokens_params, X),
    "flat_tokens": (flat_tokens, tokens_params, X),
    "early_flat_tokens": (early_flat_tokens, tokens_params, X),
    "scalars": (scalars, lambda: {"qkv": data(3 * D, D) / 2, "head": data(1, D)}, X),
    "pooled": (pooled, pooled_params, X),
    "recurrent": (recurrent, recurrent_params, X),
}


@pytest.mark.parametrize("loss", [cross_entropy, mse, bce])
@pytest.mark.parametrize("name", MODELS)
def test_exact_factors_of_models_with_positions(name, loss):
    net, make, x = MODELS[name]
    params = seeded(make)
    assert_pairs(exact(net, params, loss, x), ggn.factors(net, params, loss, x))


def test_exact_factors_of_a_convolution():
    params = seeded(convolution_params)
    loss = lambda z: F.cross_entropy(z, torch.tensor([0, 2]))  # noqa: E731
    found = thor_fx.factors(lambda p, x: loss(real_convolution(p, x)), params, IMAGES, fisher="exact")
    assert_pairs(found, ggn.factors(convolution, params, loss, IMAGES))


@pytest.mark.parametrize("name", ["tokens", "pooled"])
def test_exact_factors_with_positions_reduced(name):
    net, make, x = MODELS[name]
    params = seeded(make)
    expected = ggn.factors(net, params, cross_entropy, x, sharing="reduce")
    assert_pairs(exact(net, params, cross_entropy, x, sharing="reduce"), expected)


def test_exact_factors_of_a_convolution_reduced():
    params = seeded(convolution_params)
    loss = lambda z: F.cross_entropy(z, torch.tensor([0, 2]))  # noqa: E731
    options = {"fisher": "exact", "sharing": "reduce"}
    found = thor_fx.factors(lambda p, x: loss(real_convolution(p, x)), params, IMAGES, **options)
    assert_pairs(found, ggn.factors(convolution, params, loss, IMAGES, sharing="reduce"))


def test_images_have_their_classes_in_axis_one():
    """A fully convolutional net: (N, C, H, W)."""

    def net(tap, p, x):
        made = tap("conv", rows := x.movedim(1, -1), rows @ p["conv"].flatten(1).T)
        return made.movedim(-1, 1)

    params = {"conv": seeded(lambda: data(C, 2, 1, 1))}
    x = IMAGES[:, :, :2, :2]
    labels = torch.randint(C, (2, 2, 2), generator=torch.Generator().manual_seed(0))
    loss = lambda z: F.cross_entropy(z, labels)  # noqa: E731
    found = thor_fx.factors(lambda p, x: loss(F.conv2d(x, p["conv"])), params, x, fisher="exact")
    assert_pairs(found, ggn.factors(net, params, loss, x))


def test_a_tied_weight():
    def net(tap, p, x):
        hidden = tap("w", x, x @ p["w"].T).tanh()
        return tap("w (transposed)", hidden, hidden @ p["w"])

    params = {"w": seeded(lambda: data(2, D))}
    expected = ggn.factors(net, params, mse, X[:, 0])
    pairs = [oracle.Pair(*expected[name], B) for name in ("w", "w (transposed)")]
    assert_pairs(exact(net, params, mse, X[:, 0]), {"w": oracle.both_ways(*pairs)})


def test_a_checkpointed_block():
    def block(p, x):
        return (x @ p["w"].T).tanh().mean(1)

    def loss_fn(p, x):
        return cross_entropy(checkpoint(block, p, x, use_reentrant=False) @ p["v"].T)

    params = seeded(pooled_params)
    found = thor_fx.factors(loss_fn, params, X, fisher="exact")
    assert_pairs(found, ggn.factors(pooled, params, cross_entropy, X))


def test_two_forward_calls_in_one_loss():
    def both(tap, p, x):
        return torch.cat([pooled(tap, p, x), pooled(tap, p, x.flip(1) * 2)])

    def loss(z):
        return (cross_entropy(z[:B]) + cross_entropy(z[B:])) / 2

    params = seeded(pooled_params)
    expected = ggn.factors(both, params, loss, X)
    assert_pairs(exact(both, params, loss, X), expected)


def test_half_precision_logits():
    def loss_fn(p, x):
        with torch.autocast("cpu", torch.bfloat16):
            z = pooled(ggn.plain, p, x)
        return cross_entropy(z.float())

    params = {name: p.float() for name, p in seeded(pooled_params).items()}
    found = thor_fx.factors(loss_fn, params, X.float(), fisher="exact")
    assert_pairs(found, ggn.factors(pooled, seeded(pooled_params), cross_entropy, X), tolerance=0.03)


def test_a_joint_bias_changes_a_only():
    def loss_fn(p, x):
        return cross_entropy(F.linear(x.mean(1), p["w"], p["b"]))

    params = {"w": seeded(lambda: data(C, D)), "b": seeded(lambda: data(C))}
    plain = thor_fx.factors(loss_fn, params, X, fisher="exact")["w"]
    joint = thor_fx.factors(loss_fn, params, X, fisher="exact", bias="joint")["w"]
    assert torch.equal(joint.G, plain.G)
    assert oracle.relative_error(joint.A[:-1, :-1], plain.A) < 1e-12


def test_part_of_the_loss_that_has_no_likelihood_is_left_out_of_the_curvature():
    """An auxiliary loss on a hidden layer; what it alone trains takes the first-order rule."""

    def loss_fn(p, x):
        hidden = (x.mean(1) @ p["w"].T).tanh()
        return cross_entropy(hidden @ p["v"].T) + (hidden @ p["aux"].T).exp().mean()

    params = {**seeded(pooled_params), "aux": seeded(lambda: data(2, 5))}
    found = thor_fx.factors(loss_fn, params, X, fisher="exact")
    assert_pairs(
        found,
        ggn.factors(pooled, params, cross_entropy, X.mean(1, keepdim=True)),
    )
    report = thor_fx.explain(loss_fn, params, X, tx=thor_fx.thor(0.1, 0.1, 0.9, fisher="exact"))
    assert report.coverage.fallback["aux"] == ELSEWHERE
