"""Eigenbasis and second moments, against dense solves and a loop by hand."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import oracle
from stacks import BLOCK, KINDS, LAMBDA, TERMS, Stacked, layer, random, tensors
from thor_fx.inverses import METHODS, Stack
from thor_fx.inverses.eigen import decompose, eigh
from thor_fx.inverses.ekfac import DECAY
from thor_fx.layers import Coverage
from thor_fx.passes.sides import Side
from thor_fx.precondition import precondition
from thor_fx.schedule import Schedule
from thor_fx.transform import Signals

METHOD = METHODS["ekfac"]


@pytest.mark.parametrize("kinds", KINDS)
def test_a_refresh_damps_the_product_and_not_its_factors(kinds):
    case = Stacked("ekfac", kinds)
    state, failed = case.refresh()
    assert failed == 0
    torch.testing.assert_close(case.apply(state), case.solve_jointly(), rtol=1e-10, atol=1e-10)


def parts_of(matrix: Tensor) -> Tensor:
    """Eigenvectors and eigenvalues block by block: (d, d), (d,)."""
    pieces = [torch.linalg.eigh(matrix[i : i + BLOCK, i : i + BLOCK]) for i in range(0, len(matrix), BLOCK)]
    return torch.block_diag(*(q for _, q in pieces)), torch.cat([values for values, _ in pieces])


@pytest.mark.parametrize("kinds", ["dense", "cut", "one size"])
def test_every_step_is_that_of_a_loop_by_hand(kinds):
    case = Stacked("ekfac", kinds)
    state, _ = case.refresh()
    by_hand = []
    for A, G in case.matrices():
        (q_a, l_a), (q_g, l_g) = parts_of(A), parts_of(G)
        by_hand.append([q_a, q_g, torch.outer(l_g, l_a)])
    for step in range(5):
        gradients, lam = random(step, *case.gradients.shape), LAMBDA * (1 + step)
        update, state = METHOD.apply(state, gradients, TERMS, lam)
        for place, (q_a, q_g, s) in enumerate(by_hand):
            p = q_g.T @ gradients[place] @ q_a
            scaled = torch.zeros_like(p)
            for i, j in itertools.product(*map(range, p.shape)):
                scaled[i, j] = p[i, j] / (s[i, j] + lam)
                s[i, j] = DECAY * s[i, j] + (1 - DECAY) * TERMS * p[i, j] ** 2
            expected = q_g @ scaled @ q_a.T
            torch.testing.assert_close(update[place], expected, rtol=1e-10, atol=1e-10)


def test_where_the_basis_diagonalises_the_fisher_matrix_the_step_is_its_inverse():
    """Its eigenvalues are no outer product, so that no pair of factors has them: ``S`` finds them."""
    case = Stacked("ekfac", "dense")
    state, _ = case.refresh()
    truth = random(5, *case.gradients.shape).square()  # what F has in the basis of A (x) G
    gradients, expected = [], []
    for (A, G), moments in zip(case.matrices(), truth, strict=True):
        (q_a, _), (q_g, _) = parts_of(A), parts_of(G)
        basis = oracle.kronecker(q_g, q_a)
        fisher = (basis * moments.flatten()) @ basis.T
        g = q_g @ (moments / TERMS).sqrt() @ q_a.T  # n P^2 is those moments
        gradients.append(g)
        damped = fisher + LAMBDA * torch.eye(len(fisher), dtype=g.dtype)
        expected.append(torch.linalg.solve(damped, g.flatten()).view_as(g))
    gradients = torch.stack(gradients)
    off = case.apply(state, gradients)
    for _ in range(600):  # 0.95^600 is 4e-14
        _, state = METHOD.apply(state, gradients, TERMS, LAMBDA)
    torch.testing.assert_close(case.apply(state, gradients), torch.stack(expected), rtol=1e-10, atol=1e-10)
    assert oracle.relative_error(off, torch.stack(expected)) > 0.1


def test_what_n_times_the_square_of_a_mean_expects():
    """Over all outcomes of n terms: the second moment of one, and n - 1 times the square of the mean."""
    n, mean = 4, 0.3
    outcomes = torch.tensor(list(itertools.product([mean - 1, mean + 1], repeat=n)), dtype=torch.float64)
    expected = outcomes.square().mean() + (n - 1) * mean**2
    torch.testing.assert_close(n * outcomes.mean(1).square().mean(), expected)


def test_a_refresh_starts_anew():
    case = Stacked("ekfac")
    state, _ = case.refresh()
    _, used = METHOD.apply(state, case.gradients, TERMS, LAMBDA)
    assert not torch.equal(used.moments[0], state.moments[0])
    again, _ = case.refresh(case.stack._replace(before=used))
    assert all(map(torch.equal, tensors(again), tensors(state)))


@pytest.mark.parametrize("side", [0, 1])
def test_a_bad_block_keeps_both_bases_and_the_moments_of_its_matrix(side):
    """A new basis on one side only would not fit the old moments."""
    case = Stacked("ekfac")
    state, _ = case.refresh()
    spoiled = [f.clone() for f in case.measured(2).factors]
    spoiled[side][1, -1, -1] = torch.nan
    after, failed = case.refresh(Stack(case.layer, tuple(spoiled), state, case.never))
    clean, _ = case.refresh(case.measured(2, state))
    assert failed == 1
    for got, old, new in zip(tensors(after), tensors(state), tensors(clean), strict=True):
        assert torch.equal(got[1], old[1])
        assert torch.equal(got[0], new[0])


def test_moments_that_overflow_are_a_failure():
    case = Stacked("ekfac")
    a, g = case.stack.factors
    state, _ = case.refresh(Stack(case.layer, (a * 1e200, g * 1e200), case.state, case.never))
    assert not case.apply(state).any()


def test_without_factors_of_either_side_it_needs_no_refresh():
    case = Stacked("ekfac", "no side")
    torch.testing.assert_close(case.apply(case.state), case.gradients / (1 + LAMBDA))


def test_a_layer_without_a_gradient_keeps_its_moments():
    """Of two layers of one shape, in a plain step."""
    params = {name: random(i, 3, 2) for i, name in enumerate("ab")}
    layers = {name: replace(layer(Side(3), Side(2)), name=name, param=name) for name in params}
    signals = Signals(Coverage(layers, (), {}), {"damping": LAMBDA})
    tx = precondition(Schedule("damping", 0.2), inverse="ekfac")
    state = tx.init(params, signals.coverage)
    ((key, _),) = state.inverses.items()
    known, _ = Stacked("ekfac", "dense").refresh()
    state = state._replace(inverses={key: known}, terms=TERMS)
    gradients = {"b": random(7, 3, 2)}
    updates, after = tx.update(gradients, state, params, signals)
    expected, moved = METHOD.apply(
        known, torch.stack([torch.zeros(3, 2).double(), gradients["b"]]), TERMS, LAMBDA
    )
    torch.testing.assert_close(updates["b"], expected[1])
    (old,), (new,) = known.moments, after.inverses[key].moments
    assert torch.equal(new[0], old[0])
    torch.testing.assert_close(new[1], moved.moments[0][1])
    assert not torch.equal(new[1], old[1])


# --- the decomposition that it shares with ``eigen`` ---------------------------------------------------


def test_a_slightly_indefinite_matrix_is_one_with_zeros():
    q, _ = torch.linalg.qr(random(1, 4, 4))
    values = torch.tensor([-1e-17, 0.0, 1.0, 2.0], dtype=torch.float64)
    found, _, good = decompose(((q * values) @ q.T)[None])
    assert good
    assert (found >= 0).all()
    assert not decompose(((q * (values - 1e-6)) @ q.T)[None])[2]


@pytest.mark.parametrize("count", [1, 3])
def test_a_decomposition_that_does_not_converge_is_not_finite(count, monkeypatch):
    """``torch.linalg.eigh`` raises for the whole batch; the others keep their results."""
    original, bad = torch.linalg.eigh, random(7, 3, 3)

    def failing(matrices: Tensor) -> tuple[Tensor, Tensor]:
        if any(torch.equal(matrix, bad) for matrix in matrices):
            raise torch.linalg.LinAlgError("failed to converge")
        return original(matrices)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    good = random(8, count, 3, 3)
    good = good @ good.mT
    values, vectors = eigh(torch.cat([bad[None], good[1:]]))
    assert values[0].isnan().all()
    assert vectors[0].isnan().all()
    expected = original(good[1:]) if count > 1 else (good[:0, 0], good[:0])
    torch.testing.assert_close(values[1:], expected[0])
    torch.testing.assert_close(vectors[1:], expected[1])


def test_the_operator_is_described_as_it_behaves():
    matrices = random(9, 2, 4, 4)
    torch.library.opcheck(torch.ops.thor_fx.eigh.default, (matrices @ matrices.mT,))
