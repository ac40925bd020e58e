"""Without any optimisation the results are the same through both doors, and the graph shows it."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import thor_fx
from thor_fx.passes import Factor, canonicalize, emit_factors, outputs, run
from thor_fx.passes.layout import Rules
from thor_fx.passes.switches import OPTIMISATIONS, is_on, without
from training import Attention, assert_moved, assert_same, batches, build, mlp, snapshot, train

SETTINGS: dict[str, Any] = {"lr": 0.02, "damping": 0.1, "momentum": 0.9, "frequency": 2, "factor_decay": 0.9}


def cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 1, 5)), nn.Upsample(size=(8, 8)), nn.Conv2d(1, 3, 3, padding=1), nn.Tanh()),
        *(nn.Conv2d(3, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(192, 3)),
    )


MODELS = {"mlp": mlp, "cnn": cnn, "attention": Attention}
EVERY_MODEL = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def by_drop_in(make, disabled):
    model = thor_fx.compile(build(make), backend="aot_eager", disable_passes=disabled)
    return train(model, thor_fx.Thor(model, **SETTINGS), batches(3))


def by_function(make, disabled):
    model = build(make)

    def loss_fn(params, x, y):
        return F.cross_entropy(functional_call(model, params, (x,)), y)

    tx = thor_fx.thor(**SETTINGS)
    step = thor_fx.compile_step(loss_fn, tx, backend="aot_eager", disable_passes=disabled)
    params = snapshot(dict(model.named_parameters()))
    state, trajectory = step.init(params, *batches(1)[0]), []
    for batch in batches(3):
        params, state, _ = step(params, state, *batch)
        trajectory.append(snapshot(params))
    return trajectory


@EVERY_MODEL
def test_everything_disabled_trains_the_same(make):
    expected = by_function(make, [])
    assert_moved(expected, snapshot(dict(build(make).named_parameters())))
    assert_same(by_function(make, list(OPTIMISATIONS)), expected, rtol=1e-10)
    assert_same(by_drop_in(make, list(OPTIMISATIONS)), expected, rtol=1e-10)


def emitted(loss_fn, params, *batch, disabled=()):
    step = thor_fx.trace_step(loss_fn, params, *batch)
    return run(step, [canonicalize, partial(emit_factors, rules=Rules(disabled=disabled))])


def operators(gm, name):
    return [node for node in gm.graph.nodes if str(node.target).startswith(name)]


def factors_of(gm, *arguments):
    with torch.no_grad():
        results = gm(*arguments)
    return {d: v for d, v in zip(outputs.output_nodes(gm), results, strict=True) if isinstance(d, Factor)}


def compare(loss_fn, params, *batch, disabled):
    """Both graphs, which compute the same factors."""
    graphs = [emitted(loss_fn, params, *batch, disabled=off) for off in ((), (disabled,))]
    one, other = (factors_of(gm, *params.values(), *batch) for gm in graphs)
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, rtol=1e-10, atol=1e-12)
    return graphs


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_without_shared_inputs_every_layer_has_a_product_of_its_own():
    def loss_fn(params, x):
        return ((x @ params["gate"]).sigmoid() * (x @ params["rise"])).square().mean()

    params = {"gate": normal(4, 3), "rise": normal(4, 3)}
    shared, apart = compare(loss_fn, params, normal(6, 4), disabled="shared_inputs")
    first, second = (outputs.output_nodes(shared)[Factor(name, "A")] for name in params)
    assert first is second
    first, second = (outputs.output_nodes(apart)[Factor(name, "A")] for name in params)
    assert first is not second
    assert len(operators(apart, "aten.mm")) == len(operators(shared, "aten.mm")) + 1


def test_without_symmetric_products_a_long_product_is_one_call():
    def loss_fn(params, x):
        return (x @ params["w"]).square().mean()

    halves, whole = compare(loss_fn, {"w": normal(512, 1)}, normal(512, 512), disabled="symmetric_products")
    panels = "thor_fx.gram_by_panels"
    assert (len(operators(halves, panels)), len(operators(whole, panels))) == (1, 0)
    assert len(operators(whole, "aten.mm")) == len(operators(halves, "aten.mm")) + 1


def test_without_shifts_convolutions_sum_over_pairs_of_taps():
    def loss_fn(params, x):
        return F.conv2d(x, params["w"], padding=1).square().mean()

    params, x = {"w": normal(2, 2, 3, 3)}, normal(3, 2, 12, 12)
    (gram, other) = (
        operators(gm, "thor_fx.patch_gram") for gm in compare(loss_fn, params, x, disabled="shifts")
    )
    assert [node.args[-1] for node in other] == [False]
    assert [len(node.args) for node in gram] == [len(other[0].args) - 1]


def test_what_is_off_is_off_inside_only():
    assert is_on("shifts")
    with without(["shifts"]), without(["accumulate"]):
        assert not is_on("shifts")
        assert not is_on("accumulate")
        assert is_on("recompute")
    assert is_on("shifts")


@pytest.mark.parametrize("disabled", ["shifts", 3, None, [3], ["shifts", None]])
def test_names_come_in_a_list(disabled):
    with pytest.raises(TypeError, match=r"^disable_passes must be a list of names"):
        thor_fx.compile(build(mlp), backend="eager", disable_passes=disabled)
    with pytest.raises(TypeError, match=r"^disable_passes must be a list of names"):
        thor_fx.compile_step(len, thor_fx.thor(**SETTINGS), backend="eager", disable_passes=disabled)


def test_an_unknown_name_is_an_error_that_lists_those_there_are():
    with pytest.raises(ValueError, match=r"^disable_passes must name some of \['accumulate', .*got 'fusion'"):
        thor_fx.compile(build(mlp), backend="eager", disable_passes=["shifts", "fusion"])
    with pytest.raises(ValueError, match=r"^disable_passes must name some of \['accumulate', .*got 'fusion'"):
        thor_fx.compile_step(len, thor_fx.thor(**SETTINGS), backend="eager", disable_passes={"fusion"})
