"""Weights that train although no compiled graph shows how they are used: they can have no factors.

Dynamo runs a function as it is where it gives up on it (a loop over FSDP modules, ``torch.compiler.disable``,
code behind a graph break that it cannot resume). Training goes on there, by the first-order rule. In a factor
step every compiled graph in use has shown itself: a weight that has a gradient and no graph is one of these.
"""

from collections.abc import Mapping

from torch import Tensor

from .layers import CoverageError
from .warn import warn

NO_GRAPH = "no compiled graph uses it"

ADVICE = (
    "Dynamo ran the code that uses them as it is: TORCH_LOGS=graph_breaks says why. If that is meant, leave "
    "them out with layer_filter="
)


def unseen_weights(reasons: Mapping[str, str], gradients: Mapping[str, Tensor]) -> list[str]:
    """The weights (two or more axes) with a gradient of which no graph is known.

    Args:
        reasons: why parameters take the first-order rule.
        gradients: those of one step, by parameter.
    """
    return [name for name, g in gradients.items() if g.dim() >= 2 and reasons.get(name) == NO_GRAPH]


def tell_unseen(names: list[str], *, strict: bool) -> None:
    """Warn of weights that no compiled graph uses, or refuse them.

    Raises:
        CoverageError: with ``strict``.
    """
    few = ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    if strict:
        raise CoverageError(f"strict=True, but no compiled graph uses the weights {few}. {ADVICE}")
    told = f"no compiled graph uses the weights {few}: they take the first-order rule. {ADVICE}"
    warn(told)
