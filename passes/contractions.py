"""Where a walk ends: the operators that multiply activations by cotangents.

One rule per operator, as in :mod:`thor_fx.passes.walk`.
"""

import operator
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from .experts import Routed
from .geometry import Geometry
from .lookups import Bag, Looked, OneHot
from .nodes import CASTS, PERMUTES, RESHAPES, arguments, permutation, shape, source, target, upstream
from .operands import Mapped, Matrix, matrix
from .outputs import KEY as DESCRIPTOR
from .outputs import Frozen, Param
from .patches import Patches, Pixels
from .reindex import Path, Permute, View
from .walk import SWAP, SWAP_GROUPED, NoSite, Rule, Site, Walk, in_short, is_zero, scaled_product, unlike

aten = torch.ops.aten


# --- products of matrices ------------------------------------------------------------------------


def contraction(walk: Walk, gradient: fx.Node, left: fx.Node, right: fx.Node, path: Path) -> Iterator[Site]:
    """Yield the sites whose matrices add up to ``left @ right``; their origin tells operands apart.

    Raises:
        unlike: a NoSite; the product is not linear in the gradient of the loss.
    """
    depends = left in walk.backward, right in walk.backward
    if depends not in {(True, False), (False, True)}:
        raise unlike(gradient, " with both or none of its operands from backward")
    rows_last, rows_first = matrix(left, True), matrix(right, False)
    if _only_parameters(walk, right if depends[0] else left):
        try:
            yield from list(_through_a_map(walk, left, right, depends[0], path))
        except NoSite:
            # the parameters are data to this weight, a table of positions, say; or this is that table
            if (rows_last if depends[0] else rows_first).transposed:
                raise unlike(gradient, ", over features and not over rows") from None
        else:
            return
    if depends[0]:
        yield Site(walk.param, path, gradient, activation=rows_first, cotangent=rows_last)
    else:
        yield Site(walk.param, (*path, SWAP), gradient, activation=rows_last, cotangent=rows_first)


def _only_parameters(walk: Walk, node: fx.Node) -> bool:
    """Whether a value is made of parameters alone, and not of data."""
    if node in walk.data:
        return False
    return any(isinstance(n.meta.get(DESCRIPTOR), Param | Frozen) for n in upstream([node]))


def _through_a_map(walk: Walk, left: fx.Node, right: fx.Node, first: bool, path: Path) -> Iterator[Site]:
    """Yield the sites of a weight ``W`` in ``W @ P`` or ``P @ W``, from the product's gradient.

    Raises:
        unlike: a NoSite; it is no such gradient.
    """
    gradient, factor = (left, right) if first else (right, left)
    strict = replace(walk, ends={**walk.ends, aten.mm.default: _mm_of_data})
    found = list(strict.visit(gradient, ()))
    if not found:
        raise unlike(gradient)
    for site in (in_short(site, gradient) for site in found):
        if site.path not in {(), (SWAP,)} or site.kind != "linear":
            raise unlike(gradient)
        side = "activation" if first == (site.path == ()) else "cotangent"
        operand = getattr(site, side)
        mapped: Any = {side: Mapped(operand.node, operand, factor, transposed=not first)}
        yield replace(site, path=(*path, *site.path), **mapped)


def _mm(walk: Walk, node: fx.Node, path: Path) -> Iterator[Site]:
    left, right = arguments(node)
    yield from contraction(walk, node, left, right, path)


def _mm_of_data(walk: Walk, node: fx.Node, path: Path) -> Iterator[Site]:
    """A product that is the gradient of a weight, and no cotangent: rows of data are in it."""
    left, right = arguments(node)
    first = left in walk.backward
    if (right if first else left) in walk.data:
        yield from contraction(walk, node, left, right, path)
    else:
        yield from _through_a_map(walk, left, right, first, path)


def _addmm(walk: Walk, node: fx.Node, path: Path) -> Iterator[Site]:
    summand, left, right = arguments(node)[:3]
    if any(scale != 1 for scale in node.kwargs.values()):
        raise unlike(node, " with a factor")
    yield from walk.visit(summand, path)
    yield from contraction(walk, node, left, right, path)


def _outer(walk: Walk, node: fx.Node, path: Path) -> Iterator[Any]:
    """A single row: the broadcast product of a column (n, 1) and a row (m,) or (1, m)."""
    column, row = arguments(node)[:2]
    if _sizes(column)[-1:] != (1,):
        column, row = row, column
    sizes = shape(node)
    if len(sizes) != 2 or _sizes(column) != (sizes[0], 1) or _sizes(row) not in {sizes[1:], (1, sizes[1])}:
        yield from scaled_product(walk, node, path)
    else:
        yield from contraction(walk, node, column, row, path)


