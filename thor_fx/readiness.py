"""Which layers of a model have had factors, and how long to look for those of the others.

A layer that never had factors has no inverse and stands still. That is so after a first step that was
skipped, and in a branch of the model that no factor step has used.
"""

from collections.abc import Collection, Mapping

from torch import Tensor

from .layers import Layer

PATIENCE = 10
"""Steps that collect factors for a layer that has none; more would make a rare branch expensive."""


class Readiness:
    """What is known of the layers and parameters of one optimizer.

    Attributes:
        ready: layers that had factors in a step that was not skipped.
        unknown: parameters that no compiled graph uses.
    """

    def __init__(self) -> None:
        self.ready: set[str] = set()
        self.unknown: set[str] = set()
        self._waiting: dict[str, int] = {}  # layers and parameters without factors, and until when
        self._longest = 0  # the latest of these steps

    def restart(self, layers: Collection[str], unknown: set[str]) -> None:
        """Begin again for other layers; how long is waited for one does not begin again."""
        self.ready, self.unknown = set(), unknown
        self._waiting = {n: last for n, last in self._waiting.items() if n in layers or n in unknown}

    def standing(self, layers: Mapping[str, Layer], gradients: Mapping[str, Tensor]) -> set[str]:
        """The layers that have gradients but stand still."""
        if len(self.ready) == len(layers):
            return set()
        return {name for name, layer in layers.items() if layer.param in gradients} - self.ready

    def wait(self, standing: set[str], served: set[str], gradients: Mapping[str, Tensor], step: int) -> bool:
        """Whether to collect factors in the next step, whatever the schedule says.

        So it is for :data:`PATIENCE` steps after a layer was seen without factors, or a parameter that no
        graph is known to use; and as long as steps that have factors are skipped.

        Args:
            standing: layers that stood still.
            served: those of them that had factors in this step.
            gradients: by parameter.
            step: the number of this step.
        """
        for name in standing | {name for name in self.unknown if name in gradients}:
            if name in served or name not in self._waiting:
                self._waiting[name] = step + PATIENCE
                self._longest = max(self._longest, step + PATIENCE)
        if step >= self._longest:
            return False
        return any(step < last for name, last in self._waiting.items() if name not in self.ready)
