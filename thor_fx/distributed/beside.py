"""Factors of a model in DistributedDataParallel travel beside the rest of its backward.

NOTE: [Rounds] Whoever adds up over ranks needs all of them to start the same sums in the same order, or they
wait for each other without end. What a rank sees of its own backward is no such order: another may have
compiled other graphs (a batch of another shape), run others (a branch that depends on data), or accumulated
more passes. So all that depends on a rank is *when* it starts a sum:

* What is sent is a *round*: every bucket of a plan, one after the other. The plan follows from what all ranks
  have agreed on before the first step, and the order from nothing else. Where a rank has no factor, it sends
  zeros. A round takes what has been accumulated, so nothing of the plan is left behind.
* There are as many rounds in a step as passes in which DDP averages gradients and factors are due. DDP
  finishes such a pass only when every parameter has its gradient on every rank, so one parameter can count
  them. What of a round has not left by the next one, or by the step, leaves then.
* A bucket leaves early when this pass has made the last of its factors. All graphs that make one deliver it
  into one leaf, and autograd adds up all that goes into a leaf before it tells of it: once in a pass.
* The group is one of its own, so that it does not matter in which order these sums and DDP's are started.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from ..layers import Coverage
from ..options import Options
from ..parameter_groups import ParameterGroups
from ..passes.outputs import Factor
from ..transform import Params
from .agreement import agreed
from .averaging import Averaging
from .collectives import World, own_group
from .distribute import factor_readers
from .factor_sums import Bucket
from .sending import Sending


@dataclass(frozen=True)
class Lane:
    """What the ranks have agreed on for all plans.

    Attributes:
        world: the ranks, in a group of its own.
        places: by layer, the place of the graph that makes its factors; backward comes from the last one.
        wrapper: averages the gradients.
    """

    world: World
    places: Mapping[str, int]
    wrapper: DistributedDataParallel

    @property
    def counted(self) -> Tensor:
        """A parameter of which every pass that DDP averages makes one gradient."""
        known = self.wrapper.module.named_parameters()
        left_out = self.wrapper.parameters_to_ignore
        return next(p for name, p in known if p.requires_grad and name not in left_out)

    @property
    def averages(self) -> bool:
        """Whether DDP averages the gradients of the pass that is running: as its last forward has set it."""
        return bool(self.wrapper.require_forward_param_sync)

    def sending(self, options: Options, groups: ParameterGroups, found: Coverage, params: Params) -> Sending:
        """How factors of these layers travel.

        Args:
            options: of the optimizer, with a block size that is a number or None.
            groups: of the parameters.
            found: the layers.
            params: by name.
        """
        readers = factor_readers(options, groups, self.world)
        averaging = Averaging(self.world, options.split_indices, options.reduce_dtype, readers=readers)
        return Sending(averaging, found, params)

    def plan(self, sending: Sending, slots: Mapping[Factor, Tensor]) -> list[Bucket]:
        """The buckets of a round: no two graphs share one, unless ``split_indices`` says so."""
        graphs: dict[int, list[str]] = {}
        for name in sending.found.layers:
            graphs.setdefault(self.places.get(name, -1), []).append(name)  # -1: was found later
        if sending.averaging.split_indices is not None:
            graphs = {0: [*sending.found.layers]}
        parts = [_part(sending.found, graphs[place]) for place in sorted(graphs, reverse=True)]
        return [bucket for part in parts for bucket in reversed(sending.buckets(slots, part))]


def lane(world: World, wrapper: DistributedDataParallel, places: Callable[[], Mapping[str, int]]) -> Lane:
    """The way of the factors of one model. All ranks call this together.

    Args:
        world: the ranks.
        wrapper: averages the gradients.
        places: by layer, the place of the graph that makes its factors on this rank; that of rank 0 counts.
    """
    return Lane(own_group(world), agreed(world, places), wrapper)


@dataclass(eq=False)
class Beside:
    """The rounds of one plan; see NOTE: [Rounds].

    Attributes:
        lane: where they travel.
        sending: how.
        slots: where the factors of this rank are delivered.
        due: whether factors are due in this pass; the same on all ranks.
    """

    lane: Lane
    sending: Sending
    slots: Mapping[Factor, Tensor]
    due: Callable[[], bool]

    _plan: list[Bucket] = field(default_factory=list)
    _made: set[Factor] = field(default_factory=set)  # in this round
    _sent: int = 0  # buckets of this round
    _rounds: int = 0  # that are over
    _passes: int = 0  # that want one
    _arriving: list[Callable[[], dict[Factor, Tensor]]] = field(default_factory=list)
    _hooks: list[RemovableHandle] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Listen to backward."""
        self._plan = self.lane.plan(self.sending, self.slots)
        me = weakref.ref(self)  # what a parameter holds lives as long as the parameter
        hooks = {self.slots[d]: partial(_made, me, d) for bucket in self._plan for d in bucket}
        hooks[self.lane.counted] = partial(_passed, me)
        self._hooks = [leaf.register_post_accumulate_grad_hook(hook) for leaf, hook in hooks.items()]

    @property
    def readers(self) -> Mapping[str, int]:
        """By layer, the rank that alone reads its factors; all ranks read the others."""
        return self.sending.readers

    def settle(self) -> dict[Factor, Tensor]:
        """Send what is left of the rounds since the last call, and wait for the factors that are read here.

        All ranks call this together.
        """
        if self._made:
            self._finish()
        while self._rounds < self._passes:
            self._finish()
        arrived = [awaited() for awaited in self._arriving]
        self._arriving, self._rounds, self._passes = [], 0, 0
        sums: dict[Factor, Tensor] = {}
        for factors in arrived:
            sums |= {d: sums[d] + value if d in sums else value for d, value in factors.items()}
        return sums

    def close(self) -> None:
        """Listen no more."""
        for hook in self._hooks:
            hook.remove()

    def passed(self) -> None:
        """A pass has made the gradient that is counted."""
        self._passes += int(self.lane.averages and self.due())

    def made(self, factor: Factor) -> None:
        """A pass has made a factor, and added it to what was there."""
        if not self.lane.averages:
            return
        if factor in self._made:  # this is the next pass
            self._finish()
        self._made.add(factor)
        while self._sent < len(self._plan) and self._made.issuperset(self._plan[self._sent]):
            self._send()

    def _finish(self) -> None:
        while self._sent < len(self._plan):
            self._send()
        self._made.clear()
        self._rounds, self._sent = self._rounds + 1, 0

    def _send(self) -> None:
        bucket = self._plan[self._sent]
        self._sent += 1
        factors = {factor: _taken(self.slots[factor]) for factor in bucket}
        self._arriving.append(self.sending.send(factors, [bucket]))


def _passed(beside: Callable[[], Beside | None], _parameter: Tensor) -> None:
    known = beside()
    if known is not None:
        known.passed()


def _made(beside: Callable[[], Beside | None], factor: Factor, _slot: Tensor) -> None:
    known = beside()
    if known is not None:
        known.made(factor)


def _taken(slot: Tensor) -> Tensor:
    """What has been accumulated in a slot, which is empty then."""
    factor, slot.grad = slot.grad, None
    return slot.new_zeros(slot.shape) if factor is None else factor


def _part(found: Coverage, names: Sequence[str]) -> Coverage:
    return replace(found, layers={name: found.layers[name] for name in names})