def _sizes(value: Any) -> tuple[int, ...]:
    return shape(value) if isinstance(value, fx.Node) else ()


# --- one product per slice -----------------------------------------------------------------------


def _bmm(walk: Walk, node: fx.Node, path: Path) -> Iterator[Site]:
    batch, rows, cols = shape(node)
    left, right = arguments(node)
    if batch == 1:
        yield from contraction(walk, node, left, right, (*path, View((int(rows), int(cols)))))
        return
    rows_last, rows_first = _slices(left, True), _slices(right, False)
    if (left in walk.backward) == (right in walk.backward):
        raise unlike(node, " with both or none of its operands from backward")
    if left in walk.backward:
        yield Site(walk.param, path, node, rows_first, rows_last, kind="linear per slice")
    else:
        yield Site(walk.param, (*path, SWAP_GROUPED), node, rows_last, rows_first, kind="linear per slice")


def _slices(node: fx.Node, transposed: bool) -> Matrix:
    if target(node) in PERMUTES and permutation(node) == (0, 2, 1):
        return _slices(source(node), not transposed)
    return Matrix(node, transposed, grouped=True)


def _sum(walk: Walk, node: fx.Node, path: Path) -> Iterator[Site]:
    """A weight that was expanded over leading axes: the sum over them of a batched product."""
    product, axes = arguments(node)[:2]
    sizes, flipped = shape(product), False
    if len(sizes) < 3 or sorted(axis % len(sizes) for axis in axes) != list(range(len(sizes) - 2)):
        raise unlike(node)
    while target(product) in CASTS | RESHAPES | PERMUTES:
        flipped ^= _swaps_last_two(product, node)
        product = source(product)
    if target(product) is not aten.bmm.default:
        raise unlike(node)
    path = (*path, View((int(sizes[-2]), int(sizes[-1]))))
    left, right = arguments(product)
    yield from contraction(walk, product, left, right, (*path, SWAP) if flipped else path)


def _swaps_last_two(step: fx.Node, node: fx.Node) -> bool:
    """Whether a view or permutation swaps the last two axes; it must not mix them with others."""
    dims = len(shape(step))
    if target(step) in PERMUTES:
        last = permutation(step)[-2:]
        if set(last) == {dims - 2, dims - 1}:
            return last == (dims - 1, dims - 2)
    elif shape(source(step))[-2:] == shape(step)[-2:]:
        return False
    raise unlike(node)


# --- experts -------------------------------------------------------------------------------------


def _grouped_mm(walk: Walk, node: fx.Node, path: Path) -> Iterator[Site]:
    left, right, offsets, *_ = (*arguments(node), None)
    if len(shape(left)) != 2 or len(shape(right)) != 2 or offsets is None:
        raise unlike(node)
    yield _experts(walk, node, left, right, offsets, path, aten._grouped_mm.default)


def _grouped_mm_of_transformers(walk: Walk, node: fx.Node, path: Path) -> Iterator[Site]:
    """``transformers`` multiplies rows by experts in an operator of its own where torch's does not apply."""
    x, _, offsets, g = arguments(node)[:4]
    rows = Routed(x, offsets, int(shape(offsets)[0]), sorted_rows=True)
    yield Site(
        walk.param, (*path, SWAP_GROUPED), node, rows, replace(rows, node=g), kind="expert"
    )  # its weights are (E, in, out)


def _experts(
    walk: Walk, node: fx.Node, left: fx.Node, right: fx.Node, offsets: fx.Node, path: Path, grouped: Any
) -> Site:
    """The site of ``left[:, rows of e] @ right[rows of e]`` for every expert."""
    count = int(shape(offsets)[0])
    rows_last = Routed(left, offsets, count, sorted_rows=True, transposed=True, grouped_mm=grouped)
    rows_first = Routed(right, offsets, count, sorted_rows=True, grouped_mm=grouped)
    if left in walk.backward:
        return Site(walk.param, path, node, rows_first, rows_last, kind="expert")
    return Site(walk.param, (*path, SWAP_GROUPED), node, rows_last, rows_first, kind="expert")


