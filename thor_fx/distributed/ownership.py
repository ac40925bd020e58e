"""Who owns what, as an optimizer knows it: factors on their way to the owners of dealt-out parameters."""

from dataclasses import dataclass

from ..layers import Coverage
from ..options import Options
from ..transform import Params
from .averaging import Averaging
from .collectives import World
from .dtensors import box_of, is_part
from .owned import check_all_here, check_rows, deal_out, step_flops
from .parts import Parts
from .sending import Sending


@dataclass(frozen=True)
class Ownership:
    """The owners of the parameters of one model.

    Attributes:
        parts: who has what, and who owns what.
        sending: how owners get factors.
    """

    parts: Parts
    sending: Sending


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
    return Ownership(dealt, Sending(averaging, found, params))
