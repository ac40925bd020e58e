"""Orthogonal steps, alone, against singular values."""

import pytest
import torch

from eager_steps import nearly_orthogonal
from models import random
from thor_fx.layers import Coverage, Layer
from thor_fx.orthogonal import orthogonalize
from thor_fx.passes.sides import Side
from thor_fx.transform import Signals

D = torch.float64
SHAPES = [(3, 4), (4, 3), (8, 2), (5, 5), (1, 4), (4, 1)]


def layer(name, out, in_, groups=1):
    sides = Side(in_, groups=groups), Side(out, groups=groups)
    return Layer(name, name, *sides, (), (), 1, "6")


def steps(layers, given):
    found = Coverage({each.name: each for each in layers}, (), {})
    tx = orthogonalize()
    return tx.update(given, tx.init(given, found), given, Signals(found))[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_only_singular_values_change(shape, size):
    given = random(1, D, *shape)
    found = steps([layer("w", *shape)], {"w": size * given})["w"]
    expected = nearly_orthogonal(given) * max(1.0, shape[0] / shape[1]) ** 0.5
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


def test_singular_values_come_close_to_one():
    left, _, right = torch.linalg.svd(random(1, D, 20, 30), full_matrices=False)
    given = left * torch.linspace(0.05, 1, 20, dtype=D) @ right
    values = torch.linalg.svdvals(steps([layer("w", 20, 30)], {"w": given})["w"])
    assert 0.65 < values.min() < values.max() < 1.2


@pytest.mark.parametrize("shape", [(32, 48), (48, 32)])
def test_float32_goes_as_far_as_bfloat16(shape):
    given = random(1, D, *shape)
    found, exact = (steps([layer("w", *shape)], {"w": given.to(dtype)})["w"] for dtype in (torch.float32, D))
    assert found.dtype == torch.float32
    assert (found - exact).norm() < 0.03 * exact.norm()


def test_layers_of_one_shape_and_groups_are_independent():
    given = {"a": random(1, D, 3, 4), "b": random(2, D, 6, 4), "c": random(3, D, 4, 3)}
    layers = [layer("a", 3, 4), layer("b", 3, 4, groups=2), layer("c", 4, 3)]
    found = steps(layers, given)
    assert torch.allclose(found["a"], nearly_orthogonal(given["a"]), rtol=0, atol=1e-12)
    for new, old in zip(found["b"].split(3), given["b"].split(3), strict=True):
        assert torch.allclose(new, nearly_orthogonal(old), rtol=0, atol=1e-12)
    assert torch.allclose(found["c"], nearly_orthogonal(given["c"]) * (4 / 3) ** 0.5, rtol=0, atol=1e-12)


def test_a_zero_stays_zero_and_what_is_absent_stays_absent():
    layers = [layer("a", 3, 4), layer("b", 3, 4), layer("c", 2, 2)]
    params = {name: torch.ones(3, 4, dtype=D) for name in "ab"} | {"c": torch.ones(2, 2, dtype=D)}
    found = Coverage({each.name: each for each in layers}, (), {})
    given = {"a": torch.zeros(3, 4, dtype=D), "free": torch.ones(2, dtype=D)}
    new, _ = orthogonalize().update(given, (), params, Signals(found))
    assert new.keys() == given.keys()
    assert not new["a"].any()
    assert torch.equal(new["free"], given["free"])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_seen_behind_it(bad):
    given = random(1, D, 3, 4)
    given[1, 2] = bad
    assert not steps([layer("w", 3, 4)], {"w": given})["w"].isfinite().all()
