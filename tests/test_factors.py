"""The factors that users see: definitions, invariances, arguments."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import models
import oracle
import thor_fx

BUILDS = pytest.mark.parametrize("build", models.BUILDERS, ids=lambda build: build.__name__)


def factors_of(case, **options):
    torch.manual_seed(0)
    return thor_fx.factors(case.loss_fn, case.params, *case.batch, **options)


def assert_same(got, expected, tolerance=1e-10):
    assert list(got) == list(expected)
    for layer in got:
        assert oracle.relative_error(got[layer].A, oracle.kept(expected[layer].A, got[layer].A)) < tolerance
        assert oracle.relative_error(got[layer].G, expected[layer].G) < tolerance


@BUILDS
def test_factors_equal_the_oracle(build):
    case = build()
    found = factors_of(case)
    torch.manual_seed(0)
    expected = oracle.factors(case)
    assert set(found) == set(expected)
    assert_same(found, {layer: expected[layer] for layer in found})
    for layer, kronecker in found.items():
        out, in_ = case.layers[layer]
        kind, groups = case.kinds.get(layer, "linear"), case.groups.get(layer, 1)
        stack = (groups,) if groups > 1 else ()
        assert kronecker.A.shape == ((in_,) if kind == "embedding" else (*stack, in_, in_))
        assert kronecker.G.shape == (*stack, out, out)
        assert (kronecker.rows, kronecker.n) == (expected[layer].rows, case.terms)
        assert (kronecker.kind, kronecker.groups) == (kind, groups)


@pytest.mark.parametrize("build", [models.mlp, models.three_axes, models.cross_attention, models.tied])
def test_factors_in_float32(build):
    assert_same(factors_of(build(torch.float32)), factors_of(build()), tolerance=1e-4)


# --- invariances -----------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [3])
@pytest.mark.parametrize("build", [models.linear, models.pooled, models.twice, models.three_axes])
def test_a_repeated_batch_leaves_both_factors_unchanged(build, times):
    case = build()
    longer = dataclasses.replace(case, batch=tuple(torch.cat([t] * times) for t in case.batch))
    more, once = factors_of(longer), factors_of(case)
    assert_same(more, once)
    assert all(more[layer].rows == times * once[layer].rows for layer in once)
    assert all(more[layer].n == times * case.terms for layer in once)


@pytest.mark.parametrize("build", [models.linear, models.pooled, models.three_axes])
def test_the_order_of_the_batch_does_not_matter(build):
    case = build()
    order = torch.randperm(len(case.batch[0]), generator=torch.Generator().manual_seed(1))
    assert order.tolist() != sorted(order.tolist())
    assert_same(
        factors_of(dataclasses.replace(case, batch=tuple(t[order] for t in case.batch))), factors_of(case)
    )


def classifier(reduction):
    def loss_fn(p, x, y):
        return F.cross_entropy((x @ p["a"].T).tanh() @ p["b"].T, y, reduction=reduction)

    return loss_fn


PARAMS = models.weights(torch.float64, a=(4, 5), b=(3, 4))
BATCH = models.random(1, torch.float64, 6, 5), models.labels(2, 3, 6)
MEAN = classifier("mean")


def test_a_sum_that_is_divided_by_the_batch_size_is_a_mean():
    def loss_fn(p, x, y):
        return classifier("sum")(p, x, y) / 6

    expected = thor_fx.factors(MEAN, PARAMS, *BATCH)
    assert_same(thor_fx.factors(loss_fn, PARAMS, *BATCH, batch_size=6), expected)
    assert_same(thor_fx.factors(loss_fn, PARAMS, *BATCH), expected)


def test_a_sum_over_n_terms_is_their_mean_scaled_by_n():
    got = thor_fx.factors(classifier("sum"), PARAMS, *BATCH, batch_size=6, loss_scale=6)
    assert_same(got, thor_fx.factors(MEAN, PARAMS, *BATCH))


@pytest.mark.parametrize("scale", [0.125, 1024, 65536.0])
def test_the_loss_scale_cancels(scale):
    got = thor_fx.factors(lambda p, x, y: scale * MEAN(p, x, y), PARAMS, *BATCH, loss_scale=scale)
    assert_same(got, thor_fx.factors(MEAN, PARAMS, *BATCH))


def test_the_loss_scale_enters_g_squared_and_a_not_at_all():
    plain, halved = thor_fx.factors(MEAN, PARAMS, *BATCH), thor_fx.factors(MEAN, PARAMS, *BATCH, loss_scale=2)
    for layer in plain:
        assert torch.equal(halved[layer].A, plain[layer].A)
        assert torch.equal(halved[layer].G, plain[layer].G / 4)


def test_the_batch_size_multiplies_g():
    plain, given = thor_fx.factors(MEAN, PARAMS, *BATCH), thor_fx.factors(MEAN, PARAMS, *BATCH, batch_size=12)
    for layer in plain:
        assert given[layer].n == 12
        assert given[layer].rows == plain[layer].rows == 6
        assert torch.equal(given[layer].A, plain[layer].A)
        torch.testing.assert_close(given[layer].G, 2 * plain[layer].G, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("build", "n"),
    [(models.linear, 6), (models.three_axes, 2 * 5), (models.pooled, 6), (models.one_datum, 1)],
    ids=["classifier", "language model", "classifier of sequences", "one datum"],
)
def test_n_is_read_off_the_graph(build, n):
    assert {kronecker.n for kronecker in factors_of(build()).values()} == {n}


def test_a_and_g_are_means_of_outer_products_for_a_linear_layer():
    """``E[a a^T]`` and ``E[g g^T]`` of single examples (Martens & Grosse 2015)."""
    case = models.linear()
    x, y = case.batch
    p = (x @ case.params["weight"].T + case.params["bias"]).softmax(-1) - F.one_hot(y, 3)
    found = factors_of(case)["weight"]
    torch.testing.assert_close(found.A, (x.T @ x) / 6, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.G, (p.T @ p).detach() / 6, rtol=1e-12, atol=1e-14)


# --- arguments -------------------------------------------------------------------------------------


def test_the_parameters_are_left_alone():
    case = models.mlp()
    kept = {name: p.detach().clone() for name, p in case.params.items()}
    factors_of(case)
    assert all(torch.equal(case.params[name], kept[name]) for name in kept)
    assert all(p.grad is None for p in case.params.values())


def test_nests_of_tensors_in_the_batch():
    def loss_fn(p, batch, weight):
        return weight * MEAN(p, batch["x"], batch["y"][0])

    x, y = BATCH
    got = thor_fx.factors(loss_fn, PARAMS, {"x": x, "y": [y]}, torch.tensor(1.0))
    assert_same(got, thor_fx.factors(MEAN, PARAMS, *BATCH))


@pytest.mark.parametrize("name", ["0.weight", "layers.0.T", "a b", "class", "für", "_x", "self"])
def test_parameters_may_have_any_name(name):
    def loss_fn(p, x, y):
        return F.cross_entropy(x @ p[name].T, y)

    found = thor_fx.factors(loss_fn, {name: models.random(3, torch.float64, 3, 5)}, *BATCH)
    assert set(found) == {name}


def test_names_that_differ_in_punctuation_only():
    def loss_fn(p, x, y):
        return MEAN({"a": p["l.1"], "b": p["l_1"]}, x, y)

    found = thor_fx.factors(loss_fn, {"l.1": PARAMS["a"], "l_1": PARAMS["b"]}, *BATCH)
    expected = thor_fx.factors(MEAN, PARAMS, *BATCH)
    assert_same(found, {"l.1": expected["a"], "l_1": expected["b"]})


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"batch_size": 6.0}, TypeError),
        ({"batch_size": "6"}, TypeError),
        ({"batch_size": True}, TypeError),
        ({"batch_size": 0}, ValueError),
        ({"batch_size": -1}, ValueError),
        ({"loss_scale": "1"}, TypeError),
        ({"loss_scale": None}, TypeError),
        ({"loss_scale": True}, TypeError),
        ({"loss_scale": 0.0}, ValueError),
        ({"loss_scale": -2}, ValueError),
        ({"loss_scale": float("nan")}, ValueError),
        ({"loss_scale": float("inf")}, ValueError),
    ],
)
def test_a_wrong_option_is_named(options, error):
    with pytest.raises(error, match=f"^{next(iter(options))} must be"):
        thor_fx.factors(MEAN, PARAMS, *BATCH, **options)


def test_params_must_be_a_mapping():
    with pytest.raises(TypeError, match="params must be a mapping"):
        thor_fx.factors(MEAN, list(PARAMS.values()), *BATCH)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_params_must_be_floating_point(dtype):
    with pytest.raises(TypeError, match=r"params\['b'\] must be floating-point"):
        thor_fx.factors(MEAN, PARAMS | {"b": torch.ones(3, 4).to(dtype)}, *BATCH)


def test_params_must_not_be_empty():
    with pytest.raises(ValueError, match="no trainable tensor"):
        thor_fx.factors(MEAN, {}, *BATCH)


def test_the_loss_must_be_a_scalar():
    with pytest.raises(ValueError, match=r"scalar loss, got shape \(6,\)"):
        thor_fx.factors(classifier("none"), PARAMS, *BATCH)


def test_the_loss_must_depend_on_the_parameters():
    with pytest.raises(ValueError, match="does not depend on any of params"):
        thor_fx.factors(lambda p, x, y: x.sum(), PARAMS, *BATCH)