def _routed(walk: Walk, node: fx.Node, products: fx.Node, index: fx.Node, path: Path) -> Iterator[Site]:
    """Every row has gathered the matrix of its expert: (S, out, 1) @ (S, 1, in), added up by expert."""
    left, right = arguments(products)[:2]
    experts = int(shape(node)[0])
    column, row = Routed(left, index, experts, sorted_rows=False), Routed(right, index, experts, False)
    if (left in walk.backward) == (right in walk.backward) or shape(left)[2] != 1:
        raise unlike(node)
    column, row = (_flat(operand) for operand in (column, row))
    if left in walk.backward:
        yield Site(walk.param, path, node, row, column, kind="expert")
    else:
        yield Site(walk.param, (*path, SWAP_GROUPED), node, column, row, kind="expert")


def _flat(operand: Routed) -> Routed:
    """Read (S, F) behind the view (S, F, 1) or (S, 1, F)."""
    node = operand.node
    views = CASTS | RESHAPES | PERMUTES | {aten.select_backward.default}  # s[:, :, 0] of (S, F, 1)
    while _changes_nothing(node) or (target(node) in views and 1 in shape(node)[1:]):
        node = source(node)
    if len(shape(node)) != 2:
        raise unlike(operand.node)
    return replace(operand, node=node)


# --- lookups -------------------------------------------------------------------------------------


def _embedding(walk: Walk, node: fx.Node, path: Path) -> Iterator[Site]:
    g, index, _, padding = arguments(node)[:4]
    yield _lookup(walk, node, g, index, int(padding), path)


def _lookup(walk: Walk, node: fx.Node, g: fx.Node, index: fx.Node, padding: int, path: Path) -> Site:
    size, *rest = (int(length) for length in shape(node))
    cotangent = Looked(g, index, padding)
    path = (*path, *([View((size, cotangent.features))] if len(rest) != 1 else []), SWAP)
    return Site(walk.param, path, node, OneHot(index, size, padding, g), cotangent, kind="embedding")


def _index_put(walk: Walk, node: fx.Node, path: Path) -> Iterator[Site]:
    """Rows of a table that were looked up, added to zeros."""
    full, indices, values, *accumulate = arguments(node)
    if not is_zero(full) or accumulate != [True] or len(indices) != 1 or indices[0] is None:
        raise unlike(node)
    yield from _added_up(walk, node, values, indices[0], path)


def _masked_index_put(walk: Walk, node: fx.Node, path: Path) -> Iterator[Site]:
    """The decomposition of an embedding's backward: indices in range that are not the padding."""
    full, mask, indices, values = arguments(node)
    if not is_zero(full) or len(indices) != 1 or not _of_embedding(node):
        raise unlike(node)
    g, _ = _given(values)
    compared = [n for n in upstream([mask]) if target(n) is aten.ne.Scalar and _of_embedding(n)]
    yield _lookup(walk, node, g, indices[0], int(arguments(compared[0])[1]) if compared else -1, path)


def _of_embedding(node: fx.Node) -> bool:
    # by name: deepcopy makes another object of an operator
    return str(node.meta.get("original_aten")) == "aten.embedding_dense_backward.default"


def _index_add(walk: Walk, node: fx.Node, path: Path) -> Iterator[Site]:
    full, axis, index, values = arguments(node)
    if not is_zero(full) or axis != 0:
        raise unlike(node)
    yield from _added_up(walk, node, values, index, path)


def _added_up(walk: Walk, node: fx.Node, values: fx.Node, index: fx.Node, path: Path) -> Iterator[Site]:
    if index.meta["val"].dtype == torch.bool:
        raise unlike(node, " with a mask")
    g, padding = _given(values)
    product, flipped = _as_stacked(g)
    if target(product) is aten.bmm.default and len(shape(node)) == 3:
        yield from _routed(walk, node, product, index, (*path, SWAP_GROUPED) if flipped else path)
    else:
        yield _lookup(walk, node, g, index, padding, path)


def _as_stacked(node: fx.Node) -> tuple[fx.Node, bool]:
    """The stacked matrices behind what ``einsum`` and ``@`` leave; whether they are transposed there."""
    flipped = False
    while _changes_nothing(node) or (target(node) in PERMUTES and permutation(node) == (0, 2, 1)):
        flipped ^= not _changes_nothing(node)
        node = source(node)
    return node, flipped


def _changes_nothing(node: fx.Node) -> bool:
    if target(node) in PERMUTES:
        return permutation(node) == tuple(range(len(shape(node))))
    views = RESHAPES | {aten.expand.default}
    return target(node) in views and shape(source(node)) == shape(node)


def _given(values: fx.Node) -> tuple[fx.Node, int]:
    """What the decomposition of an embedding's backward started from, and the padding that it masks."""
    padding = -1
    while target(values) in CASTS or _of_embedding(values):
        for node in values.all_input_nodes:
            padding = max(padding, _compared_with(node))
        values = next(n for n in values.all_input_nodes if _is_masked_or_scaled(n, values))
    return values, padding


