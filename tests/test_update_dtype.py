"""``update_dtype``: gradients and inverses rounded where they are multiplied, and nowhere else."""

import pytest
import torch

import thor_fx
from training import assert_moved, assert_same, batches, build, by_both_doors, mlp, snapshot

SETTINGS = {"lr": 0.05, "damping": 0.1, "momentum": 0.9, "frequency": 2}
ROUNDED = {"update_dtype": torch.bfloat16}


def single():
    return build(mlp, torch.float32)


@pytest.mark.parametrize("settings", [{}, {"inverse": "newton_schulz"}, {"bias": "joint", "block_size": 3}])
def test_steps_are_those_of_exact_products_but_for_the_rounding(settings):
    data = batches(5, dtype=torch.float32)
    rounded = by_both_doors(single, data, rtol=1e-2, **SETTINGS, **settings, **ROUNDED)
    exact = by_both_doors(single, data, rtol=1e-4, **SETTINGS, **settings)
    assert_moved(rounded, snapshot(dict(single().named_parameters())))
    assert_same(rounded, exact, rtol=2e-2)
    with pytest.raises(AssertionError):
        assert_same(rounded, exact, rtol=1e-5)


def test_what_is_kept_between_steps_is_not_rounded():
    model = thor_fx.compile(single(), backend="aot_eager")
    optimizer = thor_fx.Thor(model, **SETTINGS, **ROUNDED)
    for x, y in batches(3, dtype=torch.float32):
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    kept = [v for entry in optimizer.state.values() for v in torch.utils._pytree.tree_leaves(entry)]
    floats = [v for v in kept if isinstance(v, torch.Tensor) and v.is_floating_point()]
    assert floats
    assert all(v.dtype == torch.float32 for v in floats)
    assert any(not torch.equal(v, v.bfloat16().float()) for v in floats)


def test_double_precision_is_never_rounded():
    data = batches(4)
    exact = by_both_doors(lambda: build(mlp), data, **SETTINGS)
    assert_same(by_both_doors(lambda: build(mlp), data, **SETTINGS, **ROUNDED), exact, rtol=1e-15)


@pytest.mark.parametrize("inverse", ["ekfac", "eva"])
def test_methods_without_inverses_of_both_sides_refuse(inverse):
    with pytest.raises(ValueError, match=r"update_dtype=.* must be one of"):
        thor_fx.thor(**SETTINGS, **ROUNDED, inverse=inverse)
