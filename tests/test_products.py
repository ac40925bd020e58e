"""Products of rows with themselves: panels, blocks and rounded inputs against one plain product."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils.flop_counter import FlopCounterMode

from models import random
from thor_fx.passes import panels
from thor_fx.passes.panels import by_panels, flops_of_panels, gram_by_panels, panel_by_panel
from thor_fx.passes.products import block_grams, gram

D = torch.float64


def close(found, expected):
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.fixture
def narrow(monkeypatch):
    """Panels of 8 features, from 16 on."""
    for name, value in {"PANEL": 8, "FEATURES": 16, "WIDE": 32}.items():
        monkeypatch.setattr(panels, name, value)


@pytest.mark.parametrize("shape", [(40, 33), (64, 16), (2, 50, 37), (2, 3, 100, 20)])
@pytest.mark.parametrize("dtype", [D, torch.float32])
def test_panels_are_the_whole_product(narrow, shape, dtype):
    x = random(1, dtype, *shape)
    assert by_panels(x, dtype)
    found, exact = gram(x), x.double().mT @ x.double()
    assert found.dtype == dtype
    assert (found - exact).abs().max() <= exact.abs().max() * 20 * torch.finfo(dtype).eps
    assert torch.equal(found, found.mT)  # mirrored, where a plain product may round otherwise


@pytest.mark.parametrize("shape", [(31, 32), (63, 16), (640, 15)], ids=["wide", "rows", "features"])
def test_few_rows_and_short_sides_are_one_product(narrow, shape):
    x = random(1, D, *shape)
    assert not by_panels(x, D)
    for function in gram, gram_by_panels if shape[1] >= panels.FEATURES else gram:
        assert torch.equal(function(x), x.mT @ x)


def test_rounded_rows_must_be_more(narrow):
    x = random(1, torch.float32, 64, 32)
    assert by_panels(x, torch.float32)
    assert not by_panels(x, torch.bfloat16)
    assert by_panels(random(1, torch.float32, 128, 32), torch.bfloat16)


def test_a_symbolic_number_of_rows_is_left_to_the_operator(narrow):
    mode = FakeTensorMode(shape_env=ShapeEnv())
    by_row = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC])
    fake = mode.from_tensor(random(1, D, 20, 16), symbolic_context=by_row)
    traced = make_fx(gram)(fake, None)
    assert traced.graph.find_nodes(op="call_function", target=torch.ops.thor_fx.gram_by_panels.default)
    for rows in (3, 20, 200):
        x = random(2, D, rows, 16)
        close(traced(x, None), x.mT @ x)


def test_panels_leave_half_of_the_work_out(narrow):
    for shape, work in ((64, 64), 64 * 64 * (8 + 1) // (2 * 8)), ((2, 40, 33), None):
        x = random(1, D, *shape)
        with FlopCounterMode(display=False) as counter:
            panel_by_panel(x)
        assert counter.get_total_flops() == flops_of_panels(x)
        assert work is None or counter.get_total_flops() == 2 * 64 * work


def test_panels_are_an_operator():
    x = random(1, torch.float32, 1200, 300)
    torch.library.opcheck(gram_by_panels, (x,), test_utils=("test_schema", "test_faketensor"))


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
