"""What ``resample`` adds to a graph, what it leaves alone; and the reports on estimators."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

import ggn
import oracle
import thor_fx
from nets import (
    LABELS,
    T,
    X,
    assert_pairs,
    bce,
    cross_entropy,
    exact,
    mse,
    pooled,
    pooled_params,
    seeded,
    tokens,
    tokens_params,
)
from thor_fx.passes import Factor, canonicalize, drop_factors, emit_factors, outputs, pipeline
from thor_fx.passes.layout import Rules

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
