"""The update of one process becomes that of all."""

from dataclasses import replace
from typing import Any

from ..options import Options
from ..parameter_groups import ParameterGroups
from ..transform import Transform
from .averaging import Averaging, average_over_ranks
from .collectives import World
from .exchange import Exchange
from .parts import Parts
from .readers import Owners, Readers, everybody
from .work import SharedWork


def for_one_rank(options: Options, world: World | None, copies: int = 1) -> Options:
    """The options of the transform that sees the averages: ``n`` counts the terms of all ranks.

    ``copies``: how many ranks see the same rows.
    """
    if world is None or options.batch_size is None:
        return options
    return replace(options, batch_size=options.batch_size * world.size // copies)


def shared_work(options: Options, world: World | None) -> SharedWork | None:
    """How the ranks share the work; None where each does all of it, or the block size is not known yet."""
    if world is None or options.block_size == "auto" or options.work_sharing == "none":
        return None
    if options.inverse == "eva":  # has nothing to invert
        return None
    exchange = Exchange(world, options.inverse, options.block_size)
    return SharedWork(exchange, options.work_sharing, options.frequency, options.sharable)


def factor_readers(options: Options, groups: ParameterGroups, world: World | None) -> Readers:
    """Who reads the factors, where every rank has all parameters."""
    work = shared_work(options, world)
    return everybody if work is None else Owners(work, groups)


def distribute(
    tx: Transform,
    options: Options,
    groups: ParameterGroups,
    world: World | None,
    *,
    gradients: bool,
    copies: int = 1,
    parts: Parts | None = None,
    arrived: bool = False,
) -> Transform:
    """Let a transform see what all ranks have measured.

    Args:
        tx: the update, made for :func:`for_one_rank`.
        options: as the user gave them.
        groups: of the parameters.
        world: the ranks; None: there are no others, and nothing happens.
        gradients: whether gradients have to be averaged, too.
        copies: how many ranks see the same rows.
        parts: who owns what, where parameters are dealt out over ranks.
        arrived: whether factors have been added up before the update (:mod:`.sending`).
    """
    if world is None:
        return tx
    readers = factor_readers(options, groups, world) if parts is None else parts.readers
    averaging = Averaging(
        world,
        options.split_indices,
        options.reduce_dtype,
        gradients,
        copies=copies,
        readers=readers,
        arrived=arrived,
    )
    known, all_ranks = tx.resolve, average_over_ranks(tx, averaging)._replace(options=options)
    if known is None:
        return all_ranks

    def resolve(block_size: int | None) -> Transform:
        chosen, own = replace(options, block_size=block_size), known(block_size)
        ranks: dict[str, Any] = {"gradients": gradients, "copies": copies, "parts": parts, "arrived": arrived}
        return distribute(own, chosen, groups, world, **ranks)

    return all_ranks._replace(resolve=resolve)
