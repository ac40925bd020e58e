"""Compute activations again in backward where that is cheaper than to keep them.

In one graph with forward and backward, all that backward reads is kept until then. The min-cut partitioner
of ``torch.compile`` finds the values to keep that are small and from which the others, pointwise ones for the
most part, are cheap to compute. It also does what ``torch.utils.checkpoint`` asks for.

Afterwards the graph returns what it returned before; where it is interpreted, bit for bit. Random numbers are
drawn once, in the order that they were drawn in. A graph stays as it is where its backward starts at no
constant, where it has side effects in an order (the checks of ``torch.linalg``, prints, writes), where draws
would change their order, and, with a warning, where torch's partitioner fails.
"""

from torch import fx

from .partitioner import CannotSplit, PartitionerFailed, forget_wishes, split
from .passes.splice import Decompositions
from .passes.stitch import OrderError, stitch
from .warn import warn


def recompute(gm: fx.GraphModule, *, decompositions: Decompositions | None = None) -> None:
    """Rewrite a step graph, with or without factors and before its update, in place.

    Args:
        gm: a step graph.
        decompositions: operators to take apart: parts of them are cheap to compute again (the scaling of a
            batch norm, say) where the whole is not. They should be those of the compiler that comes after.
    """
    try:
        stitch(gm, split(gm, decompositions))
        forget_wishes(gm)
    except PartitionerFailed as error:
        warn(f"thor_fx: the step keeps all activations, for {error}: please report")
    except (CannotSplit, OrderError):
        pass  # all activations are kept
