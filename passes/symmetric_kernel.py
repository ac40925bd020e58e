"""The lower half of ``x^T x`` by tensor cores, tile by tile: a Triton kernel and its operator.

Every program computes one tile of the result whose row is no earlier than its column, over a part of the
rows, and writes it twice, as it is and mirrored: with n tiles to a side, ``(n + 1) / 2n`` of the work of a
product of matrices. Sums are float32. Inputs are bfloat16, float16, or float32 rounded to TF32.

Where a result has too few tiles to occupy a GPU, the rows are cut into parts, which are added up afterwards.
Sizes alone decide how, nothing is timed and nothing is added atomically: equal inputs give equal bits, and
results are symmetric to the last of them.

NOTE: [One operator, seen through] To a tracer the operator is one node, with fake values of its own. Where
AOTAutograd meets that node (the functional door), it is replaced by the launch of the kernel, which Inductor
compiles and launches as one of its own. The drop-in door inserts it behind that stage; there it stays the
call of an operator.

Importing this file needs Triton, which comes with torch's builds for CUDA; :mod:`thor_fx.passes.symmetric`
knows where there is none.

Legend: B batch, S parts of the rows, R rows, F features, n tiles to a side of the result.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

TILE = 128  # features to a side of a tile
BYTES_OF_ROWS = 128  # of a feature that are read at a time
PROGRAMS = 128  # what occupies a GPU: data-centre GPUs have 108 to 148 multiprocessors
PARTS = 8  # more of them are not worth their sum
WARPS, STAGES = 8, 3


@triton.jit
def tile_of(program, n):
    """Row and column of a program's tile: all with ``row >= column``, each once. Integers only.

    The triangle is folded into a rectangle of ``ceil(n / 2)`` columns: the columns that it lacks are turned
    into the corner above the diagonal. An even n has a row more, so that the diagonal of that corner fits.
    """
    width = (n + 1) // 2
    odd = n % 2
    row = program // width - (1 - odd)
    column = program % width
    below = column <= row
    i = row if below else width + column - odd
    j = column if below else width + row + (1 - odd)
    return i, j


@triton.jit
def tiles_kernel(
    x,
    out,
    rows,
    features,
    parts,
    stride_b,
    stride_r,
    stride_f,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of ``out`` (B, S, F, F), and its mirror image, from ``x`` (B, R, F)."""
    n = tl.cdiv(features, TILE)
    tiles = n * (n + 1) // 2
    program = tl.program_id(0)
    i, j = tile_of(program % tiles, n)
    place = program // tiles  # of B S
    part = place % parts
    steps = tl.cdiv(tl.cdiv(rows, ROWS), parts)
    start = part * steps * ROWS
    end = tl.minimum(start + steps * ROWS, rows)

    f_i = i * TILE + tl.arange(0, TILE)
    f_j = j * TILE + tl.arange(0, TILE)
    x += (place // parts).to(tl.int64) * stride_b
    left = x + f_i[None, :].to(tl.int64) * stride_f
    right = x + f_j[None, :].to(tl.int64) * stride_f
    acc = tl.zeros((TILE, TILE), dtype=tl.float32)
    for first in range(start, end, ROWS):
        r = first + tl.arange(0, ROWS)[:, None]
        step = r.to(tl.int64) * stride_r
        a = tl.load(left + step, mask=(r < end) & (f_i[None, :] < features), other=0.0)
        b = tl.load(right + step, mask=(r < end) & (f_j[None, :] < features), other=0.0)
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)

    # a tile on the diagonal gives its lower half only: symmetric to the last bit
    out += place.to(tl.int64) * features * features
    inside = (f_i[:, None] < features) & (f_j[None, :] < features)
    lower = out + f_i[:, None].to(tl.int64) * features + f_j[None, :]
    tl.store(lower, acc, mask=inside & (f_i[:, None] >= f_j[None, :]))
    inside = (f_j[:, None] < features) & (f_i[None, :] < features)
    upper = out + f_j[:, None].to(tl.int64) * features + f_i[None, :]
    tl.store(upper, tl.trans(acc), mask=inside & (f_i[None, :] > f_j[:, None]))


@triton_op("thor_fx::symmetric", mutates_args=())
def symmetric(x: Tensor) -> Tensor:
    """``x^T x`` of every matrix of rows (B, R, F), summed in float32: (B, F, F).

    float32 is rounded to TF32. There is no arithmetic for float64.
    """
    return launch(wrap_triton(tiles_kernel), x)


def launch(kernel: Any, x: Tensor) -> Tensor:
    """What :func:`symmetric` does, with ``kernel`` wrapped for a tracer or as it is."""
    batch, rows, features = x.shape
    n = math.ceil(features / TILE)
    parts = parts_of(n)
    out = x.new_empty((batch, parts, features, features), dtype=torch.float32)
    grid = (n * (n + 1) // 2 * batch * parts,)
    kernel[grid](
        x,
        out,
        rows,
        features,
        parts,
        *x.stride(),
        TILE=TILE,
        ROWS=BYTES_OF_ROWS // x.element_size(),
        PRECISION="tf32",
        num_warps=WARPS,
        num_stages=STAGES,
    )
    # NOTE: in pairs, and not by one sum, which need not add up both halves in the same order
    while parts > 1:
        parts //= 2
        out = out[:, :parts] + out[:, parts:]
    return out.squeeze(1)


def parts_of(n: int) -> int:
    """Into how many parts rows are cut where a result has n tiles to a side: a power of two.

    The number of rows has no say, for it may be symbolic.
    """
    wanted = max(1, min(PARTS, PROGRAMS // (n * (n + 1) // 2)))
    return 1 << (wanted.bit_length() - 1)
