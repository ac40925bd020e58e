"""Weights that train although no compiled graph shows how they are used: they can have no factors.

Dynamo runs a function as it is where it gives up on it (a loop over FSDP modules, ``torch.compiler.disable``,
code behind a graph break that it cannot resume). Training goes on there, by the first-order rule. In a factor
step every compiled graph in use has shown itself: a weight that has a gradient and no graph is one of these.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from .layers import Coverage, CoverageError
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


class Unseen:
    """Looks for such weights until it has told of some.

    Args:
        layer_filter: which weights are to have factors; None: all that can.
    """

    def __init__(self, layer_filter: Callable[[str], bool] | None) -> None:
        self._allowed = layer_filter or (lambda _: True)
        self._told = False

    def look(self, reasons: Mapping[str, str], gradients: Mapping[str, Tensor], *, strict: bool) -> None:
        """In a factor step: say once which weights have a gradient and no graph, or refuse them.

        Raises:
            CoverageError: with ``strict``.
        """
        if self._told:
            return
        names = [name for name in unseen_weights(reasons, gradients) if self._allowed(name)]
        self._told = bool(names)
        if names:
            tell_unseen(names, strict=strict)


def complete(found: Coverage, params: Mapping[str, Tensor]) -> Coverage:
    """The coverage of some parameters, with a place for those that no compiled graph has used."""
    found = found.restrict(frozenset(params))
    others = {name: NO_GRAPH for name in params if name not in found.trained}
    return replace(found, fallback={**found.fallback, **others}, unused=())


def with_unseen(found: Coverage, params: Mapping[str, Tensor]) -> Coverage:
    """The coverage of a model, with those of its trained parameters that no compiled graph uses.

    They may be used between graphs: the loss can depend on them all the same.
    """
    others = params.keys() - found.trained - {*found.frozen}
    fallback = {**found.fallback, **dict.fromkeys(others, NO_GRAPH)}
    return replace(found, fallback=fallback, unused=tuple(n for n in found.unused if n not in others))
