"""The factors that a graph returns, and that nothing else has changed."""

from functools import partial

import pytest
import torch

import models
import oracle
from graphs import added, joint_graph, plain_graph, step_graph, values
from thor_fx.passes import (
    Factor,
    Rows,
    SiteReport,
    Terms,
    canonicalize,
    drop_factors,
    emit_factors,
    find_sites,
    outputs,
    run,
)

BUILDS = pytest.mark.parametrize("build", models.BUILDERS, ids=lambda build: build.__name__)


def new_outputs(gm, before):
    known = outputs.output_nodes(before)
    return [descriptor for descriptor in outputs.output_nodes(gm) if descriptor not in known]


def golden(build):
    before = run(step_graph(build), [canonicalize])
    return added(run(before, [emit_factors]), before)


def test_what_is_added_for_a_linear_layer():
    """``n`` and ``R``, then ``g^T g`` and ``x^T x``: whatever is inserted last comes first."""
    assert golden(models.f_linear) == [
        "full_1 = aten.full.default([], 6, dtype=torch.float64, device=cpu, pin_memory=False)",
        "full = aten.full.default([], 6, dtype=torch.float64, device=cpu, pin_memory=False)",
        "transpose_1 = aten.transpose.int(mul_1, -2, -1)",
        "mm_2 = aten.mm.default(transpose_1, mul_1)",
        "transpose = aten.transpose.int(x2_input, -2, -1)",
        "mm_1 = aten.mm.default(transpose, x2_input)",
    ]


def test_what_is_added_for_a_weight_that_is_used_twice():
    lines = [line for line in golden(models.twice) if line.startswith(("add", "cat"))]
    assert lines == [
        "add_1 = aten.add.Tensor(full, full_1)",
        "cat_1 = aten.cat.default([tanh_backward, tanh_backward_1])",
        "cat = aten.cat.default([tanh, x2_input])",
    ]


@BUILDS
def test_loss_gradients_and_outputs_are_bitwise_the_same(build):
    case, before = build(), step_graph(build)
    plain, factor = values(before, case), values(run(before, [emit_factors]), case)
    assert all(torch.equal(factor[descriptor], plain[descriptor]) for descriptor in plain)


@BUILDS
def test_without_its_factors_the_graph_is_what_it_was(build):
    for passes in [], [canonicalize]:
        before = run(step_graph(build), passes)
        after = run(before, [emit_factors, drop_factors])
        assert str(after.graph) == str(before.graph)
        assert list(outputs.output_nodes(after)) == list(outputs.output_nodes(before))


@BUILDS
def test_sums_equal_the_oracle(build):
    assert_sums(step_graph(build), build())


@pytest.mark.parametrize("build", [models.mlp, models.convolution, models.batch_norm, models.checkpointed])
def test_sums_of_a_graph_that_was_described_by_hand(build):
    assert_sums(plain_graph(build), build())


def assert_sums(gm, case):
    results = values(run(gm, [emit_factors]), case)
    torch.manual_seed(0)
    uses = oracle.uses(case)
    assert {d.layer for d in results if isinstance(d, Rows)} == set(uses)
    for layer, found in uses.items():
        pair = oracle.pair(found, n=1)
        assert results[Rows(layer)] == pair.rows
        inputs = results[Factor(layer, "A")]
        assert oracle.relative_error(inputs, oracle.kept(pair.A * pair.rows, inputs)) < 1e-10
        assert oracle.relative_error(results[Factor(layer, "G")], pair.G) < 1e-10
    if case.nearest is not None:
        assert results[Terms()] == case.terms


@BUILDS
def test_loss_and_gradients_equal_the_oracle(build):
    """The hand-written forward of a case and its loss function are the same function."""
    case = build()
    results = values(step_graph(build), case)
    torch.manual_seed(0)
    loss, gradients = oracle.loss_and_gradients(case)
    assert oracle.relative_error(results[outputs.Loss()], loss) < 1e-12
    found = {d.param: value for d, value in results.items() if isinstance(d, outputs.Grad)}
    assert set(found) == set(gradients)
    assert all(oracle.relative_error(found[name], gradients[name]) < 1e-10 for name in found)


@BUILDS
def test_joint_graphs_return_the_same_statistics(build):
    flat, joint = step_graph(build), joint_graph(build)
    assert new_outputs(run(joint, [emit_factors]), joint) == new_outputs(run(flat, [emit_factors]), flat)


def test_new_outputs_come_last_in_order_of_the_layers():
    before = step_graph(models.mlp)
    after = run(before, [emit_factors])
    known = list(outputs.output_nodes(before))
    assert list(outputs.output_nodes(after))[: len(known)] == known
    assert new_outputs(after, before) == [
        Factor("0.weight", "A"),
        Factor("0.weight", "G"),
        Rows("0.weight"),
        Factor("2.weight", "A"),
        Factor("2.weight", "G"),
        Rows("2.weight"),
        Terms(),
    ]


def test_a_graph_without_layers_is_left_alone():
    before = step_graph(models.no_layer)
    assert str(run(before, [emit_factors]).graph) == str(before.graph)


def test_factors_are_refused_a_second_time():
    gm = step_graph(models.linear)
    emit_factors(gm)
    with pytest.raises(ValueError, match="already returns Factor"):
        emit_factors(gm)


def test_a_report_that_is_known_is_used():
    gm = step_graph(models.mlp)
    report = find_sites(gm)
    emit_factors(gm, report=SiteReport(report.sites[1:], (), {}, nearest=report.sites[1]))
    names = {d.layer for d in outputs.output_nodes(gm) if isinstance(d, Factor)}
    assert names == {"2.weight"}


def test_a_decomposition_table_reaches_what_is_inserted():
    aten = torch.ops.aten
    table = {aten.t.default: lambda x: aten.permute.default(x, [1, 0])}
    before = run(step_graph(models.linear), [canonicalize])
    lines = added(run(before, [partial(emit_factors, decompositions=table)]), before)
    assert not [line for line in lines if "aten.t." in line]


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_sums_are_kept_in_at_least_float32(dtype, expected):
    results = values(run(step_graph(models.mlp, dtype), [emit_factors]), models.mlp(dtype))
    statistics = [v for d, v in results.items() if isinstance(d, Factor | Rows | Terms)]
    assert {value.dtype for value in statistics} == {expected}


def test_bfloat16_rows_are_widened_before_they_are_summed():
    case = models.f_linear(torch.bfloat16)
    results = values(run(step_graph(models.f_linear, torch.bfloat16), [emit_factors]), case)
    x = case.batch[0].double()
    assert oracle.relative_error(results[Factor("w", "A")].double(), x.T @ x) < 1e-6


def test_a_graph_traced_with_real_tensors():
    """``make_fx`` gives every value a fake mode of its own."""
    case = models.twice()
    results = values(run(plain_graph(models.twice, tracing_mode="real"), [emit_factors]), case)
    pair = oracle.pair(oracle.uses(case)["same.weight"], n=1)
    assert oracle.relative_error(results[Factor("same.weight", "G")], pair.G) < 1e-10
