"""Passes of the user's own: what they measure comes out of both doors, and what they do wrong is named."""

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import thor_fx
from thor_fx.factor_graphs import _FillSlots, _key
from thor_fx.layers import Coverage
from thor_fx.own_passes import key_of
from thor_fx.passes import Grad, PassError, Statistic, find_sites, outputs, splice
from thor_fx.passes.layout import Rules
from training import (
    MODELS,
    assert_same,
    batches,
    build,
    by_functional_door,
    classifier_loss,
    mlp,
    snapshot,
    train,
)

SETTINGS: dict[str, Any] = {"lr": 0.05, "damping": 0.1, "momentum": 0.9, "frequency": 2}


def second_moments(gm):
    """The mean square of the gradient in every row of a weight."""
    new = []
    for descriptor, gradient in outputs.output_nodes(gm).items():
        if isinstance(descriptor, Grad) and gradient is not None and gradient.meta["val"].dim() == 2:
            moment = splice(gradient, lambda g: g.square().mean(1), gradient)
            new.append((Statistic("second moment", descriptor.param), moment))
    outputs.append(gm, new)


def largest_activations(gm):
    """The largest activation that a weight reads."""
    sites = {site.param: site for site in find_sites(gm).sites}
    new = []
    for name, site in sites.items():
        node = site.activation.node
        new.append((Statistic("largest", name), splice(node, lambda a: a.abs().amax(), node)))
    outputs.append(gm, new)


def drop_in(make=mlp, passes=(second_moments,), backend="aot_eager", **settings):
    model = thor_fx.compile(build(make), backend=backend, passes=list(passes))
    return model, thor_fx.Thor(model, **{**SETTINGS, **settings})


def functional(make=mlp, passes=(second_moments,), backend="eager"):
    model = build(make)
    step = thor_fx.compile_step(
        classifier_loss(model), thor_fx.thor(**SETTINGS), backend=backend, passes=list(passes)
    )
    params = snapshot(dict(model.named_parameters()))
    return step, params, step.init(params, *batches(1)[0])


def backward(model, batch):
    F.cross_entropy(model(batch[0]), batch[1]).backward()


@pytest.mark.parametrize("name", ["mlp", "tied", "attention"])
def test_both_doors_return_the_same_statistics_in_factor_steps_and_none_in_others(name):
    make, passes = MODELS[name], [second_moments, largest_activations]
    model, optimizer = drop_in(make, passes)
    step, params, state = functional(make, passes)
    for number, batch in enumerate(batches(3)):
        backward(model, batch)
        one = {key: value.clone() for key, value in optimizer.statistics().items()}
        optimizer.step()
        optimizer.zero_grad()
        params, state, out = step(params, state, *batch)
        assert set(one) == set(out.statistics)
        assert bool(one) is (number % 2 == 0)
        for key, value in one.items():
            torch.testing.assert_close(value, out.statistics[key], rtol=1e-10, atol=1e-14)


def test_they_are_what_the_pass_says():
    model, _ = drop_in()
    backward(model, batches(1)[0])
    found = thor_fx.statistics(model)
    weights = {name: p for name, p in model.named_parameters() if p.dim() == 2}
    assert set(found) == {("second moment", name) for name in weights}
    for (_, name), value in found.items():
        assert torch.equal(value, weights[name].grad.square().mean(1))


def test_passes_leave_the_training_alone():
    model, optimizer = drop_in()
    found = train(model, optimizer, batches(4))
    assert_same(found, by_functional_door(build(mlp), batches(4), **SETTINGS))


def test_micro_batches_add_up_and_step_and_zero_grad_clear():
    first, second = batches(2)
    parts = []
    for batch in (first, second):
        model, _ = drop_in()
        backward(model, batch)
        parts.append(thor_fx.statistics(model))
    model, optimizer = drop_in()
    for batch in (first, second):
        backward(model, batch)
    key = ("second moment", "0.weight")
    torch.testing.assert_close(optimizer.statistics()[key], parts[0][key] + parts[1][key])
    optimizer.zero_grad()
    assert optimizer.statistics() == {}
    backward(model, first)
    assert torch.equal(optimizer.statistics()[key], parts[0][key])
    optimizer.step()
    assert optimizer.statistics() == {}


def test_without_passes_there_is_nothing():
    model, optimizer = drop_in(passes=())
    backward(model, batches(1)[0])
    assert optimizer.statistics() == thor_fx.statistics(model) == {}
    step, params, state = functional(passes=())
    assert step(params, state, *batches(1)[0])[2].statistics == {}
    assert thor_fx.StepOutput(torch.zeros(()), None).statistics == {}


