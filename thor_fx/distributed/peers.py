"""The other ranks of one training, as an optimizer knows them: who they are, and what others average."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..layers import Coverage
from ..transform import Params, Transform
from ..warn import warn
from .agreement import check_ranks
from .beside import Lane, lane
from .wrappers import LATE, averager, averages_gradients, has_others, world_of_model


class Peers:
    """Who trains a model together with this process. All ranks make theirs together.

    Attributes:
        world: the ranks; None: there are no others.
        averages_gradients: whether it is left to the update to average gradients.
        averager: the wrapper beside whose backward factors can travel.
        lane: the way of these factors, once the ranks have agreed on it.

    Args:
        model: as it is called, in its wrapper.
        process_group: as the user says; None: see :func:`~thor_fx.distributed.wrappers.world_of_model`.

    Raises:
        TypeError: ``process_group`` is none.
        ValueError: ``process_group`` does not contain this process.
    """

    def __init__(self, model: nn.Module, process_group: Any) -> None:
        self.world = world_of_model(model, process_group)
        self.averages_gradients = not averages_gradients(model)
        self.averager = averager(model, self.world)
        self.lane: Lane | None = None
        self._had_others = has_others()
        self._compared = False

    def compare(
        self, tx: Transform, params: Params, found: Coverage, places: Callable[[], Mapping[str, int]]
    ) -> None:
        """Before the first step: refuse ranks that train something else, and agree on a way of factors.

        Args:
            tx: what this rank is about to do.
            params: by name.
            found: their coverage.
            places: by layer, the place of the graph that makes its factors on this rank.

        Raises:
            RanksDiffer: naming the difference.
        """
        if self._compared:
            return
        check_ranks(tx, params, found)
        if self.world is not None and self.averager is not None:
            self.lane = lane(self.world, self.averager, places)
        if self.world is None and has_others() and not self._had_others:
            warn(LATE)
        self._compared = True
