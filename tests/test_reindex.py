"""Paths from a parameter to the matrix of a site: algebra, against indices written out."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from thor_fx.passes.reindex import Narrow, Path, Permute, View, disjoint, part_name, put, simplify, take

sizes = st.integers(1, 4)
shapes = st.lists(sizes, min_size=1, max_size=4).map(tuple)


@st.composite
def narrows(draw, shape) -> Narrow:
    axis = draw(st.integers(0, len(shape) - 1))
    start = draw(st.integers(0, shape[axis] - 1))
    return Narrow(axis, start, draw(st.integers(start + 1, shape[axis])))


@st.composite
def views(draw, shape) -> View:
    """Any two neighbouring axes joined, or one axis of length 1 added."""
    at = draw(st.integers(0, len(shape) - 1))
    if len(shape) > 1 and at < len(shape) - 1 and draw(st.booleans()):
        return View((*shape[:at], shape[at] * shape[at + 1], *shape[at + 2 :]))
    return View((*shape[:at], 1, *shape[at:]))


@st.composite
def paths(draw, steps=(narrows, views, None)) -> tuple[tuple[int, ...], Path]:
    """A shape and a path of up to five steps that leads to a matrix."""
    shape, path = draw(shapes), []
    numbers = torch.empty(shape, device="meta")
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(steps))
        now = tuple(numbers.shape)
        step = draw(kind(now)) if kind else Permute(tuple(draw(st.permutations(range(len(now))))))
        path.append(step)
        numbers = step.take(numbers)
    if numbers.dim() != 2:
        out = numbers.shape[0] if numbers.dim() else 1
        path.append(View((out, numbers.numel() // out)))
    return shape, tuple(path)


def numbered(shape) -> torch.Tensor:
    """Every entry is its own position."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape)


@given(paths())
def test_put_writes_where_take_reads(example):
    shape, path = example
    matrix = -1 - numbered(take(path, numbered(shape)).shape)
    written = put(path, numbered(shape), matrix)
    assert torch.equal(take(path, written), matrix)
    reads = take(path, numbered(shape)).flatten().long()
    expected = numbered(shape).flatten()
    expected[reads] = matrix.flatten()
    assert torch.equal(written.flatten(), expected), "and nowhere else"


@given(paths())
def test_put_of_what_take_read_changes_nothing(example):
    shape, path = example
    full = numbered(shape)
    assert torch.equal(put(path, full, take(path, full)), full)


@given(paths())
def test_put_leaves_its_arguments_alone(example):
    shape, path = example
    full = numbered(shape)
    put(path, full, torch.zeros_like(take(path, full)))
    assert torch.equal(full, numbered(shape))


@given(paths())
def test_simplify_keeps_the_meaning_and_is_no_longer(example):
    shape, path = example
    short = simplify(path, shape)
    assert torch.equal(take(short, numbered(shape)), take(path, numbered(shape)))
    assert len(short) <= len(path)
    assert simplify(short, shape) == short


@given(paths(steps=(views, None)))
def test_paths_of_one_meaning_become_one(example):
    """Where the matrix is the parameter itself or its transpose, the spelling does not matter."""
    shape, path = example
    numbers = take(path, numbered(shape))
    rows, cols = numbers.shape
    identity = torch.arange(rows * cols, dtype=torch.float64)
    if torch.equal(numbers.flatten(), identity):
        assert simplify(path, shape) == (() if shape == (rows, cols) else (View((rows, cols)),))
    elif torch.equal(numbers.mT.flatten(), identity):
        expected = (Permute((1, 0)),)
        assert simplify(path, shape) == (
            expected if shape == (cols, rows) else (View((cols, rows)), *expected)
        )


def test_simplify_by_example():
    transposed = Permute((1, 0))
    assert simplify((), (3, 4)) == ()
    assert simplify((transposed, transposed), (3, 4)) == ()
    assert simplify((View((12,)), View((3, 4))), (3, 4)) == ()
    assert simplify((View((2, 3, 4)), View((6, 4)), transposed), (2, 3, 4)) == (View((6, 4)), transposed)
    assert simplify((Narrow(0, 2, 4), transposed, transposed), (6, 4)) == (Narrow(0, 2, 4),)
    assert simplify((transposed, View((3, 4))), (3, 4)) == (transposed, View((3, 4))), "no such matrix"


@st.composite
def pairs_of_paths(draw, kinds) -> tuple[tuple[int, ...], list[Path]]:
    shape = draw(st.lists(sizes, min_size=2, max_size=2).map(tuple))

    def path() -> Path:
        numbers, steps = torch.empty(shape, device="meta"), []
        for _ in range(draw(st.integers(0, 3))):
            kind = draw(st.sampled_from(kinds))
            steps.append(draw(kind(tuple(numbers.shape))) if kind else Permute((1, 0)))
            numbers = steps[-1].take(numbers)
        return tuple(steps)

    return shape, [path() for _ in range(draw(st.integers(1, 3)))]


def share_an_entry(shape, paths: list[Path]) -> bool:
    read = [set(take(path, numbered(shape)).flatten().tolist()) for path in paths]
    return any(a & b for i, a in enumerate(read) for b in read[:i])


@given(pairs_of_paths((narrows,)))
def test_disjoint_is_exact_for_slices(example):
    shape, paths = example
    assert disjoint(paths, shape) != share_an_entry(shape, paths)


@given(pairs_of_paths((narrows, None)))
def test_disjoint_is_never_wrong_about_disjointness(example):
    shape, paths = example
    assert not (disjoint(paths, shape) and share_an_entry(shape, paths))


def test_part_names():
    assert part_name(()) == part_name((Permute((1, 0)),)) == ""
    assert part_name((Narrow(0, 0, 64),)) == "[0:64]"
    assert part_name((Narrow(1, 2, 4), View((3, 2)))) == "[:, 2:4]"
    assert part_name((Narrow(0, 0, 64), Narrow(0, 8, 16))) == "[0:64][8:16]"
