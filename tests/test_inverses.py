"""What holds of every method of inversion, and how users meet them."""

import copy
import io
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

import thor_fx
from stacks import KINDS, LAMBDA, LAYERS, TERMS, Stacked, constant, random, tensors
from thor_fx.inverses import METHODS, Stack, newton_schulz, replace, select
from thor_fx.passes.sides import Side
from thor_fx.refresh import per_side
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


# --- methods that invert both sides -----------------------------------------------------------------


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("kinds", KINDS)
def test_inverses_of_both_sides_are_a_dense_solve(name, kinds):
    case = Stacked(name, kinds)
    damp_a, damp_g = torch.tensor([0.3, 0.1]).double(), torch.tensor([0.2, 0.5]).double()
    state, failed = case.refresh(damping=constant(damp_a, damp_g))
    kept = [side.kind != "identity" for side in (case.input, case.output)]
    expected = case.solve(damp_a * kept[0], damp_g * kept[1])  # what is not kept is not damped
    assert failed == 0
    torch.testing.assert_close(case.apply(state), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", PAIRS[1:])
@pytest.mark.parametrize("rule", ["factor", "sqrt", "pi"])
@pytest.mark.parametrize("kinds", ["cut", "blocks", "embedding", "one side"])
def test_every_damping_rule_gives_what_cholesky_gives(name, rule, kinds):
    damping = partial(per_side, rule, LAMBDA)
    case, reference = Stacked(name, kinds), Stacked("cholesky", kinds)
    expected = reference.apply(reference.refresh(damping=damping)[0])
    torch.testing.assert_close(case.apply(case.refresh(damping=damping)[0]), expected, rtol=1e-10, atol=1e-10)


# --- all methods -------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("kinds", [k for k in KINDS if k != "no side"])
def test_what_was_never_refreshed_does_not_move(name, kinds):
    case = Stacked(name, kinds)
    assert not case.apply(case.state).any()
    state, _ = case.refresh()
    assert case.apply(state).flatten(1).any(1).all()


@every_method
@pytest.mark.parametrize("kinds", KINDS)
def test_functions_are_pure(name, kinds):
    case = Stacked(name, kinds)
    before = copy.deepcopy((case.stack.factors, case.state, case.gradients))
    state, _ = case.refresh()
    kept = copy.deepcopy(state)
    case.apply(state)
    after = case.stack.factors, case.state, case.gradients
    pairs = zip(pytree.tree_leaves(after), pytree.tree_leaves(before), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs if one is not None)
    assert all(map(torch.equal, tensors(state), tensors(kept)))
    assert [t.shape for t in tensors(state)] == [t.shape for t in tensors(case.state)]
    assert all(len(t) == LAYERS and t.dtype == torch.float64 for t in tensors(state))


@every_method
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_a_factor_that_is_not_finite_keeps_the_last_and_is_counted(name, value, side):
    case = Stacked(name)
    state, _ = case.refresh()
    spoiled = [f.clone() for f in case.measured(2).factors]
    spoiled[side][1].view(-1)[0] = value
    after, failed = case.refresh(Stack(case.layer, tuple(spoiled), state))
    clean, none = case.refresh(case.measured(2, state))
    assert (failed, none) == (1, 0)
    assert torch.equal(case.apply(after)[0], case.apply(clean)[0]), "other layers are renewed"
    field = (after.input, after.output)[side][0][1]
    assert torch.equal(field[0], (state.input, state.output)[side][0][1][0]), "the first block is kept"
    assert all(t.isfinite().all() for t in tensors(after))


@every_method
def test_a_first_factor_that_is_bad_leaves_a_layer_where_it_is(name):
    case = Stacked(name)
    a, g = case.stack.factors
    state, failed = case.refresh(case.stack._replace(factors=(a * torch.nan, g)))
    assert failed > 0
    assert not case.apply(state).any()
    assert case.apply(case.refresh(case.measured(1, state))[0]).any()


@every_method
@pytest.mark.parametrize("kinds", ["dense", "cut", "blocks", "embedding", "diagonals"])
def test_a_zero_factor_is_damping_alone(name, kinds):
    """As ``G`` is below a head that starts at zero."""
    case = Stacked(name, kinds)
    a, g = case.stack.factors
    case.stack = case.stack._replace(factors=(a, torch.zeros_like(g)))
    state, failed = case.refresh()
    assert failed == 0
    damping = torch.full((LAYERS,), LAMBDA.item(), dtype=torch.float64)
    expected = case.solve(damping, damping) if name in PAIRS else case.solve_jointly()
    torch.testing.assert_close(case.apply(state), expected, rtol=1e-10, atol=1e-10)


@every_method
def test_without_damping_what_is_singular_reaches_no_parameter(name):
    case = Stacked(name, "dense")
    a, g = (f.clone() for f in case.stack.factors)
    g[0, 0] = 0
    if g.dim() == 3:
        g[0, :, 0] = 0
    none = torch.zeros_like(LAMBDA)
    state, failed = case.refresh(Stack(case.layer, (a, g), case.state), constant(none, none))
    update = case.apply(state, lam=none)
    assert update.isfinite().all()
    assert failed == {"ekfac": 0, "eva": 0}.get(name, 1) or name == "newton_schulz"
    assert not update[0, 0].any()


@every_method
def test_layers_that_are_absent_keep_their_state(name):
    case = Stacked(name)
    state, _ = case.refresh()
    places, present = [slice(0, 1), slice(1, 2)], [False, True]
    a, g = case.measured(2).factors
    here = select(state, places, present)
    (some,), _ = case.method.refresh([Stack(case.layer, (a[1:], g[1:]), here)], constant(LAMBDA, LAMBDA), 3)
    merged = replace(state, places, present, some)
    renewed, _ = case.refresh(case.measured(2, state))
    for got, old, new in zip(tensors(merged), tensors(state), tensors(renewed), strict=True):
        assert torch.equal(got[0], old[0])
        torch.testing.assert_close(got[1], new[1], rtol=1e-12, atol=1e-12)
    assert select(state, places, [True, True]) is state


@pytest.mark.parametrize("name", [*PAIRS, "ekfac"])
def test_all_matrices_of_one_size_are_one_call(name, monkeypatch):
    """Of two layers of different shapes, whatever their side."""
    sizes = []
    method = METHODS[name]
    cases = [Stacked(name, "one size"), Stacked(name, "cut")]  # blocks of 3; and one of 2, one of 1
    concatenate = torch.cat
    monkeypatch.setattr(torch, "cat", lambda tensors, dim=0: _seen(concatenate(tensors, dim), sizes))
    method.refresh([case.stack for case in cases], constant(LAMBDA, LAMBDA), 3)
    matrices = {tuple(size) for size in sizes if len(size) == 3 and size[1] == size[2] > 1}
    assert matrices == {(2 * (1 + 2 + 1 + 2), 3, 3), (2, 2, 2)}


def _seen(tensor: Tensor, sizes: list[torch.Size]) -> Tensor:
    sizes.append(tensor.shape)
    return tensor


# --- compiled ----------------------------------------------------------------------------------------


def all_methods(stacks: dict[str, list[Stack]], gradients: list[Tensor], lam: Tensor) -> dict[str, Any]:
    """Refresh and apply, method by method: what a factor step does behind its factors."""
    results = {}
    for name, found in stacks.items():
        method = METHODS[name]
        states, failed = method.refresh(found, constant(lam, lam), 3)
        steps = [method.apply(s, g, TERMS, lam) for s, g in zip(states, gradients, strict=True)]
        results[name] = states, failed, steps
    return results


@pytest.mark.inductor
def test_all_methods_in_one_graph_of_inductor(monkeypatch):
    monkeypatch.setattr(newton_schulz, "steps", lambda _dtype: 9)  # compiles faster; enough for these factors
    kinds = ["one size", (Side(3), Side(4, "diagonal"))]  # every size that there is compiles once more
    cases = {name: [Stacked(name, kind) for kind in kinds] for name in METHODS}
    for case in cases["eigen"]:  # failures, too, are decided in the graph
        case.stack.factors[1].view(-1)[0] = torch.nan
    stacks = {name: [case.stack for case in found] for name, found in cases.items()}
    gradients = [case.gradients for case in cases["cholesky"]]
    expected = all_methods(stacks, gradients, LAMBDA)

    def flat(values: list[Tensor]) -> Any:
        given = iter(values)
        fresh = {
            name: [s._replace(factors=(next(given), next(given))) for s in found]
            for name, found in stacks.items()
        }
        return [t for t in pytree.tree_leaves(all_methods(fresh, list(given), LAMBDA)) if torch.is_tensor(t)]

    values = [f for found in stacks.values() for stack in found for f in stack.factors] + gradients
    got = torch.compile(flat, fullgraph=True)(values)
    for one, other in zip(got, pytree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert int(expected["eigen"][1]) == 2


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
    assert thor_fx.metrics(state) == {"skipped_steps": 0, "failed_inverses": 0}


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
    assert counted["failed_inverses"] >= 1
    assert all(p.isfinite().all() for p in params.values())


# --- state dicts -------------------------------------------------------------------------------------


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_method
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


@every_method
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
    other.load_state_dict(optimizer.state_dict())
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
