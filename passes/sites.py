"""Find every use of a weight from its gradient.

NOTE: [Why gradients, not forwards] The gradient of a weight that is used linearly is one
contraction, ``dW = sum_r g_r a_r^T``, and its two operands are the Kronecker samples. Forward
spellings are many (``F.linear``, ``x @ W``, ``einsum``, a module, a function); the gradient ends in
``mm`` or ``bmm`` for all of them. So the walk starts at the gradient output and goes back through
views, casts and sums. It either reaches contractions, one site each, or says where it stopped.
"""

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from .outputs import Grad, InputDescriptor, Loss, Output, Param, Tangent, input_nodes, output_nodes
from .reindex import Narrow, Path, Permute, Step, View, disjoint, part_name, simplify

aten = torch.ops.aten

UNUSED = "the loss does not depend on it"


@dataclass(frozen=True)
class Operand:
    """One side of a contraction: rows x features, or features x rows where ``transposed``."""

    node: fx.Node
    transposed: bool

    @property
    def features(self) -> int:
        """The length of the side: what ``A`` or ``G`` is square in."""
        return int(self.node.meta["val"].shape[-2 if self.transposed else -1])

    @property
    def rows(self) -> int | torch.SymInt:
        """The number of rows, over all leading axes; symbolic where the batch size is."""
        return self.node.meta["val"].numel() // self.features


@dataclass(frozen=True)
class Site:
    """One use of a weight: a summand ``sum_r g_r a_r^T`` of its gradient, with both operands."""

    param: str
    path: Path
    gradient: fx.Node
    activation: Operand
    cotangent: Operand

    @property
    def layer(self) -> str:
        """The parameter's name, with the part of it where the site covers no more than a part."""
        return self.param + part_name(self.path)

    @property
    def dims(self) -> tuple[int, int]:
        """``(out, in)``."""
        return self.cotangent.features, self.activation.features


@dataclass(frozen=True)
class SiteReport:
    """Every parameter of a step graph is in exactly one of ``sites`` (by name), ``norms``, ``reasons``."""

    sites: tuple[Site, ...]
    norms: tuple[str, ...]
    reasons: dict[str, str]
    nearest: Site | None
    """The site nearest the loss: its rows are the terms that the loss averages over."""

    @property
    def layers(self) -> dict[str, tuple[Site, ...]]:
        """Sites by layer: a weight that is used several times has several."""
        found: dict[str, tuple[Site, ...]] = {}
        for site in self.sites:
            found[site.layer] = (*found.get(site.layer, ()), site)
        return found


class NoSite(Exception):
    """A walk ended at something that is no contraction. Its text is the reason."""


def find_sites(gm: fx.GraphModule) -> SiteReport:
    """Walk back from the gradient of every parameter.

    Args:
        gm: a step graph, or the joint graph of AOTAutograd with descriptors.

    Returns:
        The sites, the normalisation parameters, and for every other parameter the reason why it
        has neither.
    """
    backward = _downstream(seeds(gm))
    outputs = output_nodes(gm)
    sites: list[Site] = []
    norms: list[str] = []
    reasons: dict[str, str] = {}
    for descriptor in input_nodes(gm):
        if not isinstance(descriptor, Param):
            continue
        gradient = outputs.get(Grad(descriptor.name))
        if gradient is None:
            reasons[descriptor.name] = UNUSED
        elif _is_norm(gradient, backward):
            norms.append(descriptor.name)
        else:
            try:
                sites += _sites_of(descriptor.name, gradient, backward)
            except NoSite as reason:
                reasons[descriptor.name] = str(reason)
    return SiteReport(tuple(sites), tuple(norms), reasons, _nearest(gm, sites))


def seeds(gm: fx.GraphModule) -> list[fx.Node]:
    """Where backward starts: the tangents or, in a graph without, the constants the loss does not need."""
    inputs = input_nodes(gm)
    tangents = [node for descriptor, node in inputs.items() if isinstance(descriptor, Tangent)]
    if tangents:
        return tangents
    results = [n for d, n in output_nodes(gm).items() if isinstance(d, Loss | Output) and n is not None]
    forward = _upstream(results)
    return [n for n in gm.graph.nodes if n.op == "call_function" and not _grown(n) and n not in forward]


