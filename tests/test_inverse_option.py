"""``inverse=`` as users meet it: both doors, saved states, and what ``explain`` counts."""

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

import thor_fx
from stacks import LAMBDA, random, tensors
from thor_fx.inverses import METHODS
from thor_fx.passes.sides import Side
from training import (
    MODELS,
    assert_moved,
    assert_same,
    batches,
    build,
    by_drop_in_door,
    by_functional_door,
    classifier_loss,
    identical,
    mlp,
    snapshot,
    train,
)

PAIRS = ["cholesky", "eigen", "newton_schulz"]
SETTINGS: dict[str, Any] = {"lr": 0.05, "damping": 0.3, "momentum": 0.9, "frequency": 3}
every_method = pytest.mark.parametrize("name", METHODS)
every_state = pytest.mark.parametrize("name", ["cholesky", "ekfac", "eva"])
"""Methods that keep inverses of both sides keep the same."""


# --- both doors --------------------------------------------------------------------------------------

SOME = {"damping_rule": "pi", "block_size": 4, "bias": "joint", "loss_scale": 64.0, "batch_size": 50}
DOORS = [(name, {}) for name in METHODS] + [(name, SOME) for name in ("newton_schulz", "ekfac", "eva")]


@pytest.mark.parametrize(("name", "options"), DOORS)
def test_both_doors_take_the_same_steps(name, options):
    data, settings = batches(7), {**SETTINGS, **options, "inverse": name}
    functional = by_functional_door(build(mlp), data, **settings)
    assert_moved(functional, snapshot(dict(build(mlp).named_parameters())))
    assert_same(by_drop_in_door(build(mlp), data, **settings), functional)


@pytest.mark.parametrize(("name", "make"), [("ekfac", "attention"), ("eva", "tied")])
def test_both_doors_on_other_models(name, make):
    data, settings = batches(5), {**SETTINGS, "lr": 0.01, "inverse": name}
    functional = by_functional_door(build(MODELS[make]), data, **settings)
    assert_same(by_drop_in_door(build(MODELS[make]), data, **settings), functional, rtol=1e-11)


def test_methods_differ():
    """A method that is ignored would pass all tests that compare the doors."""
    data = batches(4)
    ends = {name: by_functional_door(build(mlp), data, inverse=name, **SETTINGS)[-1] for name in METHODS}
    same = {name for name in METHODS if torch.allclose(ends[name]["0.weight"], ends["cholesky"]["0.weight"])}
    assert same == set(PAIRS)
    assert not torch.allclose(ends["ekfac"]["0.weight"], ends["eva"]["0.weight"])


@every_method
def test_a_head_that_starts_at_zero(name):
    """No gradient reaches the first layer in the factor step; it moves as soon as one does."""
    model = build(mlp)
    nn.init.zeros_(model[2].weight)
    start = snapshot(dict(model.named_parameters()))
    tx = thor_fx.thor(**SETTINGS, inverse=name)
    step = thor_fx.compile_step(classifier_loss(model), tx, backend="eager")
    data = batches(4)
    params = snapshot(start)
    state = step.init(params, *data[0])
    params, state, _ = step(params, state, *data[0])
    assert torch.equal(params["0.weight"], start["0.weight"])
    assert not torch.equal(params["2.weight"], start["2.weight"])
    for batch in data[1:]:
        before = params["0.weight"].clone()
        params, state, out = step(params, state, *batch)
        assert not torch.equal(params["0.weight"], before)
    assert out.loss.isfinite()
    assert thor_fx.metrics(state).items() >= {"skipped_steps": 0, "failed_inverses": 0}.items()


@every_method
def test_a_bad_batch_fails_no_parameter_and_is_counted(name):
    """Activations so large that their square overflows, and the gradient does not."""

    def loss_fn(params: Any, x: Tensor) -> Tensor:
        return (x @ params["w"]).mean()

    params = {"w": random(3, 3, 2)}
    tx = thor_fx.thor(**{**SETTINGS, "frequency": 1}, inverse=name)
    step = thor_fx.compile_step(loss_fn, tx, backend="eager")
    good, huge = random(4, 6, 3), random(4, 6, 3) * 1e200
    state = step.init(params, good)
    params, state, _ = step(params, state, good)
    params, state, _ = step(params, state, huge)
    counted = thor_fx.metrics(state)
    # with "ekfac" the squares of the gradient overflow, too: the step is skipped
    assert counted["skipped_steps" if name == "ekfac" else "failed_inverses"] >= 1
    assert all(p.isfinite().all() for p in params.values())


# --- state dicts -------------------------------------------------------------------------------------


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_state
def test_a_saved_optimizer_continues_bitwise(name):
    """Amid an interval between refreshes."""
    data, settings = batches(8), {**SETTINGS, "inverse": name}
    expected = by_drop_in_door(build(mlp), data, **settings)[-1]
    model = thor_fx.compile(build(mlp), backend="aot_eager")
    optimizer = thor_fx.Thor(model, **settings)
    train(model, optimizer, data[:5])
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    fresh = thor_fx.compile(build(mlp), backend="aot_eager")
    fresh.load_state_dict(saved["model"])
    resumed = thor_fx.Thor(fresh, **settings)
    resumed.load_state_dict(saved["optimizer"])
    found = train(fresh, resumed, data[5:])[-1]
    assert identical(found, expected)


