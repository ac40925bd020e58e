"""What holds of every method of inversion, as pure functions."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from stacks import KINDS, LAMBDA, LAYERS, TERMS, Stacked, constant, tensors
from thor_fx.inverses import METHODS, Stack, newton_schulz, replace, select
from thor_fx.inverses.attempts import NOT_FINITE
from thor_fx.passes.sides import Side
from thor_fx.refresh import per_side

PAIRS = ["cholesky", "eigen", "newton_schulz"]
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
    after, failed = case.refresh(Stack(case.layer, tuple(spoiled), state, case.never))
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
    state, failed = case.refresh(Stack(case.layer, (a, g), case.state, case.never), constant(none, none))
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
    one = Stack(case.layer, (a[1:], g[1:]), here, case.never[1:])
    (some,), _ = case.method.refresh([one], constant(LAMBDA, LAMBDA), 3)
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
        states, outcomes = method.refresh(found, constant(lam, lam), 3)
        steps = [method.apply(s, g, TERMS, lam) for s, g in zip(states, gradients, strict=True)]
        results[name] = states, outcomes, steps
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
    assert sum(int((ended == NOT_FINITE).sum()) for ended in expected["eigen"][1]) == 2
