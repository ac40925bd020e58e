"""What an error means that a rank gets because another one is gone."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from .collectives import World


@contextmanager
def waiting_for_others(world: World | None, where: str) -> Iterator[None]:
    """Say in an error of a collective what happened: all that a backend knows is that nobody answers.

    Args:
        world: the ranks; None: there are no others, and nothing is said.
        where: this happens.

    Raises:
        RuntimeError: what was raised inside, with a note.
    """
    try:
        yield
    except RuntimeError as error:
        if world is not None and _is_of_a_collective(error):
            error.add_note(_explained(world, where))
        raise


def _explained(world: World, where: str) -> str:
    return (
        f"Rank {world.rank} was waiting for the other ranks ({world.size} in all) {where}, and one of them "
        "has ended or did not answer within init_process_group(timeout=...). The cause is in the output of "
        "the rank that failed first. All ranks have to start again, from the last checkpoint: "
        "docs/distributed.md"
    )


def _is_of_a_collective(error: RuntimeError) -> bool:
    """Gloo has no class of errors of its own, but names its sources."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)