def _grown(node: fx.Node) -> bool:
    """Whether a node computes with values; ``ones_like`` and its kin take a shape only."""
    return bool(node.all_input_nodes) and node.target not in {
        aten.ones_like.default,
        aten.full_like.default,
        aten.new_ones.default,
    }


# --- the walk ------------------------------------------------------------------------------------

CASTS = {
    aten._to_copy.default,
    torch.ops.prims.convert_element_type.default,
    aten.detach.default,
    aten.alias.default,
    aten.clone.default,
}
PERMUTES = {aten.permute.default, aten.t.default, aten.transpose.int}
RESHAPES = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
}
ZEROS = {aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default, aten.full.default}


@dataclass(frozen=True)
class _Walk:
    """The contractions below one gradient, each with the path from the parameter to its matrix."""

    param: str
    backward: set[fx.Node]

    def visit(self, node: fx.Node, path: Path) -> Iterator[Site]:
        """Yield the sites that add up to ``node``, which lies at ``path`` of the parameter's gradient.

        Raises:
            NoSite: with the reason.
        """
        if node.op != "call_function":
            raise NoSite(f"its gradient is {_chain(node)}")
        if node.target in CASTS:
            yield from self.visit(node.args[0], path)
        elif node.target in RESHAPES or node.target in PERMUTES:
            yield from self.visit(node.args[0], (*path, _undo(node)))
        elif node.target in _RULES:
            yield from _RULES[node.target](self, node, path)
        elif node.target not in ZEROS:
            raise NoSite(f"its gradient is {_chain(node)}")

    def contraction(self, gradient: fx.Node, left: Operand, right: Operand, path: Path) -> Site:
        """A site whose matrix is ``left @ right``, with the operands told apart by where they come from."""
        from_loss = left.node in self.backward, right.node in self.backward
        if from_loss == (True, False):
            return Site(self.param, path, gradient, activation=_base(right), cotangent=_base(left))
        if from_loss == (False, True):
            path = (*path, Permute((1, 0)))
            return Site(self.param, path, gradient, activation=_base(left), cotangent=_base(right))
        raise NoSite(f"both or none of the operands of {gradient.name} depend on the loss")


def _sites_of(name: str, gradient: fx.Node, backward: set[fx.Node]) -> list[Site]:
    sites = list(_Walk(name, backward).visit(gradient, ()))
    if not sites:
        raise NoSite("its gradient is zero")
    shape = tuple(int(size) for size in gradient.meta["val"].shape)
    sites = [replace(site, path=simplify(site.path, shape)) for site in sites]
    _refuse_overlap(sites, shape)
    return sites


def _refuse_overlap(sites: list[Site], shape: tuple[int, ...]) -> None:
    """Uses of the same entries must agree on which axis is ``out``, or there is no one factor pair."""
    if not disjoint(list({site.path for site in sites}), shape):
        raise NoSite("its uses disagree on which axis is the input (W in one, W.T in the other)")


def _mm(walk: _Walk, node: fx.Node, path: Path) -> Iterator[Site]:
    left, right = node.args[:2]
    yield walk.contraction(node, Operand(left, True), Operand(right, False), path)


def _bmm(walk: _Walk, node: fx.Node, path: Path) -> Iterator[Site]:
    batch, out, cols = node.meta["val"].shape
    if batch != 1:
        raise NoSite(f"a batched product of {batch} slices: one factor pair per slice is not supported yet")
    yield from _mm(walk, node, (*path, View((int(out), int(cols)))))


def _addmm(walk: _Walk, node: fx.Node, path: Path) -> Iterator[Site]:
    _refuse_scaled(node)
    summand, left, right = node.args[:3]
    yield from walk.visit(summand, path)
    yield walk.contraction(node, Operand(left, True), Operand(right, False), path)


def _add(walk: _Walk, node: fx.Node, path: Path) -> Iterator[Site]:
    _refuse_scaled(node)
    for summand in node.args[:2]:
        if not isinstance(summand, fx.Node) or summand.meta["val"].shape != node.meta["val"].shape:
            raise NoSite(f"its gradient is {_chain(node)}")
        yield from walk.visit(summand, path)


