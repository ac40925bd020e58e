"""What the next forward pass is for: to measure factors, only to look for layers, or neither.

Factors are due in every ``frequency``-th step, or from the step on that a refresh rule has named. They are
wanted besides where they were due and there were none, and where a layer waits for its first ones
(:mod:`thor_fx.readiness`). As long as graphs are missing that the state knows, every pass looks for them.
"""

from collections.abc import Collection, Mapping, Sequence, Set
from typing import Any

from torch import nn

from .collector import Collector
from .factors import Moments
from .layers import Coverage
from .options import Options
from .readiness import Readiness
from .warn import warn

NO_FACTORS = (
    "a factor step found no factors (was the model in evaluation mode?): the last inverses are used until "
    "there are some. It is so too where torch has stopped compiling the model: it says that it hit "
    "config.recompile_limit"
)
NO_LAYERS = (
    "no weight has factors, so all of them take the first-order rule: thor_fx.explain says why, and "
    "layer_filter may leave out fewer"
)

Groups = Sequence[dict[str, Any]]
"""The groups of parameters of an optimizer."""


def set_due(groups: Groups, step: int | None) -> None:
    """Ask for factors from step ``step`` on; None: as ``frequency`` says."""
    for group in groups:
        group["due"] = step


class Demand:
    """What one optimizer wants of the passes of its model.

    Args:
        model: whose parameters graphs use.
        collector: is told what the next pass is for.
        known: the layers that have had factors.
        options: how often factors are due, and whether a refresh rule may change that.
    """

    def __init__(self, model: nn.Module, collector: Collector, known: Readiness, options: Options) -> None:
        self._model, self._collector = model, collector
        self._known, self._options = known, options
        self._overdue = False  # factors were due, and there were none, or the step was skipped
        self._warned = False

    def scheduled(self, groups: Groups, step: int) -> bool:
        """Whether factors are due in a step."""
        due = groups[0].get("due")
        return step % self._options.frequency == 0 if due is None else step >= due

    def restart(self, groups: Groups, layers: Collection[str], params: Set[str]) -> None:
        """Go on with other layers; where a graph shows new ones, back to the schedule.

        Args:
            groups: of parameters.
            layers: that graphs use.
            params: all parameters.
        """
        assert self._collector.coverage is not None, "there are layers"
        trained = self._collector.coverage.trained
        if self._known.restart(layers, {*params} - trained, trained):
            set_due(groups, None)

    def met(self, groups: Groups, step: int, moments: Mapping[str, Moments], *, lost: bool) -> bool:
        """Whether step ``step`` is a factor step. One that has no factors is told of once, and made up for.

        Args:
            groups: of parameters.
            step: that is being taken.
            moments: what has been measured.
            lost: whether what has been measured was of no use.
        """
        due = self._overdue or self.scheduled(groups, step)
        missing, found = due and not moments, self._collector.coverage
        none_at_all = found is not None and not found.layers
        self._overdue = missing and not none_at_all
        if missing and not self._warned and not lost:
            self._warned = True
            warn(NO_LAYERS if none_at_all else NO_FACTORS)
        return due

    def miss(self) -> None:
        """The step that had factors was skipped: the next has to have some."""
        self._overdue = True

    def ask(self, groups: Groups, step: int, *, waits: bool) -> None:
        """Say what the forward pass of step ``step`` is to do.

        Args:
            groups: of parameters.
            step: that comes next.
            waits: whether a layer waits for its first factors.
        """
        measures = self._overdue or waits or self.scheduled(groups, step)
        found = self._collector.coverage
        lost = found is None or bool(self._known.unfound)
        self._collector.looks = self._looked_for(found) if lost and not measures else None
        self._collector.wanted = lost or measures

    def saved(self) -> dict[str, Any]:
        """What a state dict holds of it, and of the layers that have had factors."""
        found = self._collector.coverage
        readiness = self._known.saved(() if found is None else found.trained)
        return {**readiness, "overdue": self._overdue}

    def load(self, groups: Groups, kept: set[str]) -> None:
        """Continue with what was saved.

        Args:
            groups: as they were loaded; the first loses ``readiness``, which :meth:`saved` had returned.
            kept: the layers that the state has inverses or factors of.
        """
        saved = groups[0].pop("readiness", None)  # older states do not say
        found = self._collector.coverage
        used = set() if found is None else {*found.layers, *found.trained}
        if saved is not None and not kept:
            saved = {**saved, "ready": []}  # inverses were taken out of the state, to start anew
        self._known.load(saved, kept, used)
        self._overdue = saved is not None and saved["overdue"]
        if self._options.refresh is None:
            set_due(groups, None)  # was the word of a rule; this time there is none

    def _looked_for(self, found: Coverage | None) -> frozenset[str]:
        """The parameters that graphs had used when the state was saved; all, where it does not say."""
        if not self._known.recorded:
            return frozenset(name for name, _ in self._model.named_parameters())
        used = {name.partition("[")[0] for name in self._known.unfound}
        return frozenset(used if found is None else used | found.trained)