def _is_masked_or_scaled(node: fx.Node, result: fx.Node) -> bool:
    """Whether ``node`` is the gradient in ``result``: no mask, no scale, not the zero of what is masked."""
    return bool(node.meta["val"].is_floating_point()) and shape(node) == shape(result)


def _compared_with(mask: fx.Node) -> int:
    while target(mask) in RESHAPES | {aten.expand.default}:
        mask = source(mask)
    return int(arguments(mask)[1]) if target(mask) is aten.eq.Scalar else -1


def _embedding_bag(walk: Walk, node: fx.Node, path: Path) -> Iterator[Site]:
    g, index, offsets, _, _, _, _, by_frequency, mode, _, weights, *padding = arguments(node)
    if mode == MAX:
        raise unlike(node, " (the maximum of a bag)")
    if by_frequency:
        raise unlike(node, " (scaled by frequency)")
    entry = (padding or [-1])[0]
    activation = Bag(index, int(shape(node)[0]), offsets, g, weights, mode == MEAN, entry)
    yield Site(walk.param, (*path, SWAP), node, activation, matrix(g, False), kind="embedding bag")


MEAN, MAX = 1, 2


# --- convolutions --------------------------------------------------------------------------------


def _getitem(walk: Walk, node: fx.Node, path: Path) -> Iterator[Site]:
    """A result of an operator that has several: the gradient of a weight is the second."""
    operation, position = arguments(node)
    rule = _SEVERAL.get(str(target(operation)))
    if rule is None or position != 1:
        raise unlike(node)
    yield from rule(walk, operation, path)


def _convolution(walk: Walk, node: fx.Node, path: Path) -> Iterator[Site]:
    g, x, weight, _, stride, padding, dilation, transposed, output_padding, groups, _ = arguments(node)
    settings = shape(weight)[2:], stride, padding, dilation, output_padding
    axes = len(shape(weight)) - 2
    kernel, *rest = (tuple(int(size) for size in sizes) for sizes in settings)
    rest = [sizes * axes if len(sizes) == 1 else sizes for sizes in rest]  # one number may stand for all axes
    geometry = Geometry(kernel, rest[0], rest[1], rest[2], rest[3], transposed)
    if (g in walk.backward) == (x in walk.backward):
        raise unlike(node, " with both or none of its operands from backward")
    if g not in walk.backward:
        raise unlike(node, " (the gradient of a gradient)")
    activation: Any = Pixels(x, groups)
    if not geometry.pointwise:
        activation = Patches(x, groups, geometry, shape(g)[2:], int(shape(g)[1]))
    kind = "transposed convolution" if transposed else "convolution"
    path = (*path, *_kernel(weight, groups, transposed))
    yield Site(walk.param, path, node, activation, Pixels(g, groups), kind=kind)


def _kernel(weight: fx.Node, groups: int, transposed: bool) -> Path:
    """From (out, in / E, *kernel), or (in, out / E, *kernel) where transposed, to matrices by group."""
    first, second, *kernel = (int(size) for size in shape(weight))
    taps = 1
    for size in kernel:
        taps *= size
    one = first // groups
    if not transposed:
        return (View((groups, one, second * taps) if groups > 1 else (one, second * taps)),)
    if groups > 1:
        return View((groups, one, second, taps)), Permute((0, 2, 1, 3)), View((groups, second, one * taps))
    return View((one, second, taps)), Permute((1, 0, 2)), View((second, one * taps))


_SEVERAL: dict[str, Rule] = {
    "aten.convolution_backward.default": _convolution,
    "transformers.grouped_mm_fallback_backward.default": _grouped_mm_of_transformers,
}

WEIGHTS: Mapping[Any, Rule] = {
    aten.mm.default: _mm,
    aten.bmm.default: _bmm,
    aten.addmm.default: _addmm,
    aten.sum.dim_IntList: _sum,
    aten.mul.Tensor: _outer,
    aten._grouped_mm.default: _grouped_mm,
    aten.embedding_dense_backward.default: _embedding,
    aten._embedding_bag_backward.default: _embedding_bag,
    aten.index_put.default: _index_put,
    aten._unsafe_index_put.default: _index_put,
    aten._unsafe_masked_index_put_accumulate.default: _masked_index_put,
    aten.index_add.default: _index_add,
    operator.getitem: _getitem,
}
"""The rules for weights."""
