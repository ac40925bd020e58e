"""``G_d^-1 (dL/dW) A_d^-1`` against dense solves."""

import dataclasses
import math

import pytest
import torch

import models
import oracle
from graphs import step_graph, values
from thor_fx.factors import Moments, factor_pair, moments_of
from thor_fx.layers import coverage
from thor_fx.passes import Grad, Terms, canonicalize, emit_factors, find_sites, run
from thor_fx.precondition import precondition
from thor_fx.schedule import Schedule
from thor_fx.transform import Signals

LAMBDA = 0.07
MATRICES = [  # every layer is a whole parameter of two axes
    models.linear,
    models.x_at_w,
    models.one_datum,
    models.three_axes,
    models.mlp,
    models.pooled,
    models.twice,
    models.tied,
    models.both_ways,
    models.fused_qkv,
    models.layer_norm,
    models.embedding,
]
RULES = ["factor", "sqrt", "pi", "relative"]


class Run:
    """One factor step of a case: gradients, coverage, and what the update is told."""

    def __init__(self, build, dtype=torch.float64):
        self.case = build(dtype)
        graph = run(step_graph(build, dtype), [canonicalize, emit_factors])
        results = values(graph, self.case)
        self.params = {name: p.detach() for name, p in self.case.params.items()}
        self.gradients = {d.param: v for d, v in results.items() if isinstance(d, Grad)}
        self.coverage = coverage(find_sites(graph))
        self.moments, self.terms = moments_of(results), results.get(Terms())

    def signals(self, damping=LAMBDA, factors=True, moments=None) -> Signals:
        hyper = {"damping": torch.tensor(damping, dtype=torch.float64)}
        if not factors:
            return Signals(self.coverage, hyper)
        return Signals(self.coverage, hyper, moments or self.moments, self.terms)

    def update(self, tx, state=None, gradients=None, **signals):
        state = tx.init(self.params, self.coverage) if state is None else state
        return tx.update(gradients or self.gradients, state, self.params, self.signals(**signals))


def thor(**options):
    return precondition(Schedule("damping", LAMBDA), **options)


def dampings(rule, A, G) -> tuple[float, float]:
    """The damping of ``A`` and of ``G``, as documented."""
    if rule == "factor":
        return LAMBDA, LAMBDA
    if rule == "sqrt":
        return LAMBDA**0.5, LAMBDA**0.5
    if rule == "relative":
        return LAMBDA * A.trace().item() / len(A), LAMBDA * G.trace().item() / len(G)
    pi = math.sqrt((A.trace().item() / len(A)) / (G.trace().item() / len(G)))
    return pi * LAMBDA**0.5, LAMBDA**0.5 / pi


def block_diagonal(matrix, block_size):
    if block_size is None:
        return matrix
    block = torch.arange(len(matrix)) // block_size
    return matrix * (block[:, None] == block[None, :])


def expected_update(case, gradients, layer, rule="factor", block_size=None, loss_scale=1.0):
    """Row-by-row factors, dense Kronecker product, dense solve."""
    pair = oracle.factors(case)[layer]
    damp_a, damp_g = dampings(rule, pair.A, pair.G)
    A, G = block_diagonal(pair.A, block_size), block_diagonal(pair.G, block_size)
    gradient = gradients[layer]
    if gradient.shape == case.layers[layer]:
        return oracle.natural_step(A, G, gradient, damp_a, damp_g)
    return oracle.natural_step(A, G, gradient.T, damp_a, damp_g).T  # stored as (in, out)


# --- against dense solves --------------------------------------------------------------------------


@pytest.mark.parametrize("build", MATRICES, ids=lambda build: build.__name__)
@pytest.mark.parametrize("rule", RULES)
def test_the_update_is_a_dense_solve(build, rule):
    step = Run(build)
    updates, state = step.update(thor(damping_rule=rule))
    assert state.failures == 0
    _, gradients = oracle.loss_and_gradients(step.case)
    for layer in step.case.layers:
        expected = expected_update(step.case, gradients, layer, rule)
        assert updates[layer].shape == step.params[layer].shape
        assert oracle.relative_error(updates[layer], expected) < 1e-9


@pytest.mark.parametrize("build", [models.mlp, models.x_at_w, models.fused_qkv, models.twice])
@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 5, 128])
@pytest.mark.parametrize("rule", RULES)
def test_blocks_are_those_of_the_factors(build, block_size, rule):
    step = Run(build)
    updates, _ = step.update(thor(damping_rule=rule, block_size=block_size))
    for layer in step.case.layers:
        expected = expected_update(step.case, step.gradients, layer, rule, block_size)
        assert oracle.relative_error(updates[layer], expected) < 1e-9