def _cat(walk: _Walk, node: fx.Node, path: Path) -> Iterator[Site]:
    axis, start = (node.args[1] if len(node.args) > 1 else 0), 0
    axis %= node.meta["val"].dim()
    for piece in node.args[0]:
        stop = start + int(piece.meta["val"].shape[axis])
        yield from walk.visit(piece, (*path, Narrow(axis, start, stop)))
        start = stop


def _slice_backward(walk: _Walk, node: fx.Node, path: Path) -> Iterator[Site]:
    piece, sizes, axis, start, stop, stride = node.args
    yield from _piece(walk, node, path, (piece, axis, start, stop, stride, sizes[axis]))


def _slice_scatter(walk: _Walk, node: fx.Node, path: Path) -> Iterator[Site]:
    full, piece, axis, start, stop, stride = (*node.args, *(0, None, None, 1)[len(node.args) - 2 :])
    if full.target not in ZEROS:
        raise NoSite(f"its gradient is {_chain(node)}")
    size = node.meta["val"].shape[axis]
    yield from _piece(walk, node, path, (piece, axis, start or 0, size if stop is None else stop, stride, size))


def _piece(walk: _Walk, node: fx.Node, path: Path, where: tuple[Any, ...]) -> Iterator[Site]:
    piece, axis, start, stop, stride, size = where
    if stride != 1:
        raise NoSite(f"its gradient is {_chain(node)}, a slice with a stride")
    start, stop = (min(i + size if i < 0 else i, size) for i in (start, stop))
    step = Narrow(axis % node.meta["val"].dim(), int(start), int(stop))
    yield from walk.visit(piece, (*path, step))


def _sum(walk: _Walk, node: fx.Node, path: Path) -> Iterator[Site]:
    """A weight that was expanded over leading axes: the sum over them of a batched product."""
    source, axes = node.args[:2]
    shape = source.meta["val"].shape
    if len(shape) < 3 or sorted(a % len(shape) for a in axes) != list(range(len(shape) - 2)):
        raise NoSite(f"its gradient is {_chain(node)}")
    flipped = False
    while source.target in CASTS or source.target in RESHAPES or source.target in PERMUTES:
        kind = _on_last_two(source)
        if kind is None:
            raise NoSite(f"its gradient is {_chain(node)}")
        flipped ^= kind == "swapped"
        source = source.args[0]
    if source.target is not aten.bmm.default:
        raise NoSite(f"its gradient is {_chain(node)}")
    path = (*path, View(tuple(int(size) for size in shape[-2:])))
    path = (*path, Permute((1, 0))) if flipped else path
    left, right = source.args
    yield walk.contraction(source, Operand(left, True), Operand(right, False), path)


def _on_last_two(node: fx.Node) -> str | None:
    """What a view or permutation does to the last two axes: ``"kept"``, ``"swapped"`` or None: mixes them."""
    dims = node.meta["val"].dim()
    if node.target in PERMUTES:
        last = _order(node)[-2:]
        return {(dims - 2, dims - 1): "kept", (dims - 1, dims - 2): "swapped"}.get(last)
    return "kept" if node.args[0].meta["val"].shape[-2:] == node.meta["val"].shape[-2:] else None


def _outer(walk: _Walk, node: fx.Node, path: Path) -> Iterator[Site]:
    """A single row: the broadcast product of a column and a row."""
    column, row = node.args[:2]
    if _length(column, -1) != 1:
        column, row = row, column
    shape = node.meta["val"].shape
    if len(shape) != 2 or (_length(column, -2), _length(column, -1)) != (shape[0], 1):
        raise NoSite(f"its gradient is {_chain(node)}")
    if _length(row, -1) != shape[1] or _length(row, -2) not in {None, 1}:
        raise NoSite(f"its gradient is {_chain(node)}")
    yield walk.contraction(node, Operand(column, True), Operand(row, False), path)


def _length(node: Any, axis: int) -> int | None:
    """The length of an axis; None for a node without that axis, or for a number."""
    shape = node.meta["val"].shape if isinstance(node, fx.Node) else ()
    return shape[axis] if len(shape) >= -axis else None


