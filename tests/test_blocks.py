"""Blocks along the diagonal, against dense block-diagonal matrices."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from thor_fx import blocks
from thor_fx.passes.sides import Side

sides = st.integers(1, 9)
block_sizes = st.one_of(st.none(), st.integers(1, 10))
layer_counts = st.integers(1, 3)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def kept(side: int, block_size: int | None) -> torch.Tensor:
    """True where two indices are in the same block."""
    of_index = torch.arange(side) // (block_size or side)
    return of_index[:, None] == of_index[None, :]


def dense(matrices: torch.Tensor, block_size: int | None) -> torch.Tensor:
    return matrices * kept(matrices.shape[-1], block_size)


@given(sides, block_sizes)
def test_split_covers_the_side_with_one_rest_at_most(side, block_size):
    parts = blocks.split(side, block_size)
    assert sum(count * b for count, b in parts) == side
    *full, (count, last) = parts
    assert len(parts) <= 2
    assert all(b == block_size for _, b in full)
    assert last <= (block_size or side)
    assert count == 1 or last == block_size


def test_split_by_example():
    assert blocks.split(300, 128) == [(2, 128), (1, 44)]
    assert blocks.split(256, 128) == [(2, 128)]
    assert blocks.split(128, 128) == blocks.split(128, None) == [(1, 128)]
    assert blocks.split(1, 128) == [(1, 1)]


@given(layer_counts, sides, block_sizes)
def test_diagonal_blocks_are_those_of_the_matrix(layers, side, block_size):
    matrices = random(layers, side, side)
    parts = blocks.diagonal_blocks(matrices, block_size)
    assert [part.shape[1:3] for part in parts] == [torch.Size(p) for p in blocks.split(side, block_size)]
    for layer in range(layers):
        on_diagonal = [block for part in parts for block in part[layer]]
        assert torch.equal(torch.block_diag(*on_diagonal), dense(matrices, block_size)[layer])


@given(layer_counts, sides, st.integers(1, 5), block_sizes)
def test_multiply_is_a_block_diagonal_product(layers, side, columns, block_size):
    matrices, x = random(layers, side, side), random(layers, side, columns)
    got = blocks.multiply(blocks.diagonal_blocks(matrices, block_size), x)
    torch.testing.assert_close(got, dense(matrices, block_size) @ x, rtol=1e-12, atol=1e-12)


@given(layer_counts, sides, st.integers(1, 5), block_sizes)
def test_multiply_right_is_a_product_with_the_transpose(layers, side, rows, block_size):
    matrices, x = random(layers, side, side), random(layers, rows, side)
    got = blocks.multiply_right(x, blocks.diagonal_blocks(matrices, block_size))
    torch.testing.assert_close(got, x @ dense(matrices, block_size).mT, rtol=1e-12, atol=1e-12)


@given(layer_counts, sides, sides, block_sizes)
def test_precondition_multiplies_from_both_sides(layers, out, in_, block_size):
    left, right = random(layers, out, out), random(layers, in_, in_)
    left, right = left + left.mT, right + right.mT  # as inverses are: symmetric
    gradient = random(layers, out, in_)
    got = blocks.precondition(
        blocks.diagonal_blocks(left, block_size), gradient, blocks.diagonal_blocks(right, block_size)
    )
    expected = dense(left, block_size) @ gradient @ dense(right, block_size)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@given(layer_counts, sides, block_sizes)
def test_zeros_have_the_shapes_of_blocks(layers, side, block_size):
    like = torch.zeros((), dtype=torch.float64)
    got = blocks.zeros(layers, Side(side), block_size, like)
    parts = blocks.diagonal_blocks(random(layers, side, side), block_size)
    assert [part.shape for part in got] == [part.shape for part in parts]
    assert all(part.dtype == torch.float64 and not part.any() for part in got)


@given(sides, block_sizes)
def test_blocks_take_no_more_memory_than_the_side_needs(side, block_size):
    """Stored once per block, never in the size of the matrix."""
    parts = blocks.diagonal_blocks(random(1, side, side), block_size)
    assert sum(part.numel() for part in parts) == kept(side, block_size).sum()


@given(layer_counts, sides, st.integers(1, 9))
def test_a_side_in_blocks_is_cut_as_a_dense_one(layers, side, block):
    """The last of the padded blocks that a graph returns loses its padding."""
    matrices = random(layers, side, side)
    padded = torch.nn.functional.pad(matrices, (0, -side % block, 0, -side % block))
    starts = range(0, padded.shape[-1], block)
    given_blocks = torch.stack([padded[:, i : i + block, i : i + block] for i in starts], 1)
    got = blocks.cut(given_blocks, Side(side, "blocks", block), block_size=None)
    expected = blocks.diagonal_blocks(matrices, block)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert [part.shape for part in got] == [
        part.shape for part in blocks.zeros(layers, Side(side, "blocks", block), None, matrices)
    ]


def test_diagonal_and_identity_sides():
    x, d = random(2, 5, 3), random(2, 5)
    (inverse,) = blocks.cut(d, Side(5, "diagonal"), 2)
    torch.testing.assert_close(blocks.multiply((inverse,), x), torch.diag_embed(d) @ x)
    y = random(2, 3, 5)
    torch.testing.assert_close(blocks.multiply_right(y, (inverse,)), y @ torch.diag_embed(d))
    assert blocks.multiply((), x) is x
    assert blocks.precondition((), x, ()) is x
    assert blocks.zeros(2, Side(5, "identity"), 2, x) == ()
    assert [tuple(part.shape) for part in blocks.zeros(2, Side(5, "diagonal"), 2, x)] == [(2, 5)]