@pytest.mark.parametrize("build", [models.slices, models.cross_attention, models.three_inputs_attention])
def test_layers_inside_one_parameter(build):
    step = Run(build)
    updates, _ = step.update(thor())
    pairs = oracle.factors(step.case)
    for layer, pair in pairs.items():
        name, _, part = layer.partition("[")
        start, _, stop = part.rstrip("]").partition(":")
        rows = slice(int(start), int(stop)) if part else slice(None)
        expected = oracle.natural_step(pair.A, pair.G, step.gradients[name][rows], LAMBDA, LAMBDA)
        assert oracle.relative_error(updates[name][rows], expected) < 1e-9


def test_a_weight_of_three_axes():
    step = Run(models.einsum_heads)
    updates, _ = step.update(thor())
    pair = oracle.factors(step.case)["w"]
    gradient = step.gradients["w"].flatten(1).T  # (heads x size, in)
    expected = oracle.natural_step(pair.A, pair.G, gradient, LAMBDA, LAMBDA).T.view(4, 2, 3)
    assert oracle.relative_error(updates["w"], expected) < 1e-9


def test_float32_parameters():
    wide, step = Run(models.mlp), Run(models.mlp, torch.float32)
    expected, _ = wide.update(thor())
    updates, _ = step.update(thor())
    for layer in step.case.layers:
        assert updates[layer].dtype == torch.float32
        assert oracle.relative_error(updates[layer].double(), expected[layer]) < 1e-3


def test_bfloat16_parameters_are_worked_on_in_float32():
    step = Run(models.mlp, torch.bfloat16)
    updates, state = step.update(thor())
    assert {u.dtype for u in updates.values()} == {torch.bfloat16}
    parts = [part for pair in state.inverses.values() for side in pair for part in side]
    assert {part.dtype for part in parts} == {torch.float32}


# --- where the Kronecker product is the Fisher matrix ------------------------------------------------


def on(case, batch):
    """A case on another batch."""
    other = dataclasses.replace(case, batch=batch, terms=len(batch[0]))
    return Run(lambda dtype: other)


def test_for_one_datum_the_factors_are_the_fisher_block_of_every_layer():
    """A single example in a nonlinear network: ``vec(g) vec(g)^T`` is a Kronecker product."""
    case = models.mlp()
    one = tuple(t[:1] for t in case.batch)
    step = on(case, one)
    updates, _ = step.update(thor(block_size=None))
    per_example = oracle.per_example_gradients(case.loss_fn, case.params, *one)
    for layer, gradient in ((layer, step.gradients[layer]) for layer in case.layers):
        fisher = oracle.empirical_fisher(per_example[layer])
        A, G = factor_pair(step.moments, step.coverage.layers[layer], step.terms)
        assert oracle.relative_error(oracle.kronecker(G, A), fisher) < 1e-10
        # damping the factors adds a diagonal and two cross terms to the Fisher matrix
        eye_a, eye_g = torch.eye(len(A), dtype=A.dtype), torch.eye(len(G), dtype=G.dtype)
        cross = LAMBDA * (oracle.kronecker(G, eye_a) + oracle.kronecker(eye_g, A))
        damped = fisher + cross + LAMBDA**2 * torch.eye(len(fisher), dtype=A.dtype)
        expected = torch.linalg.solve(damped, gradient.flatten()).view_as(gradient)
        assert oracle.relative_error(updates[layer], expected) < 1e-9


def test_where_gradients_do_not_vary_the_update_is_a_fisher_solve():
    """``s`` enters the loss linearly with one output: ``F = G (x) A`` exactly, and invertible."""
    params = models.weights(torch.float64, w=(1, 4))
    x = models.random(1, torch.float64, 9, 4)

    def loss_fn(p, x):
        return 1.7 * (x @ p["w"].T).mean()

    def build(dtype=torch.float64):
        return models.Case("affine", loss_fn, loss_fn, params, (x,), {"w": (1, 4)}, 9, nearest="w")

    step = Run(build)
    updates, _ = step.update(thor(), damping=0.0)
    F = oracle.empirical_fisher(oracle.per_example_gradients(loss_fn, params, x)["w"])
    expected = torch.linalg.solve(F, step.gradients["w"].flatten()).view(1, 4)
    assert oracle.relative_error(updates["w"], expected) < 1e-9


# --- what has no factors ----------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_normalisation_parameters_take_the_elementwise_rule(rule):
    step = Run(models.layer_norm)
    updates, _ = step.update(thor(damping_rule=rule, loss_scale=2.0))
    d = LAMBDA if rule in {"factor", "relative"} else LAMBDA**0.5
    for name in ("norm.weight", "norm.bias"):
        g = step.gradients[name] / 2
        expected = torch.tensor([x.item() / (x.item() ** 2 / 6 + d) for x in g], dtype=g.dtype)
        torch.testing.assert_close(updates[name], expected, rtol=1e-12, atol=1e-14)


