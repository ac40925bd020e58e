"""The update of parameters of which every rank has a part (FSDP2, tensor parallel).

Preconditioning needs whole gradients: every entry of the result depends on a whole row and column. So each
layer, and each parameter outside of layers, has an owner: the one rank that keeps its averages, inverses and
momentum, and makes its update as one process would. Other ranks have nothing of it but their parts of the
parameter. A step sends gradients and parameters to owners and updates back: each number of the model crosses
the network three times (an update once for each replica), so a rank sends about ``3/W`` of the model. For the
step itself FSDP lets every rank send nearly all of it three times: two gatherings and a reduction.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import networkx as nx
from torch import Tensor
from torch.utils import _pytree as pytree

from ..inverses import METHODS
from ..layers import Coverage
from ..options import CANNOT_SHARE, Options
from ..per_coverage import PerCoverage
from ..refresh_rules import dealt
from ..transform import Params, Signals, State, Taken, Transform, Updates, after, resolving
from .boxes import Box
from .collectives import World
from .dtensors import box_of, is_partial
from .parts import Parts

ELEMENTWISE_FLOPS = 10
"""What momentum, decay and the like take for every number, roughly."""


def deal_out(world: World, params: Params, coverage: Coverage, costs: Mapping[str, int]) -> Parts:
    """Who has what, and who owns what. All ranks call this together.

    Args:
        world: the ranks.
        params: every rank's parts of them, which say their whole shapes.
        coverage: parameters of one layer have one owner.
        costs: by layer, see :func:`step_flops`.

    Raises:
        ValueError: see :func:`check_all_here`.
    """
    everybodys = world.everybodys({name: box_of(p) for name, p in params.items()})
    boxes = {name: [own[name] for own in everybodys] for name in params}
    shapes = {name: tuple(p.shape) for name, p in params.items()}
    for name, shape in shapes.items():
        check_all_here(name, shape, set(boxes[name]))
    return Parts(world, shapes, boxes, owners(world.size, shapes, coverage, costs))


def check_owned(options: Options) -> None:
    """Refuse options that need on every rank what its owner alone has.

    Raises:
        ValueError: naming the option.
    """
    text = "parameters are dealt out over ranks, and so is what is kept of them: "
    if options.work_sharing == "inverse":
        raise ValueError(f"{text}work_sharing='inverse' keeps all inverses on all ranks; leave it out")
    if "gradient" not in options.sharable:
        raise ValueError(f"{text}no rank can have {CANNOT_SHARE['gradient']}; use others")


def check_all_here(name: str, shape: tuple[int, ...], boxes: Collection[Box]) -> None:
    """Refuse a parameter of which some ranks have parts that do not train together with this one.

    Raises:
        ValueError: naming the parameter.
    """
    if sum(box.numel for box in boxes) != math.prod(shape):
        raise ValueError(
            f"process_group must contain all ranks that have a part of {name!r}: its own have some of it only"
        )


def check_rows(params: Params, coverage: Coverage) -> None:
    """Refuse layers of which ranks have the same weight and other rows: nobody knows how many share rows.

    Raises:
        ValueError: naming the layer; ``params`` have gradients.
    """
    for name, layer in coverage.layers.items():
        if is_partial(params[layer.param].grad):
            raise ValueError(
                f"the rows of {name!r} are dealt out over ranks that have all of its weight "
                "(sequence parallel): plan it as ColwiseParallel or RowwiseParallel, or leave it out with "
                "layer_filter="
            )


def step_flops(options: Options, coverage: Coverage) -> dict[str, int]:
    """What every layer takes in a step, on average, of inversion and of preconditioning."""
    assert options.block_size != "auto"
    work, size = METHODS[options.inverse].work, options.block_size
    every = {name: work(layer, size) for name, layer in coverage.layers.items()}
    return {n: own.refresh_flops // options.frequency + own.step_flops for n, own in every.items()}


def owners(
    ranks: int, shapes: Mapping[str, tuple[int, ...]], coverage: Coverage, costs: Mapping[str, int]
) -> dict[str, int]:
    """The rank that owns every parameter, so that all have like work (:func:`~thor_fx.refresh_rules.dealt`).

    Example:
        >>> nothing = Coverage({}, (), {})
        >>> owners(2, {"w": (4, 4), "b": (4,), "c": (8,)}, nothing, {})
        {'w': 0, 'b': 1, 'c': 1}
    """
    units = nx.Graph()
    units.add_nodes_from(shapes)
    for layer in coverage.layers.values():
        units.add_edges_from((layer.param, name) for name in layer.params if name in shapes)
    members = {min(unit): unit for unit in nx.connected_components(units)}
    numbers = {name: sum(math.prod(shapes[p]) for p in unit) for name, unit in members.items()}
    work = {name: ELEMENTWISE_FLOPS * count for name, count in numbers.items()}
    unit_of = {param: name for name, unit in members.items() for param in unit}
    for name, layer in coverage.layers.items():
        work[unit_of[layer.param]] += costs[name]
    found = {name: rank for rank, hand in enumerate(dealt(work, ranks)) for name in hand}
    return {param: found[unit_of[param]] for param in shapes}


def by_owners(inner: Transform, parts: Parts) -> Transform:
    """Let the owner of every parameter make its update, and give all ranks their parts of that.

    Args:
        inner: sees whole gradients and parameters: those that this rank owns.
        parts: who has what.
    """
    held: PerCoverage[Coverage] = PerCoverage()
    stand_ins: PerCoverage[dict[str, Tensor]] = PerCoverage()

    def told(signals: Signals) -> Signals:
        whole = signals.coverage
        mine = held.get(whole, None, lambda: whole.restrict(parts.own))
        return dataclasses.replace(signals.within(mine), world=parts.world)

    def init(params: Params, coverage: Coverage) -> State:
        return inner.init(parts.stand_ins(params), coverage.restrict(parts.own))

    def update(updates: Updates, state: State, params: Params, signals: Signals) -> tuple[Updates, State]:
        gradients, values = parts.to_owners(updates), parts.to_owners(params)
        new, state = inner.update(gradients, state, values, told(signals))
        return parts.to_holders(new, updates), state

    def between(state: State, params: Params, signals: Signals, taken: Taken) -> tuple[State, int | None]:
        own = told(signals)
        known = stand_ins.get(signals.coverage, None, lambda: parts.stand_ins(params))
        return after(inner, state, known, own, taken.within(own.coverage))

    hook = None if inner.between is None else between
    resolve = resolving(partial(by_owners, parts=parts), [inner])
    return inner._replace(init=init, update=update, between=hook, resolve=resolve)


def moved(parts: Parts, entries: Mapping[str, Any]) -> dict[str, Any]:
    """The state of this rank's own parameters that another rank has. All ranks call this together.

    Owners change where layers are found later: every other rank's state is asked for then, as a whole.

    Args:
        parts: who owns what now.
        entries: nests of tensors by parameter, those that this rank has.
    """
    known = parts.world.everybodys({name for name, entry in entries.items() if entry})
    missing = {
        name: rank
        for rank, names in enumerate(known)
        for name in sorted(names)
        if name not in known[parts.owners[name]]
    }
    sent = {name: entries[name] for name, rank in missing.items() if rank == parts.world.rank}
    everybodys = parts.world.everybodys(pytree.tree_map_only(Tensor, Tensor.clone, sent))
    return {name: entry for some in everybodys for name, entry in some.items() if name in parts.own}
