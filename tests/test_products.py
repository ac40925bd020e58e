"""Products of rows with themselves: panels, blocks and rounded inputs against one plain product."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from models import random
from thor_fx.passes import products
from thor_fx.passes.products import block_grams, gram, product

D = torch.float64


def close(found, expected):
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(40, 33), (64, 32), (2, 50, 37)])
def test_panels_are_the_whole_product(monkeypatch, shape):
    monkeypatch.setattr(products, "PANEL", 8)
    x = random(1, D, *shape)
    found = gram(x)
    close(found, x.mT @ x)
    assert torch.equal(found, found.mT)  # mirrored, where a plain product may round otherwise


def test_few_rows_and_short_sides_are_one_product(monkeypatch):
    monkeypatch.setattr(products, "PANEL", 8)
    for shape in (31, 32), (64, 31):
        x = random(1, D, *shape)
        assert torch.equal(gram(x), x.mT @ x)


def test_panels_leave_half_of_the_work_out(monkeypatch):
    monkeypatch.setattr(products, "PANEL", 8)
    asked = []
    monkeypatch.setattr(products, "product", lambda a, b, dtype: asked.append((a, b)) or product(a, b, dtype))
    gram(random(1, D, 64, 64))
    work = sum(left.shape[-2] * right.shape[-1] for left, right in asked)
    assert work == 64 * 64 * (8 + 1) / (2 * 8)


@pytest.mark.parametrize("features", [1, 4, 10, 12])
@pytest.mark.parametrize("lead", [(), (3,)])
def test_blocks_are_those_of_the_whole_product(features, lead):
    x = random(1, D, *lead, 9, features)
    found, whole = block_grams(x, 4), x.mT @ x
    assert found.shape == (*lead, -(-features // 4), 4, 4)
    for i in range(found.shape[-3]):
        cut = whole[..., 4 * i : 4 * i + 4, 4 * i : 4 * i + 4]
        close(found[..., i, : cut.shape[-1], : cut.shape[-1]], cut)
        assert not found[..., i, cut.shape[-1] :, :].any()
        assert not found[..., i, :, cut.shape[-1] :].any()


@pytest.mark.parametrize("function", [gram, lambda x, dtype: block_grams(x, 8, dtype)])
def test_inputs_are_rounded_and_sums_are_float32(function):
    x = random(1, torch.float32, 200, 24)
    found, exact = function(x, torch.bfloat16), function(x.bfloat16().double(), None)
    assert found.dtype == torch.float32
    # a sum of 200 numbers that bfloat16 had accumulated would be off by more than its last rounding
    assert (found - exact).abs().max() <= exact.abs().max() * 2**-8
    assert not torch.equal(found, function(x, None))


def test_double_precision_is_never_rounded():
    x = random(1, D, 20, 6)
    assert torch.equal(gram(x, torch.bfloat16), gram(x))


def test_a_gpu_returns_float32_sums_of_rounded_inputs():
    """On fake tensors: what is asked of the device, not what it computes."""
    with FakeTensorMode():
        x = torch.empty(2048, 1024, device="cuda")
        assert gram(x, torch.bfloat16).dtype == torch.float32
        blocks = block_grams(x, 128, torch.bfloat16)
        assert (blocks.dtype, blocks.shape) == (torch.float32, (8, 128, 128))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("function", [gram, lambda x, dtype=None: block_grams(x, 128, dtype)])
def test_rounded_products_on_a_gpu(function):
    x = random(1, torch.float32, 4096, 512).cuda()
    found, exact = function(x, torch.bfloat16), function(x.bfloat16().double())
    assert (found - exact).abs().max() <= exact.abs().max() * 1e-5  # the sum itself is not rounded
