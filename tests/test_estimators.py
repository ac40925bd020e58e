"""``fisher="exact"`` and ``"sampled"`` against dense curvature."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

import ggn
import oracle
import thor_fx
from thor_fx.factors import moments_of, run_graph
from thor_fx.passes import Factor, Terms, canonicalize, emit_factors, outputs, pipeline
from thor_fx.passes.layout import Rules
from thor_fx.passes.likelihoods import LikelihoodError

N, D, H, C = 5, 4, 6, 3


def data(*shape):
    return torch.randn(shape, dtype=torch.float64)


def seeded(make):
    torch.manual_seed(0)
    return make()


def mlp(tap, p, x):
    hidden = tap("w", x, x @ p["w"].T).tanh()
    return tap("v", hidden, hidden @ p["v"].T)


def mlp_params():
    return {"w": data(H, D) / 2, "v": data(C, H) / 2}


torch.manual_seed(1)
LABELS = torch.tensor([0, 2, 1, 1, 0])
IGNORING = torch.tensor([0, -100, 1, 2, -100])
SOFT = torch.rand(N, C, dtype=torch.float64)
TARGETS = data(N, C)
CLASS_WEIGHTS = torch.rand(C, dtype=torch.float64) + 0.5
X = data(N, D)


def means(z):
    return F.cross_entropy(z, LABELS)


LOSSES = {
    "indices": means,
    "ignore_index": lambda z: F.cross_entropy(z, IGNORING),
    "label_smoothing": lambda z: F.cross_entropy(z, LABELS, label_smoothing=0.2),
    "class_weights": lambda z: F.cross_entropy(z, LABELS, weight=CLASS_WEIGHTS),
    "soft_labels": lambda z: F.cross_entropy(z, SOFT / SOFT.sum(-1, keepdim=True)),
    "smoothed_weighted_ignoring": lambda z: F.cross_entropy(
        z, IGNORING, weight=CLASS_WEIGHTS, label_smoothing=0.1
    ),
    "nll_of_log_softmax": lambda z: F.nll_loss(F.log_softmax(z, -1), LABELS),
    "distillation": lambda z: F.kl_div(F.log_softmax(z, -1), SOFT.softmax(-1), reduction="batchmean"),
    "classes_first": lambda z: F.cross_entropy(z.T[None], LABELS[None]),
    "temperature": lambda z: F.cross_entropy(z / 3, LABELS),
    "by_hand": lambda z: -(F.log_softmax(z, -1) * SOFT.softmax(-1)).sum(-1).mean(),
    "bce": lambda z: F.binary_cross_entropy_with_logits(z, SOFT),
    "bce_sum": lambda z: F.binary_cross_entropy_with_logits(z, SOFT, reduction="sum") / N,
    "bce_temperature": lambda z: F.binary_cross_entropy_with_logits(z / 3, SOFT),
    "bce_weight": lambda z: F.binary_cross_entropy_with_logits(z, SOFT, weight=CLASS_WEIGHTS),
    "bce_pos_weight": lambda z: F.binary_cross_entropy_with_logits(z, SOFT, pos_weight=CLASS_WEIGHTS),
    "bce_both": lambda z: F.binary_cross_entropy_with_logits(
        2 * z, SOFT, weight=CLASS_WEIGHTS, pos_weight=CLASS_WEIGHTS + 1
    ),
    "bce_none": lambda z: (
        CLASS_WEIGHTS * F.binary_cross_entropy_with_logits(z, SOFT, reduction="none")
    ).mean(),
    "mse": lambda z: F.mse_loss(z, TARGETS),
    "mse_swapped": lambda z: F.mse_loss(TARGETS, z),
    "mse_sum": lambda z: F.mse_loss(z, TARGETS, reduction="sum") / N,
    "mse_none": lambda z: (CLASS_WEIGHTS * F.mse_loss(z, TARGETS, reduction="none")).mean(),
    "squares": lambda z: (z - TARGETS).square().mean(),
    "power": lambda z: ((TARGETS - z) ** 2).sum(-1).mean() / 2,
    "product": lambda z: ((d := z - TARGETS) * d).mean(),
    "scaled_output": lambda z: (3 * z - TARGETS).square().mean(),
    "no_target": lambda z: z.square().mean(),
    "masked_squares": lambda z: ((SOFT > 0.5) * (z - TARGETS)).square().sum() / 7,
    "chosen_squares": lambda z: torch.where(SOFT > 0.5, z - TARGETS, 0.0).pow(2).mean(),
    "one_output": lambda z: F.mse_loss(z[:, 0], TARGETS[:, 0]),
    "one_logit": lambda z: F.binary_cross_entropy_with_logits(z.sum(-1), SOFT[:, 0]),
    "two_heads": lambda z: (
        F.cross_entropy(z[:3], LABELS[:3]) * 0.6 + F.cross_entropy(z[3:], LABELS[3:]) * 0.4
    ),
    "mixed": lambda z: F.cross_entropy(z, LABELS) + 0.3 * F.mse_loss(z, TARGETS),
}


def ours(net, params, loss, *inputs, **options):
    return thor_fx.factors(lambda p, *x: loss(net(ggn.plain, p, *x)), params, *inputs, **options)


def assert_pairs(found, expected, tolerance=1e-10):
    assert found.keys() == expected.keys()
    for name, pair in expected.items():
        assert oracle.relative_error(found[name].A, pair.A) < tolerance, name
        assert oracle.relative_error(found[name].G, pair.G) < tolerance, name


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_exact_factors_are_those_of_the_dense_ggn(loss):
    params = seeded(mlp_params)
    assert_pairs(ours(mlp, params, loss, X, fisher="exact"), ggn.factors(mlp, params, loss, X))


@pytest.mark.parametrize("name", ["indices", "bce", "mse"])
def test_the_block_of_one_datum_is_the_dense_ggn(name):
    losses = {
        "indices": lambda z: F.cross_entropy(z, LABELS[:1]),
        "bce": lambda z: F.binary_cross_entropy_with_logits(z, SOFT[:1]),
        "mse": lambda z: F.mse_loss(z, TARGETS[:1]),
    }
    params = seeded(mlp_params)
    found = ours(mlp, params, losses[name], X[:1], fisher="exact")
    for layer, block in ggn.dense(mlp, params, losses[name], X[:1]).items():
        assert oracle.relative_error(oracle.kronecker(found[layer].G, found[layer].A), block) < 1e-10


@pytest.mark.parametrize("name", ["smoothed_weighted_ignoring", "bce_both", "mse_none", "two_heads", "mixed"])
def test_sampled_factors_are_exact_in_expectation(name):
    params, loss = seeded(mlp_params), LOSSES[name]
    exact = ours(mlp, params, loss, X, fisher="exact")
    mean, error = average_of_draws(mlp, params, loss, X)
    for layer, pair in exact.items():
        assert (mean[layer] - pair.G).abs().max() < 5 * error[layer].max(), layer
        assert error[layer].max() < 0.1 * pair.G.abs().max(), "enough draws to see a wrong factor"


def average_of_draws(net, params, loss, *inputs, draws=600, **options):
    """The mean of ``G`` over draws, and its standard error, by layer: the graph is traced once."""
    step = thor_fx.trace_step(lambda p, *x: loss(net(ggn.plain, p, *x)), params, *inputs)
    rules = Rules(fisher="sampled", **options)
    gm = pipeline.run(step, [canonicalize, partial(emit_factors, rules=rules)])
    found = {}
    torch.manual_seed(0)
    for _ in range(draws):
        results = run_graph(gm, params, *inputs)
        for layer, m in moments_of(results).items():
            found.setdefault(layer, []).append(m.cotangents / results[Terms()])
    stacks = {layer: torch.stack(values) for layer, values in found.items()}
    return {n: s.mean(0) for n, s in stacks.items()}, {n: s.std(0) / draws**0.5 for n, s in stacks.items()}


UNKNOWN = {
    "focal": lambda z: -((1 - z.softmax(-1)[:, 0]).square() * z.log_softmax(-1)[:, 0]).mean(),
    "root_of_squares": lambda z: (z - TARGETS).square().mean().sqrt(),
    "bilinear": lambda z: ((z - TARGETS) * z.roll(1, 0)).mean(),
    "gate": lambda z: ((z.sigmoid() - SOFT) * z.sin()).mean(),
    "squared_gate": lambda z: (z.sigmoid() * z.tanh()).mean(),
    "absolute": lambda z: (z - TARGETS).abs().mean(),
    "cubes": lambda z: (z - TARGETS).pow(3).mean(),
    "linear": lambda z: z.mean(),
    "entropy": lambda z: -(z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean(),
    "squared_cross_entropy": lambda z: F.cross_entropy(z, LABELS).square(),
    "weights_of_the_model": lambda z: (
        z.sum(-1).sigmoid() * F.cross_entropy(z, LABELS, reduction="none")
    ).mean(),
}


@pytest.mark.parametrize("loss", UNKNOWN.values(), ids=UNKNOWN)
def test_what_only_looks_like_a_likelihood_is_not_taken_for_one(loss):
    with pytest.raises(LikelihoodError, match="no likelihood is recognised in the loss"):
        ours(mlp, seeded(mlp_params), loss, X, fisher="sampled")


def test_an_unknown_loss_is_refused_with_what_it_looks_like():
    params = seeded(mlp_params)
    with pytest.raises(LikelihoodError, match=r"smooth_l1_loss <- .*pass likelihood="):
        ours(mlp, params, lambda z: F.smooth_l1_loss(z, TARGETS), X, fisher="sampled")


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_the_same_heads_are_found_in_a_decomposed_graph(loss):
    """As Inductor hands joint graphs to passes."""
    params = seeded(mlp_params)
    step = thor_fx.trace_step(lambda p, x: loss(mlp(ggn.plain, p, x)), params, X)
    table = select_decomp_table()
    gm = make_fx(step, decomposition_table=table)(*params.values(), X)
    outputs.describe(gm, list(outputs.input_nodes(step))[:3], list(outputs.output_nodes(step)))
    emit = partial(emit_factors, rules=Rules(fisher="exact"), decompositions=table)
    gm = pipeline.run(gm, [canonicalize, emit])
    results = run_graph(gm, params, X)
    scale = 1 / results[Terms()]
    for layer, pair in ggn.factors(mlp, params, loss, X).items():
        assert oracle.relative_error(scale * results[Factor(layer, "G")], pair.G) < 1e-10, layer
