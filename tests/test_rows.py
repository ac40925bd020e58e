"""``rows`` and ``factor_dtype``: factors from every k-th row, and from rounded rows."""

import functools

import pytest
import torch
from torch import nn

import models
import thor_fx
from graphs import step_graph
from models import random
from thor_fx.passes import Factor, Rows, Terms, emit_factors, outputs, run
from thor_fx.passes.layout import WHOLE_ROWS, Rules
from training import assert_moved, assert_same, batches, build, by_both_doors, mlp, snapshot

SETTINGS = {"lr": 0.05, "damping": 0.1, "momentum": 0.9, "frequency": 2}
DATUM_BY_DATUM = [models.mlp, models.three_axes, models.convolution, models.embedding, models.layer_norm]
RULES = [Rules(), Rules(bias="joint"), Rules(block_size=2), Rules(max_dim=2, long_side="diagonal")]


def sums_of(gm, case, roll=0):
    """What a factor step returns for a batch whose data are rolled."""
    args = [*case.params.values(), *(x.roll(roll, 0) for x in case.batch)]
    with torch.no_grad():
        found = dict(zip(outputs.output_nodes(gm), torch.fx.Interpreter(gm).run(*args), strict=True))
    return {d: value for d, value in found.items() if isinstance(d, Factor | Rows | Terms)}


def emitted(make, rules):
    return run(step_graph(make), [functools.partial(emit_factors, rules=rules)])


@pytest.mark.parametrize("make", DATUM_BY_DATUM)
@pytest.mark.parametrize("rules", RULES, ids=["dense", "joint", "blocks", "diagonal"])
@pytest.mark.parametrize("k", [2, 3])
def test_the_mean_over_all_orders_of_the_data_is_the_factor(make, rules, k):
    """Every datum is measured as often as every other when the batch is rolled once around."""
    case = make()
    whole = sums_of(emitted(make, rules), case)
    part = emitted(make, Rules(**{**vars(rules), "every": k}))
    rolled = [sums_of(part, case, roll) for roll in range(len(case.batch[0]))]
    changed = 0
    for descriptor, value in whole.items():
        mean = torch.stack([sums[descriptor] for sums in rolled]).mean(0)
        assert torch.allclose(mean, value, rtol=1e-10, atol=1e-12), descriptor
        changed += not torch.allclose(rolled[0][descriptor], value)
    assert changed >= 2


def test_every_kth_row_is_measured_and_no_other():
    case = models.f_linear()
    found = sums_of(emitted(models.f_linear, Rules(every=4)), case)
    x = case.batch[0]
    (layer,) = case.layers
    kept = x[::4]
    expected = kept.T @ kept * (len(x) / len(kept))
    assert torch.allclose(found[Factor(layer, "A")], expected, rtol=1e-12)
    assert found[Rows(layer)] == len(x)
    assert found[Terms()] == case.terms


def test_more_rows_than_there_are_leave_one():
    found = sums_of(emitted(models.f_linear, Rules(every=1000)), models.f_linear())
    assert all(torch.linalg.matrix_rank(v) == 1 for d, v in found.items() if isinstance(d, Factor))


def test_rows_that_cannot_be_left_out_are_all_measured_and_that_is_told():
    """Every row takes the matrix of its expert: which rows a matrix has is up to the data."""
    w, x = random(1, torch.float64, 3, 5, 4), random(2, torch.float64, 8, 4)
    expert = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0])

    def loss_fn(p, x, expert):
        return torch.einsum("ri,roi->ro", x, p["w"][expert]).sin().sum(-1).mean()

    tx = thor_fx.thor(**SETTINGS, rows=0.5)
    (layer,) = thor_fx.explain(loss_fn, {"w": w}, x, expert, tx=tx).coverage.layers.values()
    assert WHOLE_ROWS in layer.notes
    gm = thor_fx.trace_step(loss_fn, {"w": w}, x, expert)
    found = []
    for k in (1, 2):
        part = run(gm, [functools.partial(emit_factors, rules=Rules(every=k))])
        results = torch.fx.Interpreter(part).run(w, x, expert)
        found.append(dict(zip(outputs.output_nodes(part), results, strict=True)))
    assert torch.equal(found[0][Factor(layer.name, "A")], found[1][Factor(layer.name, "A")])


@pytest.mark.parametrize(
    "settings",
    [
        {"rows": 0.5},
        {"rows": 1 / 3, "bias": "joint", "factor_decay": 0.9},
        {"rows": 0.5, "fisher": "exact", "likelihood": "categorical"},
        {"rows": 0.5, "inverse": "eva"},
        {"rows": 0.5, "sharing": "reduce", "block_size": 3},
    ],
    ids=["half", "averages", "exact", "eva", "reduce"],
)
def test_both_doors_measure_the_same_rows(settings):
    start = snapshot(dict(build(mlp).named_parameters()))
    trajectory = by_both_doors(lambda: build(mlp), batches(5), **SETTINGS, **settings)
    assert_moved(trajectory, start)
    others = {name: value for name, value in settings.items() if name != "rows"}
    whole = by_both_doors(lambda: build(mlp), batches(5), **SETTINGS, **others)
    with pytest.raises(AssertionError):
        assert_same(trajectory, whole, rtol=1e-3)


def test_a_batch_of_any_size_is_measured_by_one_graph():
    model = thor_fx.compile(build(mlp), backend="aot_eager", dynamic=True)
    optimizer = thor_fx.Thor(model, **{**SETTINGS, "frequency": 1}, rows=0.5)
    for rows in (7, 8, 9, 5):
        ((x, y),) = batches(1, rows)
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.metrics()["skipped_steps"] == 0


def single() -> nn.Module:
    return build(mlp, torch.float32)


def test_rounded_rows_change_the_factors_and_little_else():
    data = batches(6, dtype=torch.float32)
    exact = by_both_doors(single, data, rtol=1e-4, **SETTINGS)
    rounded = by_both_doors(single, data, rtol=1e-4, **SETTINGS, factor_dtype=torch.bfloat16)
    assert_same(rounded, exact, rtol=2e-2)
    with pytest.raises(AssertionError):
        assert_same(rounded, exact, rtol=1e-5)


def test_rounded_rows_of_every_kind_of_layer():
    rules = Rules(every=2, dtype=torch.bfloat16)
    for make in (models.convolution, models.embedding, models.experts, models.three_axes):
        case = make(torch.float32)
        gm = thor_fx.trace_step(case.loss_fn, case.params, *case.batch)
        whole = sums_of(run(gm, [functools.partial(emit_factors, rules=Rules(every=2))]), case)
        found = sums_of(run(gm, [functools.partial(emit_factors, rules=rules)]), case)
        for descriptor, value in whole.items():
            assert found[descriptor].dtype == value.dtype
            assert (found[descriptor] - value).norm() <= 2e-2 * value.norm(), descriptor


def test_a_share_that_is_no_whole_fraction_is_refused():
    with pytest.raises(ValueError, match=r"rows must be 1 / k for a whole k, as 1, 0.5 or 0.25"):
        thor_fx.thor(**SETTINGS, rows=0.3)
