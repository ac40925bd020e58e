"""The drop-in door's optimizer: a shell around :func:`thor_fx.thor`, without mathematics of its own."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from .alarm import Alarm
from .another_model import check_same_model
from .arguments import check_type
from .block_size import choose
from .block_size_rule import BlockSizeReport
from .blocks import BlockSize
from .built import Builder, Built
from .clips import Clip
from .collector import Collected, Collector
from .compile import collector_of
from .compiled_update import Given
from .demand import Demand, set_due
from .distributed.agreement import agreed
from .distributed.dtensors import here_as
from .distributed.owned import check_owned
from .distributed.peers import Peers
from .distributed.work import WorkSharing
from .distributed.wrappers import is_dealt_out, unwrapped
from .factors import Moments
from .group_members import check_centralization, check_replaced, members, with_rest
from .group_schedules import SCHEDULES, GroupSchedules, schedules_of
from .hearing import was_taken
from .inductor import check_backend
from .inverses import Inverse
from .layers import Coverage
from .levenberg_marquardt import AdaptiveDamping, LevenbergMarquardt, loss_again
from .metrics import Metrics, group_metrics, metrics, trace
from .optimizer_state import OF_LAYERS, layers_of, loading
from .options import MAX_DIM, Fallback, MomentumOn, Options
from .own_passes import Statistics
from .parameters import check_one_device
from .passes.layout import BiasRule, Fisher, Likelihood, LongSide, Sharing, layer_of
from .precision import as_written
from .presets import Preset, takes_preset
from .readiness import Readiness
from .refresh import DampingRule
from .refresh_rules import RefreshRule
from .saved_options import Format, accepted
from .scaling import Scaler, scales_of
from .schedule import Value
from .starting import start
from .state_versions import SavedState
from .step_norm import StepNorm
from .transform import Taken
from .unseen import Unseen, with_unseen

A_COPY = (
    "this Thor is a copy or was unpickled, which keeps the state and nothing else: create "
    "Thor(thor_fx.compile(model), ...) for the other model and give it load_state_dict(state_dict())"
)
SUCCEEDED = (
    "another Thor was made for this model after this one, and it is the one that gets the factors: step that "
    "one, or make a single Thor with groups of parameters, params=[...]"
)


class Thor(torch.optim.Optimizer):
    """THOR for a model compiled by :func:`thor_fx.compile`.

    A ``torch.optim.Optimizer``: ``lr``, ``damping``, ``momentum`` and ``weight_decay`` live in
    ``param_groups``, where schedulers and users may change them between steps. Where ``lr`` or
    ``damping`` was given as a table or a callable, it is looked up in every step and overwrites the
    group's value.

    Args:
        model: a model compiled by :func:`thor_fx.compile`; all its trainable parameters are optimized.
        lr: learning rate: number, 0-D tensor, 1-D tensor (one value per step) or callable.
        damping: ``lambda``, given like ``lr``; or a :class:`thor_fx.LevenbergMarquardt`, which adapts the one
            damping of all groups that have none of their own, and needs ``step(closure)``.
        momentum: of the heavy ball.
        weight_decay: see :func:`thor_fx.thor`, as all arguments up to ``frequency``.
        loss_scale: the caller multiplies the loss by it: a number, or the ``torch.amp.GradScaler``.
            The scaler is needed only where ``scaler.unscale_`` is called before the step.
        batch_size: terms that the loss averages over; None: as read off the graph.
        use_nesterov: Nesterov's form of momentum.
        decay_filter: ``name -> bool``.
        split_indices: the last layers of the buckets in which factors of all ranks are averaged, in the
            order of layers, ``[26, 53]``; None: buckets of 25 MiB.
        enable_clip_grad: clip every update to L2 norm ``clip_norm``.
        frequency: factors and inverses are renewed in step 0 and every ``frequency`` steps.
        params: groups with settings of their own, ``[{"params": [...], "lr": ...}, ...]``; members
            are parameters of ``model`` or their names. Everything else forms a last group. A group
            may also set ``grad_centralization=True`` for weights of convolutions.
        damping_rule: ``"factor"``, ``"sqrt"``, ``"pi"`` or ``"relative"``.
        block_size: side of THOR's diagonal blocks; None: whole factors; ``"auto"``: see :func:`thor_fx.thor`;
            chosen in the first step that has factors.
        sharing: ``"expand"`` or ``"reduce"``: see :func:`thor_fx.thor`, as the next three.
        bias: ``"raw"`` or ``"joint"``.
        max_dim: the longest side of a layer with a whole factor.
        long_side: what a longer side keeps: ``"blocks"``, ``"diagonal"`` or ``"identity"``.
        inverse: what is made of the factors: see :func:`thor_fx.thor`.
        factor_decay: running averages of factors: see :func:`thor_fx.thor`.
        refresh: when inverses are recomputed: see :func:`thor_fx.thor`.
        refresh_async: inversions run beside the steps that follow: see :func:`thor_fx.thor`.
        kl_clip: bound on the KL divergence of a step, over all groups: see :func:`thor_fx.thor`.
        clip: what ``enable_clip_grad`` clips: every ``"tensor"``, or all groups together (``"global"``).
        clip_norm: to which L2 norm.
        step_norm: the length of a layer's update: ``"adam"``, ``"sgd"``, ``"rms"``, ``"spectral"``, or None;
            ``"orthogonal"``: its direction too.
        momentum_on: the preconditioned ``"update"``, or the ``"gradient"`` before.
        decoupled_weight_decay: ``W - lr weight_decay W``, past clips and momentum.
        fallback: the first-order rule of what belongs to no layer: ``"sgd"`` or ``"adamw"``.
        fallback_lr: its learning rate, given like ``lr``, also by group; None: ``lr``. torch's schedulers
            change ``lr`` only.
        preset: ``"thor"`` or ``"recommended"``: values for what is left out here.
        fisher: ``"empirical"``, ``"sampled"`` or ``"exact"``: see :func:`thor_fx.thor`. The last two need the
            model as one graph, and a ``likelihood`` where it does not return its loss itself.
        likelihood: ``"categorical"``, ``"bernoulli"``, ``"gaussian"``, a callable or None.
        layer_filter: ``name of weight -> bool``: which weights have factors; None: all that can.
        rows: ``1 / k``: factors are measured on every k-th row: see :func:`thor_fx.thor`.
        factor_dtype: ``torch.bfloat16``: rows are rounded to it in the products of factors.
        update_dtype: ``torch.bfloat16``: gradients and inverses are, in those of preconditioning.
        process_group: the ranks that train together; None: those of the DistributedDataParallel that
            ``model`` is wrapped in, or all where parameters are DTensors (FSDP2, tensor parallel), or there
            are no others. Factors are averaged in every factor step, gradients where nobody has done that:
            :mod:`thor_fx.distributed`.
        reduce_dtype: ``torch.bfloat16``: factors are rounded to it while they travel.
        work_sharing: ``"none"``, ``"inverse"``, ``"gradient"`` or ``"auto"``: see :func:`thor_fx.thor`.
        backend: compiles the update: ``"inductor"``, or ``"eager"`` to interpret it; None: as the model,
            in factor steps as those of the model.

    Attributes:
        block_size_report: how ``block_size="auto"`` was decided; None before, and where nothing was measured.

    Raises:
        TypeError: ``model`` is not compiled by us, or an argument has a wrong type.
        ValueError: an argument has a wrong value, or a group names a parameter that is not the model's.
    """

    _step_supports_amp_scaling = True  # read by torch.amp.GradScaler: see thor_fx.scaling

    @takes_preset
    def __init__(
        self,
        model: nn.Module,
        lr: Value,
        damping: Value | LevenbergMarquardt | None = None,
        momentum: float | None = None,
        weight_decay: float = 0.0,
        loss_scale: float | Scaler = 1.0,
        batch_size: int | None = None,
        use_nesterov: bool = False,
        decay_filter: Callable[[str], bool] | None = None,
        split_indices: Sequence[int] | None = None,
        enable_clip_grad: bool = False,
        frequency: int = 100,
        *,
        params: Iterable[Mapping[str, Any]] | None = None,
        damping_rule: DampingRule = "factor",
        block_size: BlockSize = 128,
        sharing: Sharing = "expand",
        bias: BiasRule = "raw",
        max_dim: int | None = MAX_DIM,
        long_side: LongSide = "blocks",
        inverse: Inverse = "cholesky",
        factor_decay: float | None = None,
        refresh: RefreshRule | None = None,
        refresh_async: bool = False,
        kl_clip: float | None = None,
        clip: Clip = "tensor",
        clip_norm: float = 1.0,
        step_norm: StepNorm | None = None,
        momentum_on: MomentumOn = "update",
        decoupled_weight_decay: bool = False,
        fallback: Fallback = "sgd",
        fallback_lr: Value | None = None,
        preset: Preset | None = None,  # noqa: ARG002 - takes_preset has used it
        fisher: Fisher = "empirical",
        likelihood: Likelihood | None = None,
        layer_filter: Callable[[str], bool] | None = None,
        rows: float = 1.0,
        factor_dtype: torch.dtype | None = None,
        update_dtype: torch.dtype | None = None,
        process_group: ProcessGroup | None = None,
        reduce_dtype: torch.dtype | None = None,
        work_sharing: WorkSharing = "none",
        backend: str | None = None,
    ) -> None:
        self._collector: Collector = collector_of(model)
        self._peers = Peers(model, process_group)
        self._model = model = unwrapped(model)
        self._scaler = loss_scale if isinstance(loss_scale, Scaler) else None
        constant = 1.0 if isinstance(loss_scale, Scaler) else loss_scale
        self._options = Options(
            loss_scale=constant,
            batch_size=batch_size,
            use_nesterov=use_nesterov,
            decay_filter=decay_filter,
            split_indices=split_indices,
            enable_clip_grad=enable_clip_grad,
            frequency=frequency,
            damping_rule=damping_rule,
            block_size=block_size,
            sharing=sharing,
            bias=bias,
            max_dim=max_dim,
            long_side=long_side,
            inverse=inverse,
            factor_decay=factor_decay,
            refresh=refresh,
            refresh_async=refresh_async,
            kl_clip=kl_clip,
            clip=clip,
            clip_norm=clip_norm,
            step_norm=step_norm,
            momentum_on=momentum_on,
            decoupled_weight_decay=decoupled_weight_decay,
            fallback=fallback,
            adaptive=damping if isinstance(damping, LevenbergMarquardt) else None,
            fisher=fisher,
            likelihood=likelihood,
            layer_filter=layer_filter,
            rows=rows,
            factor_dtype=factor_dtype,
            update_dtype=update_dtype,
            reduce_dtype=reduce_dtype,
            work_sharing=work_sharing,
        )
        if is_dealt_out(model):
            check_owned(self._options)
        backends = self._collector.backend, self._collector.factor_backend
        if backend is not None:
            check_backend(backend)
            backends = backend, backend
        self._builder = Builder(model, self._collector, self._peers, self._options, backends)
        self._built: Built | None = None
        self.block_size_report: BlockSizeReport | None = None
        self._schedules = GroupSchedules()
        self._adaptive = AdaptiveDamping(self._options.adaptive)
        self._unseen = Unseen(self._options.layer_filter)
        self._known = Readiness()
        self._demand = Demand(model, self._collector, self._known, self._options)
        self._alarm = Alarm()
        self._reader = object()
        self._format = Format(self._options)
        self._forget()
        defaults: dict[str, Any] = {"lr": lr, "damping": damping, "momentum": momentum}
        defaults |= {"weight_decay": weight_decay, "fallback_lr": fallback_lr}
        defaults |= {"grad_centralization": False, "step": 0}
        check_one_device(dict(model.named_parameters()))
        super().__init__(with_rest(model, params), defaults)
        self._collector.use(self._options.rules)
        self._collector.wanted, self._collector.reader = True, self._reader
        self._collector.clear()
        self._collector.send_beside(None)

    if not TYPE_CHECKING:  # else all attributes that there are not would exist

        def __getattr__(self, name: str) -> Any:
            """What is missing: of an optimizer, torch copies and pickles the state only."""
            if name in {"_collector", "_model", "_options", "_format", "_built"}:
                raise RuntimeError(A_COPY)
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # --- groups ------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters of the model, given as tensors or by name, e.g. after unfreezing.

        Raises:
            TypeError: a setting has a wrong type.
            ValueError: a member is no parameter of the model, or a setting has a wrong value.
        """
        group = dict(param_group)
        group["params"] = members(self._model, group.get("params"))
        given = {name: group.get(name, self.defaults[name]) for name in SCHEDULES}
        schedules = schedules_of(given)
        group |= {name: schedule(0) for name, schedule in schedules.items()}
        adapts = isinstance(given["damping"], LevenbergMarquardt)
        if adapts:
            group["damping"] = self._adaptive.current(given["damping"], self.param_groups)
        if self.param_groups:
            group["step"] = self.param_groups[0]["step"]
        if self._options.block_size == "auto":
            group["block_size"] = self.block_size
        check_centralization(self._model, group)
        super().add_param_group(group)
        self._format.note(self.param_groups)
        self._schedules.add(schedules)
        set_due(self.param_groups, None)
        self._adaptive.add(follows=adapts)
        self._forget()

    # --- the step ----------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient.

        Args:
            closure: recomputes the loss and calls ``backward``.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            RuntimeError: there are gradients, but the compiled model has not been run in training mode;
                or a gradient scaler has divided the gradients, and nobody has said which; or the damping
                adapts itself, and there is no closure; or another optimizer was made for the same model
                since, or parameters were replaced; or this is a copy, which has no model.
        """
        if self._collector.reader is not self._reader:
            raise RuntimeError(SUCCEEDED)
        loss = self._adaptive.loss(closure)
        parameters = (p for group in self.param_groups for p in group["params"])
        first = next((p for p in parameters if p.grad is not None), None)
        if first is None:
            check_replaced(self._model, self.param_groups)
            return loss
        step: int = self.param_groups[0]["step"]
        compares = self._adaptive.compares(step)
        collected = self._collector.collected()
        try:
            with as_written(first.device):
                counted, waits = self._advance(collected, step, compares)
        except BaseException:
            self._collector.put_back(collected)  # after Ctrl-C, say, the step can be tried again
            raise
        if compares and closure is not None and self._built is not None:
            later = loss_again(closure, self._built.params.values(), self._collector)
            self._adaptive.adapt(self.param_groups, self._built.state, loss, later, self._peers.world)
        for group in self.param_groups:
            group["step"] = step + counted  # else the next has the schedules of this one
        self._demand.ask(self.param_groups, step + counted, waits=waits)
        return loss

    def _advance(self, collected: Collected, step: int, compares: bool) -> tuple[bool, bool]:
        """Take step ``step``; return whether it counts, and whether the next has to collect factors."""
        moments, terms, sent, beside, arrived = collected
        lost = sent and (self._built is None or self._built.version != self._collector.version)
        if lost:
            moments = {}  # they went to those who were owners before there were new layers
        if self.block_size == "auto" and moments:
            self._choose_block_size(moments, terms)
        built = self._build()
        if built.sending is not None and moments and not sent:
            lost = beside is not None and bool(arrived) and beside.readers != built.sending.readers
            moments = {} if lost else built.sending.of_all_ranks(moments, arrived)
        gradients = {n: here_as(p.grad, p) for n, p in built.params.items() if p.grad is not None}
        unready = self._known.standing(built.found.layers, gradients)
        if moments and self._known.unknown:
            self._unseen.look(built.found.fallback, gradients, strict=self._collector.strict)
        if not self._demand.met(self.param_groups, step, moments, lost=lost):
            moments = {name: m for name, m in moments.items() if layer_of(name) in unready}
        if moments:
            built.ahead.forget()
        measured, served = frozenset(map(layer_of, moments)), unready.intersection(moments)
        refreshes = measured & unready if built.tx.between else None
        rates, terms = built.rates(self._schedules.values(self.param_groups)), terms if moments else None
        given = Given(gradients, moments, terms, self._scales(built), refreshes, compares)
        heard = built.take(given, rates, step)
        if moments or not heard.counts:
            self._alarm.look(built.state, built.hearing.skipped)
        if heard.missed or (moments and not heard.moved):
            self._demand.miss()
        if heard.moved and built.tx.between is not None:
            ready = frozenset(self._known.ready.intersection(built.found.layers))
            due = built.renew(Taken(step, measured - unready, ready, built.ahead), rates)
            if due is not None:
                set_due(self.param_groups, due)
        if served and was_taken(built.state):  # waits for the device, in the first step
            self._known.ready |= served
        return heard.counts, self._known.wait(unready, served, gradients, step)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients, and factors that no step has used."""
        super().zero_grad(set_to_none)
        self._collector.clear()

    def __repr__(self) -> str:
        return f"{super().__repr__()}\nOptions: {self.__dict__.get('_options', 'of a copy')}"

    @property
    def coverage(self) -> Coverage | None:
        """Which parameters are preconditioned and how; None before the first backward pass."""
        found = self._collector.coverage
        params = {} if self._built is None else self._built.params
        return None if found is None else with_unseen(found, params)

    @property
    def block_size(self) -> BlockSize:
        """The side of the blocks; ``"auto"`` as long as none has been chosen."""
        return self._format.block_size(self.param_groups)

    def statistics(self) -> Statistics:
        """What the model's ``passes`` have measured since the last step: :func:`thor_fx.statistics`."""
        return self._collector.statistics()

    def metrics(self) -> Metrics:
        """Numbers for any logger: ``step``, ``lr`` and ``damping``, and what :func:`thor_fx.metrics` counts.

        Groups of parameters after the first have ``lr/1``, ``damping/1``, ... Where averages of factors are
        kept, also ``trace``: ``sum over layers of tr(A) tr(G)``. Reading them waits for the device.
        """
        found = group_metrics(self.param_groups)
        counts = metrics(None if self._built is None else self._built.state)
        self._alarm.tell(skipped=int(counts["skipped_steps"]), failed=int(counts["failed_inverses"]))
        found |= counts
        if self._built is None:  # before the first step
            return found
        block_size, layers = self.block_size, self._built.found.layers
        return found | trace(self._built.state, layers, None if block_size == "auto" else block_size)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state; the momentum and all inverses are restored.

        Raises:
            TypeError: ``state_dict`` is no dict.
            ValueError: it is that of another optimizer, of another model, of a later version of thor_fx, or
                of a ``Thor`` whose options give its tensors another meaning: ``docs/saving.md``; nothing has
                been changed. Other shapes are refused here, or in the next step, once the layers are known.
        """
        check_type("state_dict", state_dict, dict, "what Thor.state_dict() returned")
        before = self.block_size
        with loading(self, self._accepted):
            super().load_state_dict(state_dict)
        self._demand.load(self.param_groups, layers_of(self.state.values()))
        self._format.loaded(self.param_groups)
        if self.block_size != before:
            self.block_size_report = None
            self._forget()
        if self._built is not None:
            try:
                start(self._built, self.state, self.param_groups, self._known, self._format.differs)
            except ValueError:
                self._forget()  # the next step refuses it, too
                raise
        step: int = self.param_groups[0]["step"]
        self._demand.ask(self.param_groups, step, waits=self._known.waits(step - 1))
        self._collector.clear()

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, besides the parameters."""
        packed = super().state_dict()
        if "_collector" not in self.__dict__:
            return packed  # of a copy, which knows no layers
        packed["param_groups"][0]["readiness"] = self._demand.saved()
        return packed

    def _accepted(self, saved: SavedState) -> SavedState:
        """A state dict as this optimizer saves it; or a ValueError that says what is wrong with it."""
        saved = accepted(saved, own=self._format.of(self.param_groups))
        names = {param: name for name, param in self._model.named_parameters()}
        check_same_model(saved, self.param_groups, names, alone=self._peers.world is None)
        return saved

    def _choose_block_size(self, moments: Mapping[str, Moments], terms: Tensor | None) -> None:
        """Let the first factors decide; until then factors were whole, and so are the inverses."""
        assert self._collector.coverage is not None, "there are moments"
        find = partial(choose, moments, self._collector.coverage.layers, terms)
        self.block_size_report = agreed(self._peers.world, find)
        if self.block_size_report is None:
            return
        if "block_size" in self.param_groups[0]:  # else the state is one that was saved with a given size
            for entry in self.state.values():
                for kept in OF_LAYERS:
                    entry.pop(kept, None)
            self._known.ready.clear()
        self._format.choose(self.param_groups, self.block_size_report.chosen)
        self._forget()

    def _scales(self, built: Built) -> dict[str, Tensor]:
        """What a gradient scaler says of this step."""
        device, of_factors = built.state.skipped.device, self._options.fisher == "empirical"
        found = scales_of(self, self._scaler, device, built.dtype, of_factors=of_factors)
        self._alarm.scaled = bool(found)
        return found

    def _build(self) -> Built:
        """The update for the groups and layers that there are; another one goes on with all that is known."""
        if self._built is not None and self._built.fits(self._collector.version):
            return self._built
        built = self._builder.build(self.param_groups, self._schedules.by_label, self.block_size)
        self._demand.restart(self.param_groups, built.found.layers, built.params.keys())
        self._forget()
        start(built, self.state, self.param_groups, self._known, self._format.differs)
        self._peers.compare(built.tx, built.params, built.found, self._collector.places)
        built.connect(self._collector, self._peers.lane)
        self._built = built
        return built

    def _forget(self) -> None:
        """Make another update before the next step."""
        self._built = None
        self._collector.send = None
