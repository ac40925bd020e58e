"""Decide which statistics every layer gets: a pure function of its sites and the rules.

The ladder, from the whole block down: a Kronecker pair; a pair with one side in blocks, on its
diagonal, or left alone; the elementwise rule; the first-order rule. Every step down has a note.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .biases import Bias
from .experts import Routed
from .lookups import Bag, OneHot
from .members import Alike, OwnEntries, OwnLooked
from .operands import Operand, Pooled
from .patches import Patches
from .reindex import Path
from .rounding import Rounded
from .sampling import EveryKth
from .sides import Kind, Side, join
from .sites import SiteReport
from .walk import Site

SharingName = Literal["expand", "reduce"]
Sharing = SharingName | Callable[[str], SharingName]
BiasRule = Literal["raw", "joint"]
Fisher = Literal["empirical", "sampled", "exact"]
LikelihoodName = Literal["categorical", "bernoulli", "gaussian"]
Likelihood = LikelihoodName | Callable[[Tensor], Tensor]
LongSide = Literal["blocks", "diagonal", "identity"]


@dataclass(frozen=True)
class Rules:
    """What may be chosen about factors.

    Attributes:
        sharing: ``"expand"``: rows are all positions; ``"reduce"``: the positions of one datum are one
            row; or a function of the layer's name that says which.
        bias: ``"joint"``: a bias is one more column of its weight; ``"raw"``: it is on its own.
        max_dim: the longest side with a whole factor; None: no limit.
        long_side: what a longer side keeps: diagonal ``"blocks"``, its ``"diagonal"``, or nothing.
        block_size: of the blocks of the diagonal that are kept of a factor; None: shorter sides are whole,
            and blocks of ``max_dim`` are kept of longer ones.
        means: every side keeps the mean of its rows, and no side is too long.
        fisher: where cotangents come from: ``"empirical"``: from the loss; ``"sampled"``, ``"exact"``: from
            the likelihood of the model's output, :mod:`thor_fx.passes.scores`.
        likelihood: its name, or a function that draws scores; None: as read off the loss.
        loss_scale: what the loss is multiplied by inside of the graph.
        layer_filter: ``name of weight -> bool``, which weights have factors; None: all that can.
        every: k, for factors of every k-th row, where rows can be left out (:mod:`thor_fx.passes.sampling`).
        dtype: what rows are rounded to in products (:mod:`thor_fx.passes.rounding`); None: nothing.
        disabled: optimisations to go without, sorted (:mod:`thor_fx.passes.switches`).
    """

    sharing: Sharing = "expand"
    bias: BiasRule = "raw"
    max_dim: int | None = None
    long_side: LongSide = "blocks"
    block_size: int | None = None
    means: bool = False
    fisher: Fisher = "empirical"
    likelihood: Likelihood | None = None
    loss_scale: float = 1.0
    layer_filter: Callable[[str], bool] | None = None
    every: int = 1
    dtype: torch.dtype | None = None
    disabled: tuple[str, ...] = ()


@dataclass(frozen=True)
class Use:
    """The uses of a weight that have sums in common: all of ``W``, or all of ``W.T``.

    Attributes:
        name: of the sums in descriptors.
        sites: the uses.
        activations: operands of ``A``.
        cotangents: operands of ``G``.
        input: what is kept of ``A``.
        output: what is kept of ``G``.
    """

    name: str
    sites: tuple[Site, ...]
    activations: tuple[Operand, ...]
    cotangents: tuple[Operand, ...]
    input: Side
    output: Side

    @property
    def ragged(self) -> bool:
        """Whether every group has a number of rows of its own."""
        return any(operand.ragged for operand in self.activations)


@dataclass(frozen=True)
class Layout:
    """Everything about the statistics of one layer.

    Attributes:
        layer: its name.
        param: the parameter's name.
        path: where the layer lies in the parameter.
        kind: the kind of operation.
        uses: of ``W``, then of ``W.T``, where there are any.
        input: what is kept of the input side, over all uses.
        output: what is kept of the output side.
        bias: the bias that is part of the layer.
        sharing: how positions of one datum are treated.
        notes: why it is not more.
        line: the line of Python that uses the weight.
    """

    layer: str
    param: str
    path: Path
    kind: str
    uses: tuple[Use, ...]
    input: Side
    output: Side
    bias: Bias | None
    sharing: SharingName
    notes: tuple[str, ...]
    line: str


def transposed(layer: str) -> str:
    """What the uses of a layer's transposed matrix are called in descriptors."""
    return f"{layer} (transposed)"


def layer_of(use: str) -> str:
    """The layer whose sums are called ``use``, of its matrix or of the transpose."""
    return use.removesuffix(transposed(""))


def arrange(report: SiteReport, rules: Rules = Rules()) -> dict[str, Layout]:
    """The layout of every layer of a report, by name."""
    return {name: _layout(name, sites, report, rules) for name, sites in report.layers.items()}


