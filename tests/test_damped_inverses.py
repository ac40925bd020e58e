"""Inverses that cannot fail silently, whatever the method."""

import math
from functools import partial

import pytest
import torch

from inversions import renew
from thor_fx.inverses import cholesky, eigen, newton_schulz
from thor_fx.inverses.pair import damped_reciprocal


@pytest.fixture(
    params=[cholesky, eigen, newton_schulz], ids=lambda method: method.__name__.rpartition(".")[2]
)
def damped_inverse(request):
    return partial(renew, request.param.damped_inverse)


def matrices(*shape: int, dtype=torch.float64) -> torch.Tensor:
    """Random symmetric positive semi-definite matrices of rank one less than their side."""
    x = torch.randn(*shape[:-1], shape[-1] - 1, dtype=dtype, generator=torch.Generator().manual_seed(0))
    return x @ x.mT


def previous(m: torch.Tensor) -> torch.Tensor:
    return torch.arange(float(m.numel()), dtype=m.dtype).view_as(m)


@pytest.mark.parametrize("side", [2, 5, 16, 33, 100])  # Cholesky halves the last two
@pytest.mark.parametrize("damping", [1e-3, 0.5])
def test_equals_the_inverse_of_the_damped_matrix(damped_inverse, side, damping):
    m = matrices(3, side, side)
    strength = torch.tensor(damping, dtype=m.dtype)
    inverse, failed = damped_inverse(m, strength, previous(m))
    expected = torch.linalg.inv(m + damping * torch.eye(side, dtype=m.dtype))
    torch.testing.assert_close(inverse, expected, rtol=1e-10, atol=1e-10)
    assert failed == 0
    assert failed.dtype == torch.int64
    assert failed.dim() == 0


def test_every_matrix_has_its_damping(damped_inverse):
    m, damping = matrices(3, 4, 4), torch.tensor([0.1, 1.0, 10.0])[:, None, None]
    inverse, _ = damped_inverse(m, damping, previous(m))
    for got, one, strength in zip(inverse, m, damping.flatten(), strict=True):
        expected = torch.linalg.inv(one + strength.double() * torch.eye(4, dtype=m.dtype))
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def bad_entry(value):
    def spoil(m):
        m[1, 2, 0] = m[1, 0, 2] = value

    return spoil


def indefinite(m):
    m[1] = torch.diag(torch.tensor([1.0, -5.0, 1.0, 1.0], dtype=m.dtype))


def singular(m):
    """Damping makes an entry of the diagonal zero: ``cholesky_inverse`` raises for what is left of it."""
    m[1] = torch.diag(torch.tensor([1.0, -0.5, 1.0, 1.0], dtype=m.dtype))


@pytest.mark.parametrize(
    "spoil",
    [bad_entry(float("nan")), bad_entry(float("inf")), bad_entry(-float("inf")), indefinite, singular],
    ids=["nan", "inf", "-inf", "indefinite", "singular"],
)
def test_a_matrix_without_an_inverse_keeps_the_previous_one_and_is_counted(damped_inverse, spoil):
    m = matrices(3, 4, 4)
    before, clean = previous(m), damped_inverse(m, torch.tensor(0.5), previous(m))[0]
    spoil(m)
    inverse, failed = damped_inverse(m, torch.tensor(0.5), before)
    assert failed == 1
    assert torch.equal(inverse[1], before[1])
    assert torch.equal(inverse[[0, 2]], clean[[0, 2]]), "the others are as they would be without it"


@pytest.mark.parametrize("damping", [float("nan"), float("inf")])
def test_a_damping_that_is_no_number_fails_all(damped_inverse, damping):
    m = matrices(3, 4, 4)
    inverse, failed = damped_inverse(m, torch.tensor(damping), previous(m))
    assert failed == 3
    assert torch.equal(inverse, previous(m))


@pytest.mark.parametrize("side", [64, 100, 200])
@pytest.mark.parametrize("condition", [1e2, 1e5])
def test_halving_costs_no_accuracy(side, condition):
    draws = torch.Generator().manual_seed(side)
    q, _ = torch.linalg.qr(torch.randn(5, side, side, dtype=torch.float64, generator=draws))
    m = (q * torch.logspace(0, -math.log10(condition), side, dtype=torch.float64)) @ q.mT
    whole = torch.cholesky_inverse(torch.linalg.cholesky(m.float()))
    halved, failed = renew(cholesky.damped_inverse, m.float(), torch.zeros(()), torch.zeros(side, side))
    exact = torch.linalg.inv(m)
    assert failed == 0
    assert (halved - exact).norm() <= 2 * (whole - exact).norm()


@pytest.mark.parametrize("place", [0, 31, 32, 70, 99])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1e3])
def test_cholesky_finds_what_is_wrong_in_every_part(place, value):
    m = matrices(2, 100, 100)
    m[1, place, place] = value
    before = previous(m)
    inverse, failed = renew(cholesky.damped_inverse, m, torch.tensor(0.1), before)
    assert failed == 1
    assert torch.equal(inverse[1], before[1])


def test_an_inverse_that_overflows_is_a_failure(damped_inverse):
    m = torch.full((1, 1, 1), 1e-40)
    inverse, failed = damped_inverse(m, torch.tensor(0.0), torch.ones_like(m))
    assert failed == 1
    assert inverse == 1


def test_arguments_are_left_alone(damped_inverse):
    m = matrices(2, 3, 3)
    kept, before = m.clone(), previous(m)
    damped_inverse(m, torch.tensor(0.1), before)
    assert torch.equal(m, kept)
    assert torch.equal(before, previous(m))


def test_reciprocals_of_diagonals():
    d = torch.tensor([[1.0, 3.0], [0.0, 1.0], [torch.nan, 1.0], [-2.0, 1.0]], dtype=torch.float64)
    damping = torch.tensor([[1.0], [0.0], [1.0], [1.0]], dtype=torch.float64)
    before = torch.full_like(d, 7.0)
    inverse, failed = renew(damped_reciprocal, d, damping, before)
    torch.testing.assert_close(inverse[0], torch.tensor([0.5, 0.25], dtype=torch.float64))
    assert torch.equal(inverse[1:], before[1:])  # a zero, a NaN and a negative number
    assert failed == 3
