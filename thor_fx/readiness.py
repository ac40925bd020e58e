"""Which layers of a model have had factors, and how long to look for those of the others.

A layer that never had factors has no inverse and stands still. That is so after a first step that was
skipped, and in a branch of the model that no factor step has used.
"""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from .layers import Layer

PATIENCE = 10
"""Steps that collect factors for a layer that has none; more would make a rare branch expensive."""


class Readiness:
    """What is known of the layers and parameters of one optimizer.

    Attributes:
        ready: layers that had factors in a step that was not skipped.
        unknown: parameters that no compiled graph uses.
        unfound: layers and parameters that graphs had used when a state was saved, and no graph does since it
            was loaded: of a branch that has not been taken again. Nothing that is known of them is dropped.
        recorded: whether ``ready`` has been kept; else a state says nothing of it.
    """

    def __init__(self) -> None:
        self.ready: set[str] = set()
        self.unknown: set[str] = set()
        self.unfound: set[str] = set()
        self.recorded = True
        self._layers: set[str] = set()  # that graphs use
        self._waiting: dict[str, int] = {}  # layers and parameters without factors, and until when
        self._longest = 0  # the latest of these steps

    def saved(self, trained: Collection[str]) -> dict[str, Any]:
        """What a state dict holds of it; ``trained``: the parameters that graphs use."""
        used = sorted({*trained, *self.unfound})
        return {"ready": sorted(self.ready), "waiting": dict(self._waiting), "used": used}

    def load(self, saved: Mapping[str, Any] | None, layers: set[str], used: set[str]) -> None:
        """Continue with what was saved; None: with a state that does not say.

        Args:
            saved: what :meth:`saved` returned.
            layers: that have a state.
            used: the layers and parameters that graphs are known to use already.
        """
        known: Mapping[str, Any] = {"ready": [], "waiting": {}, "used": []} if saved is None else saved
        self.recorded = saved is not None
        self.ready, self._waiting = set(known["ready"]), dict(known["waiting"])
        self._longest = max(self._waiting.values(), default=0)
        self.unfound = layers.union(known["used"]) - used
        self._layers = used

    def restart(self, layers: Collection[str], unknown: set[str], used: Collection[str]) -> bool:
        """Go on with other layers.

        Args:
            layers: that graphs use.
            unknown: the parameters that none does.
            used: those that one does.

        Returns:
            Whether there are layers among them that no graph had used, neither before a state was saved.
        """
        grown = not {*self._layers, *self.unfound}.issuperset(layers)
        self.unknown, self._layers = unknown, set(layers)
        self.unfound.difference_update(layers, used)
        names = {*layers, *unknown, *self.unfound}
        self.ready &= names
        self._waiting = {name: last for name, last in self._waiting.items() if name in names}
        return grown

    def standing(self, layers: Mapping[str, Layer], gradients: Mapping[str, Tensor]) -> set[str]:
        """The layers that have gradients but stand still."""
        if self.ready.issuperset(layers):
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
        return self.waits(step)

    def waits(self, step: int) -> bool:
        """Whether, after step ``step``, anything is waited for."""
        if step >= self._longest:
            return False
        return any(step < last for name, last in self._waiting.items() if name not in self.ready)