@every_state
def test_a_saved_functional_state_continues_bitwise(name):
    data, settings = batches(6), {**SETTINGS, "inverse": name}
    model = build(mlp)
    expected = by_functional_door(model, data, **settings)[-1]
    step = thor_fx.compile_step(classifier_loss(model), thor_fx.thor(**settings), backend="eager")
    params = snapshot(dict(model.named_parameters()))
    state = step.init(params, *data[0])
    for batch in data[:4]:
        params, state, _ = step(params, state, *batch)
    inner = state.inner.inner[0].inverses.values()
    classes = [*map(type, inner), *STATES]
    file = io.BytesIO()
    torch.save((params, state), file)
    file.seek(0)
    with torch.serialization.safe_globals(classes):
        params, state = torch.load(file, weights_only=True)
    for batch in data[4:]:
        params, state, _ = step(params, state, *batch)
    assert identical(params, expected)


STATES = [thor_fx.StepState, thor_fx.transform.SkipState, thor_fx.precondition.PreconditionState]


@pytest.mark.parametrize(
    ("saved", "loaded"), [("cholesky", "ekfac"), ("ekfac", "eigen"), ("eva", "cholesky")]
)
def test_the_state_of_another_kind_of_method_is_refused(saved, loaded):
    """Eigenvectors have the shapes of inverses."""
    model = thor_fx.compile(build(mlp), backend="aot_eager")
    optimizer = thor_fx.Thor(model, **SETTINGS, inverse=saved)
    train(model, optimizer, batches(1))
    fresh = thor_fx.compile(build(mlp), backend="aot_eager")
    other = thor_fx.Thor(fresh, **SETTINGS, inverse=loaded)
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match=r"use the inverse= that it was saved with"):
        other.load_state_dict(state)
    for group in state["param_groups"]:
        del group["format"]  # of version 0: nothing is known of its options
    other.load_state_dict(state)
    with pytest.raises(ValueError, match=r"use the inverse= that it was saved with"):
        train(fresh, other, batches(1))


def test_damped_inverses_may_be_continued_by_another_method():
    model = thor_fx.compile(build(mlp), backend="aot_eager")
    optimizer = thor_fx.Thor(model, **SETTINGS)
    train(model, optimizer, batches(2))
    other = thor_fx.Thor(model, **SETTINGS, inverse="newton_schulz")
    other.load_state_dict(optimizer.state_dict())
    train(model, other, batches(1))
    pairs = zip(_inverses(other), _inverses(optimizer), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)


def _inverses(optimizer: thor_fx.Thor) -> list[Tensor]:
    return [t for entry in optimizer.state.values() for t in pytree.tree_leaves(entry.get("inverses", {}))]


# --- costs -------------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize(
    "settings", [{}, {"block_size": 3}, {"max_dim": 4, "long_side": "diagonal"}, {"bias": "joint"}]
)
def test_explain_counts_the_bytes_of_the_state_and_of_the_factors(name, settings):
    model = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 3), nn.Linear(3, 5)).double()
    params = {n: p.detach() for n, p in model.named_parameters()}

    def loss_fn(p: Any, x: Tensor) -> Tensor:
        return functional_call(model, dict(p), (x,)).square().mean()

    tx = thor_fx.thor(**SETTINGS, inverse=name, **settings)
    report = thor_fx.explain(loss_fn, params, torch.arange(12).reshape(3, 4) % 11, tx=tx)
    state = tx.init(params, report.coverage)
    kept = [t for s in state.inner[0].inverses.values() for t in tensors(s)]
    assert sum(t.nbytes for t in kept) == report.cost.state_bytes
    sides = [s for layer in report.coverage.layers.values() for s in (layer.input, layer.output)]
    assert sum(8 * side.numel for side in sides) == report.cost.factor_bytes


def test_what_methods_take():
    """(out, in) = (7, 10), whole: in the order of what they cost to keep."""
    model, x = nn.Linear(10, 7, bias=False), torch.randn(6, 10)
    costs = {n: thor_fx.explain(model, x, tx=thor_fx.thor(**SETTINGS, inverse=n)).cost for n in METHODS}
    pair, step = 4 * (100 + 49), 2 * 70 * (10 + 7)
    assert {n: c.state_bytes for n, c in costs.items()} == {
        **dict.fromkeys(PAIRS, pair),
        "ekfac": pair + 4 * 70,
        "eva": 4 * (10 + 7 + 1),
    }
    assert {n: c.step_flops for n, c in costs.items()} == {
        **dict.fromkeys(PAIRS, step),
        "ekfac": 2 * step,
        "eva": 4 * 70,
    }
    sums = {n: 6 * (10 + 7) if n == "eva" else 2 * 6 * (100 + 49) for n in METHODS}
    cubes = {n: (c.factor_flops - sums[n]) / (1000 + 343) for n, c in costs.items()}
    assert cubes == {"cholesky": 1, "eigen": 11, "ekfac": 9, "newton_schulz": 58, "eva": 0}


def test_a_transform_says_which_method_it_uses():
    tx = thor_fx.thor(**SETTINGS, inverse="eva")
    assert tx.inverse == "eva"
    assert thor_fx.chain(thor_fx.centralize_gradients(), tx).inverse == "eva"
    assert thor_fx.chain(thor_fx.centralize_gradients()).inverse == "cholesky"


def test_groups_have_states_of_their_own():
    for name, method in METHODS.items():
        sides = (Side(4, "mean", groups=3), Side(5, "mean", groups=3)) if name == "eva" else None
        state = method.init(3, sides or (Side(4, groups=3), Side(5, groups=3)), None, LAMBDA)
        assert {len(t) for t in tensors(state)} == {3}
