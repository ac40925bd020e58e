"""How much of a factor is kept: shapes, traces, and sums of different kinds."""

import pytest
import torch

from thor_fx.passes.sides import Side, trace, widen, without_bias


@pytest.mark.parametrize(
    ("side", "shape", "text"),
    [
        (Side(5), (5, 5), "5x5"),
        (Side(5, groups=2), (2, 5, 5), "2 x 5x5"),
        (Side(5, "blocks", 2), (3, 2, 2), "5 in blocks of 2"),
        (Side(5, "blocks", 2, groups=4), (4, 3, 2, 2), "4 x 5 in blocks of 2"),
        (Side(5, "diagonal"), (5,), "diagonal of 5"),
        (Side(5, "identity"), (), "none of 5"),
    ],
)
def test_shapes_and_names(side, shape, text):
    assert (side.shape, str(side)) == (shape, text)


def matrices(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(3, 3), (2, 4, 4), (2, 3, 5, 5), (1, 1)])
def test_the_trace_of_a_dense_side(shape):
    m = matrices(*shape)
    expected = torch.diagonal(m, dim1=-2, dim2=-1).sum(-1)
    torch.testing.assert_close(trace(m, Side(shape[-1])), expected, rtol=1e-12, atol=1e-12)


def test_the_trace_of_blocks_and_of_a_diagonal():
    blocks, diagonal = matrices(2, 3, 4, 4), matrices(2, 9)
    expected = torch.einsum("lfbb->l", blocks)
    torch.testing.assert_close(trace(blocks, Side(11, "blocks", 4)), expected)
    torch.testing.assert_close(trace(diagonal, Side(9, "diagonal")), diagonal.sum(1))


@pytest.mark.parametrize("want", [Side(5), Side(5, "blocks", 2), Side(5, "blocks", 5), Side(5, "diagonal")])
def test_a_diagonal_in_the_form_of_another_kind(want):
    diagonal = matrices(5)
    wide = widen(diagonal, Side(5, "diagonal"), want)
    assert wide.shape == want.shape
    torch.testing.assert_close(trace(wide, want), diagonal.sum())
    if want.kind == "dense":
        assert torch.equal(wide, torch.diag(diagonal))


def test_nothing_but_a_diagonal_is_widened():
    with pytest.raises(AssertionError, match="cannot become"):
        widen(matrices(3, 2, 2), Side(5, "blocks", 2), Side(5))


def test_the_coordinate_of_the_bias_comes_last():
    m = matrices(2, 4, 4)
    assert torch.equal(without_bias(m, Side(4, joint=True)), m[:, :3, :3])
    assert without_bias(m, Side(4)) is m
