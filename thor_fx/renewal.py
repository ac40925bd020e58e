"""What lies between a measured factor and an inverse: running averages, and the rule that says when.

:mod:`thor_fx.averages`, :mod:`thor_fx.refresh_rules` and :mod:`thor_fx.trace_rule` behind one interface.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .averages import Averages, as_kept, enter, nothing_yet
from .inverses import Pair
from .layers import Layer
from .overlap import Overlap
from .refresh_rules import ByTrace, RefreshRule, inversion_costs, portion_due, portions
from .trace_rule import Watch, decide, nothing_seen, observe
from .transform import Taken


class Memory(NamedTuple):
    """What is kept of the factors.

    Attributes:
        averages: of the factors.
        watch: what :class:`~thor_fx.ByTrace` remembers; () without.
        damping: ``lambda`` of the last step in which factors entered, 0-D, for an inversion that comes
            later (:mod:`thor_fx.overlap`); infinite before, so that it fails; () without.
    """

    averages: Averages
    watch: Watch | tuple[()] = ()
    damping: Tensor | tuple[()] = ()


class Choice(NamedTuple):
    """What a rule says after a step.

    Attributes:
        wanted: the layers to recompute.
        memory: from then on.
        due: when factors are due next; None: no change.
    """

    wanted: Collection[str]
    memory: Memory
    due: int | None = None


@dataclass(frozen=True)
class Renewal:
    """How factors become those that are inverted, and when.

    Attributes:
        decay: of the running averages, in [0, 1).
        rule: which layers are recomputed after which step; None: all, in every factor step.
            :class:`~thor_fx.overlap.Overlap` recomputes all, and never asks :meth:`choose`.
        frequency: steps between factor steps.
        block_size: side of the blocks that are inverted; None: whole factors.
    """

    decay: float
    rule: RefreshRule | Overlap | None
    frequency: int
    block_size: int | None

    def init(self, layers: Mapping[str, Layer], like: Mapping[str, Tensor]) -> Memory:
        """The memory before the first step, by layer in the dtype of ``like`` and on its device."""
        averages = nothing_yet(layers, self.block_size, like)
        if isinstance(self.rule, Overlap):
            return Memory(averages, damping=averages.weights.new_full((), torch.inf))
        if not isinstance(self.rule, ByTrace):
            return Memory(averages)
        return Memory(averages, nothing_seen(len(layers), self.frequency, averages.weights))

    def kept(self, groups: Mapping[str, list[Layer]]) -> dict[str, list[Layer]]:
        """The layers with the sides that their averages are kept in."""
        return {key: [as_kept(layer, self.block_size) for layer in layers] for key, layers in groups.items()}

    def inverted(self, present: set[str], refreshes: frozenset[str] | None) -> set[str]:
        """The layers to invert in a step, of those that have factors; without a rule all."""
        return present if self.rule is None or refreshes is None else present & refreshes

    def measure(
        self,
        memory: Memory,
        layers: Mapping[str, Layer],
        present: Collection[str],
        renewed: Collection[str],
        measured: Callable[[Layer], Pair],
        lam: Tensor | float,
    ) -> tuple[Memory, Tensor]:
        """Let the factors of one batch enter.

        Args:
            memory: before.
            layers: all layers.
            present: which of them have factors in this step.
            renewed: which of them are inverted in this step.
            measured: the factor pair of a layer.
            lam: the damping ``lambda`` of this step.

        Returns:
            The memory, and of how many layers the factors were not finite and did not enter, 0-D.
        """
        averages, finite = enter(memory.averages, layers, present, measured, self.decay, self.block_size)
        lost = torch.stack([~entered for entered in finite.values()]).sum()
        memory = memory._replace(averages=averages)
        if isinstance(memory.damping, Tensor):
            damping = (torch.zeros_like(memory.damping) + lam).to(memory.damping.dtype)
            memory = memory._replace(damping=damping)
        if isinstance(memory.watch, Watch):
            watch = observe(memory.watch, averages, layers, finite, renewed, self.block_size)
            memory = memory._replace(watch=watch)
        return memory, lost

    def choose(
        self,
        memory: Memory,
        layers: Mapping[str, Layer],
        lam: Tensor | float,
        taken: Taken,
        failing: Callable[[], Tensor],
    ) -> Choice:
        """The layers to recompute after a step; :class:`~thor_fx.ByTrace` waits for the device.

        ``failing``: which layers have blocks whose last attempt failed, (layers,).
        """
        if isinstance(self.rule, ByTrace):
            if not taken.measured:
                return Choice((), memory)
            assert isinstance(memory.watch, Watch)
            known = memory.watch, layers, taken.ready, lam, failing(), taken.step
            wanted, watch, due = decide(self.rule, *known)
            return Choice(wanted, memory._replace(watch=watch), due)
        assert self.rule is not None
        assert not isinstance(self.rule, Overlap)
        portion = portion_due(self.rule, taken.step, self.frequency)
        if portion is None:
            return Choice((), memory)
        members = portions(self.rule, inversion_costs(layers, self.block_size))[portion]
        return Choice(taken.ready.intersection(members), memory)
