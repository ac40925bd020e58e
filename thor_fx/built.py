"""What an optimizer derives from its groups of parameters and the graphs it has seen: its update.

Another group, layer, dtype or block size makes another update, whose state goes on where the old one was
(:mod:`thor_fx.starting`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .ahead import Ahead
from .between import run_between
from .blocks import BlockSize
from .collector import Collector
from .compiled_update import CompiledUpdate, Given
from .distributed.beside import Beside, Lane
from .distributed.collectives import World
from .distributed.distribute import distribute, for_one_rank, shared_work
from .distributed.dtensors import here
from .distributed.faults import waiting_for_others
from .distributed.owned import by_owners
from .distributed.ownership import Ownership, ownership
from .distributed.peers import Peers
from .distributed.sending import Sending
from .distributed.work import everything
from .group_members import check_replaced, named
from .hearing import Heard, Hearing
from .hyper import HyperTensors
from .layers import Coverage
from .links import thor_chain
from .options import Options
from .parameter_groups import ParameterGroups, Schedules
from .skipping import skip_nonfinite
from .transform import State, Taken, Transform, unscale
from .unseen import complete

NOTHING_SEEN = (
    "no compiled graph of the model has been seen: create Thor before the forward pass, call "
    "the model itself (not model.forward, nor torch.compile(model)) in training mode, and then "
    "backward. If you did, torch.compile captures nothing of this model: see "
    "TORCH_LOGS=graph_breaks"
)


@dataclass(eq=False)
class Built:
    """An update with its state, for the groups and layers that there are.

    Attributes:
        version: of the collector's coverage that it was made for.
        options: with the block size that has been chosen, or ``"auto"``.
        world: the ranks; None: there are no others.
        params: all parameters of all groups, by name.
        groups: their labels, and the schedules.
        found: their coverage.
        owners: who owns what, where parameters are dealt out over ranks.
        update: the compiled update, with its state.
        sending: how factors get to other ranks before the update; None: they do not, or in the update.
        dtype: of hyper-parameters.
        ahead: what is computed beside the steps that follow.
        hearing: hears of steps that were skipped.
    """

    version: int
    options: Options
    world: World | None
    params: Mapping[str, Tensor]
    groups: ParameterGroups
    found: Coverage
    owners: Ownership | None
    update: CompiledUpdate
    sending: Sending | None = None
    ahead: Ahead = field(default_factory=Ahead)
    hearing: Hearing = field(default_factory=Hearing)

    _hyper: HyperTensors = field(default_factory=HyperTensors)

    def __post_init__(self) -> None:
        """Remember what the parameters are now."""
        self.dtype = HyperTensors.dtype(self.params)
        self._form = self._form_now()

    @property
    def tx(self) -> Transform:
        """The transform of the update."""
        return self.update.tx

    @property
    def state(self) -> State:
        """The state of the update, written in place by every step."""
        return self.update.state

    @property
    def shares(self) -> bool:
        """Whether ranks may have inverses that others have not."""
        return self.owners is not None or self.options.work_sharing != "none"

    def fits(self, version: int) -> bool:
        """Whether it is for this version of the coverage, and for the parameters as they are now.

        They may have got another dtype or device since (``model.to``).
        """
        return self.version == version and self._form == self._form_now()

    def rates(self, values: Mapping[str, float | Tensor]) -> list[Tensor]:
        """The hyper-parameters of a step, as tensors in the order of their names."""
        return self._hyper({name: values[name] for name in self.tx.schedules}, self.params)

    def held(self) -> Callable[[Coverage, Mapping[str, Tensor]], Coverage]:
        """Of a coverage, what this rank has inverses of."""
        if self.owners is not None:
            return self.owners.parts.held
        work = shared_work(self.options, self.world)
        return everything if work is None else work.held

    def take(self, given: Given, rates: list[Tensor], step: int) -> Heard:
        """Take step ``step``; what is known then of it, and of earlier ones.

        All ranks call this together; ``rates`` is what :meth:`rates` returned.
        """
        with waiting_for_others(self.world, f"in step {step}"):
            self.update(given, rates)
        return self.hearing.after(self.state, self.state, factors=bool(given.moments))

    def renew(self, taken: Taken, rates: list[Tensor]) -> int | None:
        """What happens after a step that counted: see :func:`~thor_fx.between.run_between`."""
        return run_between(self.tx, self.state, self.update.params, self.found, rates, taken)

    def connect(self, collector: Collector, lane: Lane | None) -> None:
        """Let factors leave in backward, to all ranks or to owners, once the block size is known."""
        known, beside = self.options.block_size != "auto", None
        if self.owners is not None:
            self.sending = self.owners.sending
            collector.send = self.sending.send if known else None
        elif lane is not None:
            self.sending = lane.sending(resolved(self.options), self.groups, self.found, self.params)
            slots = collector.slots
            beside = Beside(lane, self.sending, slots, lambda: collector.wanted) if known else None
        collector.send_beside(beside)

    def _form_now(self) -> tuple[torch.dtype, torch.device]:
        some = next(iter(self.params.values()))
        return some.dtype, some.device


def resolved(options: Options) -> Options:
    """The options with a block size; that of whole factors as long as none has been chosen."""
    return replace(options, block_size=None if options.block_size == "auto" else options.block_size)


@dataclass(frozen=True)
class Builder:
    """What makes the updates of one optimizer.

    Attributes:
        model: without its wrapper.
        collector: knows the graphs.
        peers: the other ranks.
        options: as the user gave them.
        backends: what compiles the update of a plain step, and that of a factor step.
    """

    model: nn.Module
    collector: Collector
    peers: Peers
    options: Options
    backends: tuple[str, str]

    def build(
        self, groups: Sequence[Mapping[str, Any]], schedules: Mapping[str, Schedules], block_size: BlockSize
    ) -> Built:
        """An update that has no state yet. All ranks call this together.

        Args:
            groups: of parameters.
            schedules: of each, by label.
            block_size: that has been chosen, or ``"auto"``.

        Raises:
            RuntimeError: no graph has been seen, or parameters were replaced.
            ValueError: ranks that have parts of a parameter do not train together.
        """
        coverage, version = self.collector.coverage, self.collector.version
        if coverage is None:
            raise RuntimeError(NOTHING_SEEN)
        check_replaced(self.model, groups)
        labels = {
            name: str(label)
            for label, group in enumerate(groups)
            for name, _ in named(self.model, group["params"])
        }
        flagged = [str(label) for label, group in enumerate(groups) if group["grad_centralization"]]
        made_for = ParameterGroups(schedules, labels, frozenset(flagged))
        params = {name: p for name, p in self.model.named_parameters() if name in labels}
        found, options = complete(coverage, params), replace(self.options, block_size=block_size)
        owners = ownership(self.peers.world, resolved(options), params, found)
        update = self._compiled(self._transform(made_for, resolved(options), owners), found, params)
        return Built(version, options, self.peers.world, params, made_for, found, owners, update)

    def _transform(self, groups: ParameterGroups, known: Options, owners: Ownership | None) -> Transform:
        copies, world = self.collector.copies, self.peers.world
        settings = for_one_rank(self.options, world, copies)
        parts = None if owners is None else owners.parts
        if parts is None:
            tx = skip_nonfinite(thor_chain(settings, groups, world))
        else:
            tx = skip_nonfinite(by_owners(thor_chain(settings, groups), parts), world)
        arrived = parts is not None or self.peers.averager is not None
        ranks: dict[str, Any] = {"gradients": self.peers.averages_gradients, "copies": copies}
        ranks |= {"parts": parts, "arrived": arrived}
        tx = unscale(distribute(tx, self.options, groups, world, **ranks))  # a rank has its own scaler
        assert known.block_size != "auto", "it is resolved"
        return tx if tx.resolve is None else tx.resolve(known.block_size)

    def _compiled(self, tx: Transform, found: Coverage, params: Mapping[str, Tensor]) -> CompiledUpdate:
        mode, options = self.collector.mode, self.collector.options
        how = (*self.backends, mode, options, self.collector.disabled, self.collector.on_compile_error)
        return CompiledUpdate(tx, found, {name: here(p) for name, p in params.items()}, *how)