def _layout(name: str, sites: tuple[Site, ...], report: SiteReport, rules: Rules) -> Layout:
    notes: list[str] = []
    sharing = rules.sharing if isinstance(rules.sharing, str) else rules.sharing(name)
    axis = _batch_axis(sites, report) if sharing == "reduce" else None
    if sharing == "reduce" and axis is None:
        sharing = "expand"
        notes.append("rows are not grouped by datum, so they are not reduced")
    bias = report.biases.get(name) if rules.bias == "joint" else None
    uses = [
        _use(use_name, same, axis, rules, notes, joint=bias is not None)
        for use_name, flipped in ((name, False), (transposed(name), True))
        if (same := tuple(site for site in sites if site.flipped is flipped))
    ]
    if bias is not None and not uses[0].input.joint:
        bias = None
        notes.append("its input side has no factor with products of features, so the bias is on its own")
    straight, flipped = _of(uses, name), _of(uses, transposed(name))
    return Layout(
        layer=name,
        param=sites[0].param,
        path=sites[0].path,
        kind=" and ".join(dict.fromkeys(site.kind for site in sites)),
        uses=tuple(uses),
        input=join([*(u.input for u in straight), *(u.output for u in flipped)]),
        output=join([*(u.output for u in straight), *(u.input for u in flipped)]),
        bias=bias,
        sharing=sharing,
        notes=tuple(notes),
        line=sites[0].line,
    )


def _of(uses: list[Use], name: str) -> list[Use]:
    return [use for use in uses if use.name == name]


def _use(
    name: str, sites: tuple[Site, ...], axis: int | None, rules: Rules, notes: list[str], joint: bool
) -> Use:
    activations = tuple(site.activation for site in sites)
    cotangents = tuple(site.cotangent for site in sites)
    if axis is not None:
        activations = (Pooled(activations[0].node, activations, "mean", axis),)
        cotangents = (Pooled(cotangents[0].node, cotangents, "sum", axis),)
    sides = _side("input", activations, rules, notes), _side("output", cotangents, rules, notes)
    activations, cotangents = (
        tuple(_measured(operand, rules, notes) for operand in side) for side in (activations, cotangents)
    )
    if joint and sides[0].kind in {"dense", "blocks", "mean"} and not any(map(one_hot, activations)):
        one_more = replace(sides[0], dim=sides[0].dim + 1, joint=True)
        return Use(name, sites, activations, cotangents, one_more, sides[1])
    return Use(name, sites, activations, cotangents, *sides)


def _side(which: str, operands: tuple[Operand, ...], rules: Rules, notes: list[str]) -> Side:
    first = operands[0]
    dim, groups = first.features, first.groups
    if rules.means:
        return Side(dim, "mean", groups=groups)
    if all(one_hot(operand) for operand in operands):
        return Side(dim, "diagonal", groups=groups)
    if rules.max_dim is None or dim <= rules.max_dim:
        return short_side(dim, rules.block_size, groups)
    block = rules.block_size or rules.max_dim
    whole = [operand.geometry.taps for operand in operands if isinstance(operand, Patches)]
    block = max(1, block // max(whole)) * max(whole) if whole else block
    block = min(block, dim)
    kind: Kind = rules.long_side
    side = Side(dim, kind, block if kind == "blocks" else 0, groups)
    notes.append(f"the {which} side is longer than max_dim={rules.max_dim}: {side}")
    return side


def short_side(dim: int, block: int | None, groups: int = 1) -> Side:
    """What is measured of a factor of which only blocks are inverted: those, where that is less.

    Example:
        >>> print(short_side(512, 128))
        512 in blocks of 128
        >>> print(short_side(147, 128))
        147x147
    """
    if block is None or -(-dim // block) * block**2 >= dim**2:
        return Side(dim, "dense", groups=groups)
    return Side(dim, "blocks", block, groups)


def _measured(operand: Operand, rules: Rules, notes: list[str]) -> Operand:
    """The operand as the rules read it: a share of its rows, rounded."""
    if one_hot(operand):
        return operand  # is counted
    if rules.dtype is not None and not isinstance(operand, Patches | Routed | OwnLooked):
        operand = Rounded(operand.node, operand, rules.dtype)
    if rules.every == 1:
        return operand
    if operand.row_axes:
        return EveryKth(operand.node, operand, rules.every)
    if WHOLE_ROWS not in notes:
        notes.append(WHOLE_ROWS)
    return operand


WHOLE_ROWS = "its rows lie on no axis of their own, so all of them are measured"


def one_hot(operand: Operand) -> bool:
    """Whether the operand's factor is a diagonal by nature."""
    return isinstance(operand.inner if isinstance(operand, Alike) else operand, OneHot | Bag | OwnEntries)


def _batch_axis(sites: tuple[Site, ...], report: SiteReport) -> int | None:
    """The axis of the batch in all operands of a layer, or None where they have none in common."""
    operands = [operand for site in sites for operand in (site.activation, site.cotangent)]
    axes = [axis for axis in operands[0].batch_axes if all(axis in o.batch_axes for o in operands)]
    sizes = {axis: {_size(operand, axis) for operand in operands} for axis in axes}
    axes = [axis for axis in axes if len(sizes[axis]) == 1]
    head = None if report.nearest is None else report.nearest.activation
    pooled = head is not None and len(head.batch_axes) == 1  # each of its rows is a datum, then
    terms = str(head.rows) if head is not None and pooled else None
    matching = [axis for axis in axes if sizes[axis] == {terms}]
    return next(iter([*matching, *_leading(axes)]), None)


def _size(operand: Operand, axis: int) -> str:
    return str(operand.node.meta["val"].shape[axis])


def _leading(axes: Iterable[int]) -> list[int]:
    return [axis for axis in axes if axis == 0]