def test_a_pass_may_change_the_gradient():
    def halved(gm):
        out = outputs.output_node(gm.graph)
        for descriptor, gradient in outputs.output_nodes(gm).items():
            if isinstance(descriptor, Grad) and gradient is not None:
                half = splice(gradient, lambda g: g / 2, gradient)
                out.args = (tuple(half if node is gradient else node for node in out.args[0]),)

    model, _ = drop_in(passes=[halved], frequency=1)
    backward(model, batches(1)[0])
    changed = {name: p.grad for name, p in model.named_parameters()}
    plain, _ = drop_in(passes=())
    backward(plain, batches(1)[0])
    for name, p in plain.named_parameters():
        torch.testing.assert_close(changed[name], p.grad / 2)


# --- errors ----------------------------------------------------------------------------------------------


def crash(gm):
    raise KeyError("boom")


def forget_values(gm):
    for node in gm.graph.nodes:
        node.meta.pop("val", None)


def drop_a_result(gm):
    first = next(iter(outputs.output_nodes(gm)))
    outputs.select(gm, lambda descriptor: descriptor != first)


def append_opaque(gm):
    node = next(node for node in outputs.results(gm) if node is not None)
    outputs.append(gm, [(outputs.Opaque("mine"), node)])


def append_count(gm):
    node = next(node for node in outputs.results(gm) if node is not None)
    count = splice(
        outputs.output_node(gm.graph).prev, lambda value: torch.zeros_like(value, dtype=torch.int64), node
    )
    outputs.append(gm, [(Statistic("count", "0.weight"), count)])


def append_input(gm):
    outputs.append(gm, [(Statistic("weight", "0.weight"), gm.graph.find_nodes(op="placeholder")[0])])


WRONG = [
    (crash, "pass 'crash' failed .*: 'boom'"),
    (forget_values, "pass 'forget_values' failed .* no value"),
    (drop_a_result, "what the graph returned before must stay first"),
    (append_opaque, r"it returns Opaque.*append Statistic\(name, param\)"),
    (append_count, "must be a floating-point tensor, got torch.int64"),
    (append_input, "is an input of the graph"),
]


@pytest.mark.parametrize(("bad", "message"), WRONG, ids=[bad.__name__ for bad, _ in WRONG])
def test_a_bad_pass_is_named_by_both_doors_with_those_before_it(bad, message):
    with pytest.raises(PassError, match=message) as functional_error:
        functional(passes=[second_moments, bad])[0]
    model, _ = drop_in(passes=[second_moments, bad])
    with pytest.raises(PassError, match=message) as drop_in_error:
        backward(model, batches(1)[0])
    for caught in (functional_error, drop_in_error):
        assert f"pass {bad.__name__!r} failed (after emit_factors, second_moments)" in str(caught.value)


@pytest.mark.parametrize("passes", [3, None, "emit", second_moments, [3], [second_moments, "emit"]])
def test_passes_are_callables(passes):
    with pytest.raises(TypeError, match=r"^passes must be "):
        thor_fx.compile(build(mlp), backend="eager", passes=passes)
    with pytest.raises(TypeError, match=r"^passes must be "):
        thor_fx.compile_step(len, thor_fx.thor(**SETTINGS), backend="eager", passes=passes)


def test_a_shape_that_depends_on_the_batch_cannot_be_delivered():
    def activations(gm):
        (site, *_) = find_sites(gm).sites
        outputs.append(
            gm, [(Statistic("rows", "x"), splice(site.activation.node, torch.neg, site.activation.node))]
        )

    model = thor_fx.compile(build(mlp), backend="aot_eager", passes=[activations], dynamic=True)
    with pytest.raises(PassError, match=r"which depends on the batch: sum over it"):
        backward(model, batches(1)[0])


# --- caches ----------------------------------------------------------------------------------------------


class Named:
    uuid = "mine 1"

    def __call__(self, gm):
        second_moments(gm)


def test_only_a_pass_with_a_uuid_may_be_cached():
    def key(*passes):
        return _key(_FillSlots((), (), Rules(), passes), Coverage({}, (), {}, None))

    assert key() is not None
    assert key(second_moments) is None
    assert key(Named(), second_moments) is None
    assert "mine 1" in key(Named())
    assert key_of([Named(), partial(Named())]) is None
    disabled = _FillSlots((), (), Rules(disabled=("shifts",)), ())
    assert _key(disabled, Coverage({}, (), {}, None)) != key()


@pytest.mark.inductor
def test_a_compiled_factor_graph_delivers_statistics():
    passes = [second_moments, largest_activations]
    model, _ = drop_in(passes=passes, backend="inductor")
    backward(model, batches(1)[0])
    plain, _ = drop_in(passes=passes)
    backward(plain, batches(1)[0])
    found, expected = thor_fx.statistics(model), thor_fx.statistics(plain)
    assert set(found) == set(expected)
    assert all(math.isclose(found[k].sum(), expected[k].sum(), rel_tol=1e-10) for k in found)