def test_normalisation_parameters_take_the_gradient_of_every_step():
    step, tx = Run(models.rms_norm), thor()
    _, state = step.update(tx)
    other = {name: 3 * g for name, g in step.gradients.items()}
    updates, _ = step.update(tx, state, other, factors=False)
    g = other["norm.weight"]
    torch.testing.assert_close(updates["norm.weight"], g / (g**2 / 6 + LAMBDA), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("loss_scale", [1.0, 4.0])
def test_everything_else_keeps_its_gradient(loss_scale):
    for build in (models.mlp, models.batch_norm, models.embedding, models.convolution):
        step = Run(build)
        updates, _ = step.update(thor(loss_scale=loss_scale))
        for name in step.coverage.fallback:
            assert torch.equal(updates[name], step.gradients[name] / loss_scale)


# --- invariances and options -------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_the_loss_scale_cancels(rule):
    step = Run(models.layer_norm)
    expected, _ = step.update(thor(damping_rule=rule))
    scaled = {name: 64 * g for name, g in step.gradients.items()}
    moments = {k: Moments(m.activations, m.cotangents * 64**2, m.rows) for k, m in step.moments.items()}
    got, _ = step.update(thor(damping_rule=rule, loss_scale=64.0), None, scaled, moments=moments)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-10, atol=1e-13)


def test_batch_size_replaces_the_terms_of_the_graph():
    step = Run(models.layer_norm)
    updates, state = step.update(thor(batch_size=24))
    assert state.terms == 24
    _, gradients = oracle.loss_and_gradients(step.case)
    for layer in step.case.layers:
        pair = oracle.factors(step.case, n=24)[layer]
        expected = oracle.natural_step(pair.A, pair.G, gradients[layer], LAMBDA, LAMBDA)
        assert oracle.relative_error(updates[layer], expected) < 1e-9
    g = step.gradients["norm.weight"]
    torch.testing.assert_close(updates["norm.weight"], g / (g**2 / 24 + LAMBDA), rtol=1e-12, atol=1e-14)


def test_terms_are_read_off_the_graph():
    for build in (models.mlp, models.three_axes, models.pooled):
        step = Run(build)
        assert step.update(thor())[1].terms == step.case.terms


# --- between factor steps ----------------------------------------------------------------------------


def test_a_plain_step_uses_the_stored_inverses():
    step, tx = Run(models.mlp), thor()
    first, state = step.update(tx)
    doubled = {name: 2 * g for name, g in step.gradients.items()}
    second, after = step.update(tx, state, doubled, factors=False, damping=123.0)
    for layer in step.case.layers:
        torch.testing.assert_close(second[layer], 2 * first[layer], rtol=1e-12, atol=1e-14)
    assert after is state


def test_a_layer_that_never_had_an_inverse_stays_where_it_is():
    step = Run(models.mlp)
    updates, state = step.update(thor(), factors=False)
    assert not any(updates[layer].any() for layer in step.case.layers)
    assert torch.equal(updates["0.bias"], step.gradients["0.bias"])
    assert state.failures == 0


def test_every_factor_step_renews_the_inverses():
    step, tx = Run(models.mlp), thor()
    _, state = step.update(tx)
    updates, _ = step.update(tx, state, damping=10.0)
    expected, _ = step.update(tx, damping=10.0)
    assert all(torch.equal(updates[name], expected[name]) for name in expected)


@pytest.mark.parametrize("side", ["activations", "cotangents"])
def test_a_bad_factor_keeps_the_last_inverse_and_is_counted(side):
    step, tx = Run(models.mlp), thor()
    good, state = step.update(tx)
    spoiled = step.moments["0.weight"]._replace(**{side: getattr(step.moments["0.weight"], side) * math.nan})
    updates, after = step.update(tx, state, moments={**step.moments, "0.weight": spoiled})
    assert after.failures == 1
    assert all(torch.equal(updates[name], good[name]) for name in good)
    updates, after = step.update(tx, after)
    assert after.failures == 1
    assert all(torch.equal(updates[name], good[name]) for name in good)


def test_only_the_bad_block_keeps_its_inverse():
    step, tx = Run(models.mlp), thor(block_size=2)
    _, state = step.update(tx, damping=1.0)
    moments = step.moments["0.weight"]  # (5, 5): blocks of 2, 2 and 1
    bad = moments.activations.clone()
    bad[0, 0] = math.inf
    moments = {**step.moments, "0.weight": moments._replace(activations=bad)}
    _, after = step.update(tx, state, moments=moments)
    clean = step.update(tx)[1]
    assert after.failures == 1
    old, new, expected = (s.inverses["4x5 float64"].input[0] for s in (state, after, clean))
    assert torch.equal(new[0, 0], old[0, 0])
    assert torch.equal(new[0, 1], expected[0, 1])


