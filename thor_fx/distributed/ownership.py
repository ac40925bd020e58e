"""Who owns what, as an optimizer knows it: factors on their way to the owners of dealt-out parameters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..factors import Moments, flat_moments, moments_of
from ..layers import Coverage
from ..options import Options
from ..passes.outputs import Factor
from ..transform import Params
from .averaging import Averaging
from .collectives import World
from .dtensors import box_of, is_part
from .faults import waiting_for_others
from .owned import check_all_here, check_rows, deal_out, step_flops
from .parts import Parts


@dataclass(frozen=True)
class Ownership:
    """The owners of the parameters of one model.

    Attributes:
        parts: who has what, and who owns what.
        averaging: how factors travel.
        found: the layers.
    """

    parts: Parts
    averaging: Averaging
    found: Coverage

    def send(self, factors: Mapping[Factor, Tensor]) -> Callable[[], dict[Factor, Tensor]]:
        """Begin to add up factors over all ranks; what is returned waits for those of this rank's own layers.

        All ranks call this together, in one order.
        """
        waiting = partial(waiting_for_others, self.parts.world, "to add up factors")
        with waiting(), torch.no_grad():
            arrived = self.averaging.sums(factors, self.found, {})

        def awaited() -> dict[Factor, Tensor]:
            with waiting(), torch.no_grad():
                return arrived()

        return awaited

    def at_owners(self, moments: Mapping[str, Moments]) -> dict[str, Moments]:
        """Moments of the rows of this rank, with factors of all rows where this rank owns them."""
        flat = flat_moments(moments)
        factors = {d: value for d, value in flat.items() if isinstance(d, Factor)}
        counts = {d: value for d, value in flat.items() if d not in factors}
        return moments_of(counts | self.send(factors)())


def ownership(world: World | None, options: Options, params: Params, found: Coverage) -> Ownership | None:
    """Who owns what; None where every rank has all of every parameter. All ranks call this together.

    Args:
        world: the ranks.
        options: of the optimizer, with a block size that is a number or None.
        params: with their gradients.
        found: the layers.

    Raises:
        ValueError: ranks that have parts of a parameter are not in ``world``, or its rows are dealt out.
    """
    parts = {name: p for name, p in params.items() if is_part(p)}
    if world is None:  # this rank is all there is, or should be
        for name, p in parts.items():
            check_all_here(name, tuple(p.shape), [box_of(p)])
    if world is None or not parts:
        return None
    check_rows(params, found)
    dealt = deal_out(world, params, found, step_flops(options, found))
    averaging = Averaging(world, options.split_indices, options.reduce_dtype, readers=dealt.readers)
    return Ownership(dealt, averaging, found)
