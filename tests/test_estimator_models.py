"""``fisher="exact"`` and ``"sampled"`` on more than a perceptron: positions, shared weights, checkpoints."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import ggn
import oracle
import thor_fx
from thor_fx.passes import Factor, canonicalize, drop_factors, emit_factors, outputs, pipeline
from thor_fx.passes.layout import Rules
from thor_fx.passes.survey import ELSEWHERE

B, T, D, C = 3, 2, 4, 3


def data(*shape):
    return torch.randn(shape, dtype=torch.float64)


def seeded(make, seed=0):
    torch.manual_seed(seed)
    return make()


X = seeded(lambda: data(B, T, D))
LABELS = torch.tensor([[0, 2], [1, -100], [2, 0]])
IMAGES = seeded(lambda: data(2, 2, 4, 4))


def tokens(tap, p, x):
    """Two tokens that look at each other: (B, T, C)."""
    q, k, v = tap("qkv", x, x @ p["qkv"].T).chunk(3, -1)
    mixed = (q @ k.mT).softmax(-1) @ v
    return tap("head", mixed, mixed @ p["head"].T)


def tokens_params():
    return {"qkv": data(3 * D, D) / 2, "head": data(C, D)}


def flat_tokens(tap, p, x):
    return tokens(tap, p, x).flatten(0, 1)


def early_flat_tokens(tap, p, x):
    """Flattened before the head."""
    q, k, v = tap("qkv", x, x @ p["qkv"].T).chunk(3, -1)
    mixed = ((q @ k.mT).softmax(-1) @ v).reshape(-1, D)
    return tap("head", mixed, mixed @ p["head"].T)


def pooled(tap, p, x):
    """One row per datum; the tokens are positions of the first layer."""
    hidden = tap("w", x, x @ p["w"].T).tanh().mean(1)
    return tap("v", hidden, hidden @ p["v"].T)


def pooled_params():
    return {"w": data(5, D), "v": data(C, 5)}


def convolution(tap, p, x):
    """A convolution, as the product of its patches with the weight."""
    patches = F.unfold(x, 3, padding=1, stride=2).mT  # (B, positions, 18)
    made = tap("conv", patches, patches @ p["conv"].flatten(1).T)
    return _classify(tap, p, made.mT.flatten(1))


def real_convolution(p, x):
    return _classify(ggn.plain, p, F.conv2d(x, p["conv"], padding=1, stride=2).flatten(1))


def _classify(tap, p, flat):
    hidden = flat.tanh()
    return tap("fc", hidden, hidden @ p["fc"].T)


def convolution_params():
    return {"conv": data(3, 2, 3, 3) / 3, "fc": data(C, 12)}


def recurrent(tap, p, x):
    hidden = torch.zeros(len(x), 4, dtype=torch.float64)
    for t in range(x.shape[1]):
        hidden = (tap("in", x[:, t], x[:, t] @ p["in"].T) + tap("rec", hidden, hidden @ p["rec"].T)).tanh()
    return tap("out", hidden, hidden @ p["out"].T)


def recurrent_params():
    return {"in": data(4, D), "rec": data(4, 4), "out": data(C, 4)}


def cross_entropy(z):
    labels = LABELS if z.dim() == 3 else LABELS.flatten()
    return F.cross_entropy(z.flatten(0, -2), labels.flatten()[: z.flatten(0, -2).shape[0]])


def mse(z):
    return z.sin().square().mean() if z.dim() > 3 else (z - 0.3).square().mean()


def bce(z):
    return F.binary_cross_entropy_with_logits(z, torch.full_like(z, 0.7))


MODELS = {
    "tokens": (tokens, tokens_params, X),
    "flat_tokens": (flat_tokens, tokens_params, X),
    "early_flat_tokens": (early_flat_tokens, tokens_params, X),
    "pooled": (pooled, pooled_params, X),
    "recurrent": (recurrent, recurrent_params, X),
}


def exact(net, params, loss, *inputs, **options):
    options = {"fisher": "exact", **options}
    return thor_fx.factors(lambda p, *x: loss(net(ggn.plain, p, *x)), params, *inputs, **options)


def assert_pairs(found, expected, tolerance=1e-10):
    assert found.keys() == expected.keys()
    for name, pair in expected.items():
        assert oracle.relative_error(found[name].A, pair.A) < tolerance, name
        assert oracle.relative_error(found[name].G, pair.G) < tolerance, name


@pytest.mark.parametrize("loss", [cross_entropy, mse, bce])
@pytest.mark.parametrize("name", MODELS)
def test_exact_factors_of_models_with_positions(name, loss):
    net, make, x = MODELS[name]
    params = seeded(make)
    expected = ggn.factors(net, params, loss, x)
    if name == "early_flat_tokens" and loss is cross_entropy:
        assert_pairs(exact(net, params, loss, x), expected)
    assert_pairs(exact(net, params, loss, x), expected)


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


# --- what the pass leaves alone ----------------------------------------------------------------------


def dropout_loss(p, x):
    hidden = F.dropout((x @ p["w"].T).tanh().mean(1), 0.5)
    return cross_entropy(F.dropout(hidden @ p["v"].T, 0.2))


@pytest.mark.parametrize("fisher", ["sampled", "exact"])
def test_loss_and_gradients_stay_bitwise_and_factors_can_be_dropped(fisher):
    params = seeded(pooled_params)
    before = pipeline.run(thor_fx.trace_step(dropout_loss, params, X), [canonicalize])
    after = pipeline.run(before, [partial(emit_factors, rules=Rules(fisher=fisher))])
    plain, new = values(before, params), values(after, params)
    assert all(torch.equal(new[d], plain[d]) for d in plain)
    assert str(pipeline.run(after, [drop_factors]).graph) == str(before.graph)


def values(gm, params):
    torch.manual_seed(3)
    return dict(zip(outputs.output_nodes(gm), gm(*params.values(), X), strict=True))


def test_what_sampling_adds_to_a_graph():
    """A golden of the new nodes, but for those of the factors themselves."""
    params = seeded(pooled_params)
    step = thor_fx.trace_step(lambda p, x: cross_entropy(pooled(ggn.plain, p, x)), params, X)
    before = pipeline.run(step, [canonicalize])
    after = pipeline.run(before, [partial(emit_factors, rules=Rules(fisher="sampled"))])
    known = {n.name for n in before.graph.nodes}
    new = [str(n.target) for n in after.graph.nodes if n.name not in known]
    counted = {name: sum(name in target for target in new) for name in ("rand", "bernoulli", "cumsum")}
    assert counted == {"rand": 1, "bernoulli": 0, "cumsum": 1}
    assert new.count("aten.tanh_backward.default") == 1


def test_draws_follow_the_seed_and_change_without_one():
    params = seeded(pooled_params)
    step = thor_fx.trace_step(lambda p, x: cross_entropy(pooled(ggn.plain, p, x)), params, X)
    gm = pipeline.run(step, [canonicalize, partial(emit_factors, rules=Rules(fisher="sampled"))])
    one, same = values(gm, params)[Factor("v", "G")], values(gm, params)[Factor("v", "G")]
    other = dict(zip(outputs.output_nodes(gm), gm(*params.values(), X), strict=True))[Factor("v", "G")]
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_batch_twice_has_the_same_factors():
    params = seeded(pooled_params)
    loss_fn = lambda p, x, y: F.cross_entropy(pooled(ggn.plain, p, x), y)  # noqa: E731
    labels = torch.tensor([0, -100, 2])
    once = thor_fx.factors(loss_fn, params, X, labels, fisher="exact")
    twice = thor_fx.factors(loss_fn, params, torch.cat([X, X]), torch.cat([labels] * 2), fisher="exact")
    assert_pairs(twice, once)


@pytest.mark.parametrize("loss", [cross_entropy, mse, bce])
def test_the_loss_scale_cancels(loss):
    params = seeded(pooled_params)
    plain = exact(pooled, params, loss, X)
    assert_pairs(exact(pooled, params, lambda z: 64 * loss(z), X, loss_scale=64), plain)


def test_cross_entropy_needs_no_loss_scale():
    params = seeded(pooled_params)
    assert_pairs(
        exact(pooled, params, lambda z: F.cross_entropy(z, LABELS[:, 0], reduction="sum"), X),
        exact(pooled, params, lambda z: F.cross_entropy(z, LABELS[:, 0]), X),
    )


def test_batch_size_does_not_change_what_has_no_scale():
    params = seeded(pooled_params)
    assert_pairs(
        exact(pooled, params, cross_entropy, X, batch_size=7), exact(pooled, params, cross_entropy, X)
    )


# --- reports -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [cross_entropy, mse, bce])
def test_verify_compares_with_the_dense_ggn(loss):
    """One row per datum and one layer: the Fisher block of one datum is its Kronecker product."""
    params = seeded(tokens_params)
    certificate = thor_fx.verify(
        lambda p, x: loss(tokens(ggn.plain, p, x)) if loss is not cross_entropy else first_labels(p, x),
        params, X, fisher="exact",
    )  # fmt: skip
    assert certificate.worst < 1e-10
    for name, errors in certificate.layers.items():
        expected = ggn.dense(tokens, params, loss if loss is not cross_entropy else first_of, X)[name]
        pair = thor_fx.factors(
            lambda p, x: loss(tokens(ggn.plain, p, x)) if loss is not cross_entropy else first_labels(p, x),
            params, X, fisher="exact",
        )[name]  # fmt: skip
        product = oracle.kronecker(pair.G, pair.A)
        assert errors.fisher == pytest.approx(float((product - expected).norm() / expected.norm()), rel=1e-6)


def first_of(z):
    """Every label is 0, so that it is the same loss for any batch."""
    return F.cross_entropy(z.flatten(0, 1), torch.zeros(len(z) * T, dtype=torch.int64))


def first_labels(p, x):
    return first_of(tokens(ggn.plain, p, x))


def test_verify_refuses_what_is_random():
    with pytest.raises(ValueError, match=r"fisher='sampled' is random.*'exact'"):
        thor_fx.verify(first_labels, seeded(tokens_params), X, fisher="sampled")


def test_explain_names_the_estimator():
    params = seeded(tokens_params)
    tx = thor_fx.thor(0.1, 0.1, 0.9, fisher="exact")
    report = thor_fx.explain(first_labels, params, X, tx=tx)
    assert str(report).endswith("fisher: exact, categorical (read off the loss), 6 backward passes")
    model = torch.nn.Linear(3, 2)
    report = thor_fx.explain(model, torch.ones(4, 3), tx=thor_fx.thor(0.1, 0.1, 0.9, fisher="sampled"))
    assert str(report).endswith("fisher: sampled, of a loss outside of the module: it needs likelihood=")
    tx = thor_fx.thor(0.1, 0.1, 0.9, fisher="sampled", likelihood="categorical")
    assert str(thor_fx.explain(model, torch.ones(4, 3), tx=tx)).endswith("fisher: sampled, categorical")
    assert "fisher" not in str(thor_fx.explain(model, torch.ones(4, 3)))