def test_a_dead_side_does_not_break_the_pi_rule():
    """No gradient reaches a layer: ``tr G = 0``."""
    step = Run(models.mlp)
    dead = step.moments["0.weight"]._replace(cotangents=torch.zeros_like(step.moments["0.weight"].cotangents))
    updates, state = step.update(thor(damping_rule="pi"), moments={**step.moments, "0.weight": dead})
    assert state.failures == 0
    assert all(u.isfinite().all() for u in updates.values())


def test_a_singular_factor_without_damping_is_a_failure_and_no_error():
    """A feature that is always zero: ``A`` has a zero on its diagonal."""
    step = Run(models.mlp)
    dead = step.moments["0.weight"].activations.clone()
    dead[3, :] = dead[:, 3] = 0
    moments = {**step.moments, "0.weight": step.moments["0.weight"]._replace(activations=dead)}
    updates, state = step.update(thor(), moments=moments, damping=0.0)
    assert state.failures >= 1
    assert all(u.isfinite().all() for u in updates.values())


def test_a_step_may_have_gradients_for_some_layers_only():
    step, tx = Run(models.mlp), thor()
    _, state = step.update(tx)
    some = {"0.weight": step.gradients["0.weight"], "0.bias": step.gradients["0.bias"]}
    updates, _ = step.update(tx, state, some, factors=False)
    full, _ = step.update(tx, state, factors=False)
    assert set(updates) == set(some)
    assert all(torch.equal(updates[name], full[name]) for name in some)


@pytest.mark.parametrize("present", [["same.weight"], ["head.weight"], []])
def test_a_step_may_measure_some_layers_only(present):
    step, tx = Run(models.twice), thor()
    _, state = step.update(tx, damping=1.0)
    moments = {name: step.moments[name] for name in present}
    signals = Signals(step.coverage, step.signals().hyper, moments, step.terms)
    updates, after = tx.update(step.gradients, state, step.params, signals)
    renewed, kept = step.update(tx)[0], step.update(tx, state, factors=False)[0]
    assert after.failures == 0
    for layer in step.case.layers:
        expected = renewed if layer in present else kept
        assert torch.equal(updates[layer], expected[layer])


def test_layers_of_one_shape_are_renewed_one_by_one():
    """Four layers of one shape, two of them measured, one of them with a gradient."""
    step, tx = Run(models.three_inputs_attention), thor()
    _, state = step.update(tx, damping=1.0)
    present = ["in_proj_weight[4:8]", "out_proj.weight"]
    signals = Signals(step.coverage, step.signals().hyper, {k: step.moments[k] for k in present}, step.terms)
    renewed, kept = step.update(tx)[0], step.update(tx, state, factors=False)[0]
    updates, after = tx.update(step.gradients, state, step.params, signals)
    assert torch.equal(updates["in_proj_weight"][4:8], renewed["in_proj_weight"][4:8])
    assert torch.equal(updates["in_proj_weight"][:4], kept["in_proj_weight"][:4])
    assert torch.equal(updates["in_proj_weight"][8:], kept["in_proj_weight"][8:])
    assert torch.equal(updates["out_proj.weight"], renewed["out_proj.weight"])
    some = {"out_proj.weight": step.gradients["out_proj.weight"]}
    alone, _ = step.update(tx, after, some, factors=False)
    assert set(alone) == set(some)
    torch.testing.assert_close(alone["out_proj.weight"], renewed["out_proj.weight"], rtol=1e-12, atol=1e-14)


def test_layers_of_one_shape_share_a_batch():
    step, tx = Run(models.checkpointed), thor()
    assert set(tx.init(step.params, step.coverage).inverses) == {
        "5x4 float64",
        "2x5 float64",
        "3x2 float64",
    }
    same = Run(models.both_ways)
    assert all(len(pair.input[0]) == 1 for pair in tx.init(same.params, same.coverage).inverses.values())
    attention = Run(models.three_inputs_attention)
    (pair,) = tx.init(attention.params, attention.coverage).inverses.values()
    assert pair.input[0].shape == (4, 1, 4, 4)


def test_the_update_is_pure():
    step, tx = Run(models.layer_norm), thor()
    state = tx.init(step.params, step.coverage)
    gradients = {name: g.clone() for name, g in step.gradients.items()}
    first, _ = step.update(tx, state)
    second, _ = step.update(tx, state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(step.gradients[name], gradients[name]) for name in gradients)


def test_frequency_and_schedule_are_those_that_were_given():
    tx = thor(frequency=7)
    assert tx.frequency == 7
    assert tx.hyper(0) == {"damping": LAMBDA}