Rule = Callable[[_Walk, fx.Node, Path], Iterator[Site]]
_RULES: dict[Any, Rule] = {
    aten.mm.default: _mm,
    aten.bmm.default: _bmm,
    aten.addmm.default: _addmm,
    aten.add.Tensor: _add,
    aten.cat.default: _cat,
    aten.slice_backward.default: _slice_backward,
    aten.slice_scatter.default: _slice_scatter,
    aten.sum.dim_IntList: _sum,
    aten.mul.Tensor: _outer,
}


def _refuse_scaled(node: fx.Node) -> None:
    if any(scale != 1 for scale in node.kwargs.values()):
        raise NoSite(f"its gradient is {_chain(node)} with a factor")


def _undo(node: fx.Node) -> Step:
    """The step from the layout of a view or permutation to that of its argument."""
    if node.target in PERMUTES:
        order = _order(node)
        return Permute(tuple(sorted(range(len(order)), key=order.__getitem__)))
    return View(tuple(int(size) for size in node.args[0].meta["val"].shape))  # type: ignore[union-attr]


def _order(node: fx.Node) -> tuple[int, ...]:
    dims = node.meta["val"].dim()
    if node.target is aten.permute.default:
        return tuple(axis % dims for axis in node.args[1])  # type: ignore[operator, union-attr]
    order = list(range(dims))
    if dims > 1:
        first, second = (0, 1) if node.target is aten.t.default else node.args[1:3]
        order[first], order[second] = order[second], order[first]  # type: ignore[index]
    return tuple(order)


def _base(operand: Operand) -> Operand:
    """The operand read through a plain transposition, so that factors use the tensor that exists."""
    node = operand.node
    if node.target in PERMUTES and node.meta["val"].dim() == 2 and _order(node) == (1, 0):
        return _base(Operand(node.args[0], not operand.transposed))  # type: ignore[arg-type]
    return operand


# --- around the walk -----------------------------------------------------------------------------

NORM_BACKWARDS = {aten.native_layer_norm_backward.default, aten._fused_rms_norm_backward.default}


def _is_norm(gradient: fx.Node, backward: set[fx.Node]) -> bool:
    """Whether a gradient is that of a LayerNorm's or RMSNorm's scale or shift."""
    node = gradient
    while node.op == "call_function":
        if NORM_BACKWARDS & {node.target, node.meta.get("original_aten")}:
            return True
        if node.target is aten.mul.Tensor:
            return any(_is_normalised(operand) for operand in node.all_input_nodes if operand not in backward)
        if node.target not in CASTS | RESHAPES | {aten.sum.dim_IntList, operator.getitem}:
            return False
        node = node.args[0]  # type: ignore[assignment]
    return False


def _is_normalised(node: fx.Node) -> bool:
    """Whether a node is ``x * rsqrt(mean(x^2) + eps)``, however cast."""
    while node.op == "call_function" and node.target in CASTS:
        node = node.args[0]  # type: ignore[assignment]
    return node.target is aten.mul.Tensor and any(n.target is aten.rsqrt.default for n in node.all_input_nodes)


def _nearest(gm: fx.GraphModule, sites: list[Site]) -> Site | None:
    """The site whose cotangent is the fewest operations away from where backward starts."""
    distance: dict[fx.Node, int] = {}
    frontier = seeds(gm)
    for step in itertools.count():
        distance |= dict.fromkeys(frontier, step)
        frontier = list(dict.fromkeys(u for node in frontier for u in node.users if u not in distance))
        if not frontier:
            break
    return min(sites, key=lambda site: distance[site.cotangent.node], default=None)


def _downstream(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    return _closure(nodes, lambda node: node.users)


def _upstream(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    return _closure(nodes, lambda node: node.all_input_nodes)


def _closure(nodes: Iterable[fx.Node], following: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += following(node)
    return found


def _chain(node: fx.Node, length: int = 4) -> str:
    """The operators that a gradient ends in, last first: ``view <- sum <- mul``."""
    names = []
    while len(names) < length and isinstance(node, fx.Node):
        if node.op != "call_function":
            names.append(node.name)
            break
        names.append(getattr(node.target, "__name__", str(node.target)).split(".")[0])
        node = next(iter(node.all_input_nodes), None)  # type: ignore[assignment]
    return " <- ".join(names)
