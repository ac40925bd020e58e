"""The drop-in door's optimizer: a shell around :func:`thor_fx.thor`, without mathematics of its own."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from .ahead import Ahead
from .alarm import Alarm, skipped_steps
from .another_model import check_same_model
from .arguments import check_type
from .between import run_between
from .block_size import choose
from .block_size_rule import BlockSizeReport
from .blocks import BlockSize
from .clips import Clip
from .collector import Collected, Collector
from .compile import collector_of
from .compiled_update import CompiledUpdate, Given
from .demand import Demand, set_due
from .distributed.agreement import agreed, check_ranks
from .distributed.beside import Beside, Lane, lane
from .distributed.distribute import distribute, for_one_rank, shared_work
from .distributed.dtensors import here, here_as
from .distributed.faults import waiting_for_others
from .distributed.owned import by_owners, check_owned, moved
from .distributed.ownership import Ownership, ownership
from .distributed.sending import Sending
from .distributed.work import WorkSharing, everything
from .distributed.wrappers import (
    LATE,
    averager,
    averages_gradients,
    has_others,
    is_dealt_out,
    unwrapped,
    world_of_model,
)
from .factors import Moments
from .group_members import check_centralization, check_replaced, members, named, with_rest
from .hyper import HyperTensors
from .inductor import check_backend
from .inverses import METHODS, Inverse
from .layers import Coverage
from .levenberg_marquardt import AdaptiveDamping, LevenbergMarquardt, loss_again
from .links import thor_chain
from .metrics import Metrics, metrics, trace
from .optimizer_state import (
    counters_of,
    layers_of,
    layers_with_inverses,
    loading,
    restore,
    views,
    with_unfound,
)
from .options import MAX_DIM, Fallback, MomentumOn, Options, damping_schedule, number_schedule
from .own_passes import Statistics
from .parameter_groups import ParameterGroups
from .parameters import check_one_device
from .passes.layout import BiasRule, Fisher, Likelihood, LongSide, Sharing, layer_of
from .presets import Preset, takes_preset
from .readiness import Readiness
from .refresh import DampingRule
from .refresh_rules import RefreshRule
from .saved_options import Format, accepted
from .scaling import Scaler, scales_of
from .schedule import Schedule, Value
from .state_versions import SavedState
from .step_norm import StepNorm
from .transform import Taken, Transform, skip_nonfinite, unscale
from .unseen import NO_GRAPH, tell_unseen, unseen_weights
from .warn import warn

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
        self._world = world_of_model(model, process_group)
        self._had_others = has_others()
        self._averages_gradients = not averages_gradients(model)
        self._averager = averager(model, self._world)
        self._lane: Lane | None = None
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
        self._backends = self._collector.backend, self._collector.factor_backend
        if backend is not None:
            check_backend(backend)
            self._backends = backend, backend
        self.block_size_report: BlockSizeReport | None = None
        self._schedules: list[dict[str, Schedule]] = []
        self._adaptive = AdaptiveDamping(self._options.adaptive)
        self._told = False  # of weights that no graph uses
        self._compared = False  # with the other ranks
        self._known = Readiness()
        self._demand = Demand(model, self._collector, self._known, self._options)
        self._alarm = Alarm()
        self._scaled = False  # by a gradient scaler, whose overflows are no news
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
            if name in {"_collector", "_model", "_options", "_format"}:
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
        if given["fallback_lr"] is None:
            del given["fallback_lr"]
        schedules = {name: SCHEDULES[name](value) for name, value in given.items()}
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
        self._schedules.append(schedules)
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
            with torch.autocast(first.device.type, enabled=False):  # trainers call us inside of theirs
                counted, waits = self._advance(collected, step, compares)
        except BaseException:
            self._collector.put_back(collected)  # after Ctrl-C, say, the step can be tried again
            raise
        if compares and closure is not None:
            later = loss_again(closure, self._params.values(), self._collector)
            self._adaptive.adapt(self.param_groups, self._inner, loss, later, self._world)
        for group in self.param_groups:
            group["step"] = step + counted  # else this step is taken again, with its schedules and factors
        self._demand.ask(self.param_groups, step + counted, waits=waits)
        return loss

    def _advance(self, collected: Collected, step: int, compares: bool) -> tuple[bool, bool]:
        """Take step ``step``; return whether it counts, and whether the next has to collect factors."""
        moments, terms, sent, beside, arrived = collected
        lost = sent and self._built_for != self._collector.version
        if lost:
            moments = {}  # they went to those who were owners before there were new layers
        if self.block_size == "auto" and moments:
            self._choose_block_size(moments, terms)
        self._build()
        if self._sending is not None and moments and not sent:
            lost = beside is not None and bool(arrived) and beside.readers != self._sending.readers
            moments = {} if lost else self._sending.of_all_ranks(moments, arrived)
        gradients = {n: here_as(p.grad, p) for n, p in self._params.items() if p.grad is not None}
        unready = self._known.standing(self._found.layers, gradients)
        self._tell_unseen(moments, gradients)
        if not self._demand.met(self.param_groups, step, moments, lost=lost):
            moments = {name: m for name, m in moments.items() if layer_of(name) in unready}
        if moments:
            self._ahead.forget()
        served = unready.intersection(moments)
        skipped = self._inner.skipped.clone() if served else None
        refreshes = frozenset(map(layer_of, moments)) & unready if self._tx.between else None
        rates, terms = self._rates(), terms if moments else None
        given = Given(gradients, moments, terms, self._scales(), refreshes, compares)
        counted = self._take(given, rates, step)
        self._between(step, moments, unready, rates, counted=counted)
        if served and bool(skipped == self._inner.skipped):  # waits for the device, in the first step
            self._known.ready |= served
        return counted, self._known.wait(unready, served, gradients, step)

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
        if found is None:
            return None
        # what no graph uses may be used between graphs: the loss can depend on it all the same
        others = self._params.keys() - found.trained - {*found.frozen}
        fallback = {**found.fallback, **dict.fromkeys(others, NO_GRAPH)}
        return replace(found, fallback=fallback, unused=tuple(n for n in found.unused if n not in others))

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
        found: Metrics = {"step": self.param_groups[0]["step"]}
        for i, group in enumerate(self.param_groups):
            found |= {f"{name}/{i}" if i else name: float(group[name]) for name in ("lr", "damping")}
        counts = metrics(self._inner)
        skipped = 0 if self._scaled else int(counts["skipped_steps"])
        self._alarm.tell(skipped=skipped, failed=int(counts["failed_inverses"]))
        found |= counts
        if self._inner is None:  # before the first step
            return found
        block_size = self.block_size
        return found | trace(self._inner, self._found.layers, None if block_size == "auto" else block_size)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state; the momentum and all inverses are restored.

        Raises:
            TypeError: ``state_dict`` is no dict.
            ValueError: it is that of another optimizer, of another model, of a later version of thor_fx, or
                of a ``Thor`` whose options give its tensors another meaning: ``docs/saving.md``; nothing has
                been changed. Other shapes are refused in the next step, when the layers are known.
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
        if self._built_for is not None:
            self._start()
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
        check_same_model(saved, self.param_groups, names, alone=self._world is None)
        return saved

    def _choose_block_size(self, moments: Mapping[str, Moments], terms: Tensor | None) -> None:
        """Let the first factors decide; until then factors were whole, and so are the inverses."""
        assert self._collector.coverage is not None, "there are moments"
        find = partial(choose, moments, self._collector.coverage.layers, terms)
        self.block_size_report = agreed(self._world, find)
        if self.block_size_report is None:
            return
        if "block_size" in self.param_groups[0]:  # else the state is one that was saved with a given size
            for entry in self.state.values():
                entry.pop("inverses", None)
            self._known.ready.clear()
        self._format.choose(self.param_groups, self.block_size_report.chosen)
        self._forget()

    def _tell_unseen(self, moments: Mapping[str, Moments], gradients: Mapping[str, Tensor]) -> None:
        """In a factor step, say once which weights have a gradient and no factors, as no graph uses them."""
        if self._told or not moments or not self._known.unknown:
            return
        allowed = self._options.layer_filter or (lambda _: True)
        names = [name for name in unseen_weights(self._found.fallback, gradients) if allowed(name)]
        self._told = bool(names)
        if names:
            tell_unseen(names, strict=self._collector.strict)

    def _take(self, given: Given, rates: list[Tensor], step: int) -> bool:
        """Take a step; whether it counts: one that was skipped does not, where the host knows of it."""
        before = skipped_steps(self._inner)
        self._scaled = bool(given.scales)
        with waiting_for_others(self._world, f"in step {step}"):
            self._update(given, rates)
        counted = before is None or skipped_steps(self._inner) == before
        if given.moments or not counted:
            self._alarm.look(self._inner, scaled=self._scaled)
        return counted

    def _between(
        self,
        step: int,
        moments: Mapping[str, Moments],
        unready: set[str],
        rates: list[Tensor],
        *,
        counted: bool,
    ) -> None:
        """What happens after a step that counted, whose inverses act from the next one on."""
        if self._tx.between is None or not counted:
            return
        measured = frozenset(map(layer_of, moments)) - unready
        ready = frozenset(self._known.ready.intersection(self._found.layers))
        taken = Taken(step, measured, ready, self._ahead)
        due = run_between(self._tx, self._inner, self._update.params, self._found, rates, taken)
        if due is not None:
            set_due(self.param_groups, due)

    def _scales(self) -> dict[str, Tensor]:
        device = self._inner.skipped.device
        return scales_of(
            self, self._scaler, device, self._dtype, of_factors=self._options.fisher == "empirical"
        )

    def _rates(self) -> list[Tensor]:
        """The hyper-parameters of this step, as tensors in the order of their names."""
        values: dict[str, float | Tensor] = {}
        for label, (group, schedules) in enumerate(zip(self.param_groups, self._schedules, strict=True)):
            for name, schedule in schedules.items():
                if not schedule.constant:
                    group[name] = schedule(group["step"])
                values[f"{label}.{name}"] = group[name]
        return self._hyper({name: values[name] for name in self._tx.schedules}, self._params)

    # --- what is derived from groups and graphs ------------------------------------------------------

    def _forget(self) -> None:
        self._built_for: int | None = None
        self._hyper = HyperTensors()
        self._params: dict[str, Tensor] = {}
        self._labels: dict[str, str] = {}  # the group of every parameter
        self._inner: Any = None
        self._owners: Ownership | None = None
        self._sending: Sending | None = None
        self._collector.send = None
        self._ahead = Ahead()

    def _build(self) -> None:
        """Make the transform and its state for the groups and layers there are; keep what is known."""
        if self._collector.coverage is None:
            raise RuntimeError(
                "no compiled graph of the model has been seen: create Thor before the forward pass, call "
                "the model itself (not model.forward, nor torch.compile(model)) in training mode, and then "
                "backward. If you did, torch.compile captures nothing of this model: see "
                "TORCH_LOGS=graph_breaks"
            )
        if self._built_for == self._collector.version and not self._moved():
            return
        check_replaced(self._model, self.param_groups)
        self._forget()
        self._built_for = self._collector.version
        self._labels = {
            name: str(label)
            for label, group in enumerate(self.param_groups)
            for name, _ in named(self._model, group["params"])
        }
        self._params = {name: p for name, p in self._model.named_parameters() if name in self._labels}
        self._dtype = HyperTensors.dtype(self._params)
        some = next(iter(self._params.values()))
        self._form = some.dtype, some.device
        self._found = _complete(self._collector.coverage, self._params)
        trained = self._collector.coverage.trained
        if self._known.restart(self._found.layers, self._params.keys() - trained, trained):
            set_due(self.param_groups, None)  # there are new layers: back to the schedule
        self._tx = self._transform()
        mode, options = self._collector.mode, self._collector.options
        params = {name: here(p) for name, p in self._params.items()}
        how = (*self._backends, mode, options, self._collector.disabled, self._collector.on_compile_error)
        self._update = CompiledUpdate(self._tx, self._found, params, *how)
        self._start()
        if not self._compared:
            check_ranks(self._tx, self._params, self._found)
            if self._world is not None and self._averager is not None:
                self._lane = lane(self._world, self._averager, self._collector.places)
            if self._world is None and has_others() and not self._had_others:
                warn(LATE)
            self._compared = True
        self._send()

    def _send(self) -> None:
        """Let factors leave in backward, to all ranks or to owners, once the block size is known."""
        known, beside = self.block_size != "auto", None
        if self._owners is not None:
            self._sending = self._owners.sending
            self._collector.send = self._sending.send if known else None
        elif self._lane is not None:
            made_for = self._resolved(), self._groups(), self._found, self._params
            self._sending, collector = self._lane.sending(*made_for), self._collector
            slots = collector.slots
            beside = Beside(self._lane, self._sending, slots, lambda: collector.wanted) if known else None
        self._collector.send_beside(beside)

    def _resolved(self) -> Options:
        """The options with a block size; that of whole factors as long as none has been chosen."""
        return replace(self._options, block_size=None if self.block_size == "auto" else self.block_size)

    def _moved(self) -> bool:
        """Whether the parameters have got another dtype or device since (``model.to``)."""
        some = next(iter(self._params.values()))
        return (some.dtype, some.device) != self._form

    def _transform(self) -> Transform:
        copies, groups, known = self._collector.copies, self._groups(), self._resolved()
        settings = for_one_rank(self._options, self._world, copies)
        self._owners = ownership(self._world, known, self._params, self._found)
        parts = None if self._owners is None else self._owners.parts
        if parts is None:
            tx = skip_nonfinite(thor_chain(settings, groups, self._world))
        else:
            tx = skip_nonfinite(by_owners(thor_chain(settings, groups), parts), self._world)
        arrived = parts is not None or self._averager is not None
        ranks: dict[str, Any] = {"gradients": self._averages_gradients, "copies": copies}
        ranks |= {"parts": parts, "arrived": arrived}
        tx = unscale(distribute(tx, self._options, groups, self._world, **ranks))  # a rank has its own scaler
        assert known.block_size != "auto", "it is resolved"
        return tx if tx.resolve is None else tx.resolve(known.block_size)

    def _held(self) -> Callable[[Coverage, Mapping[str, Tensor]], Coverage]:
        """Of a coverage, what this rank has inverses of."""
        if self._owners is not None:
            return self._owners.parts.held
        work = shared_work(replace(self._options, block_size=self.block_size), self._world)
        return everything if work is None else work.held

    def _groups(self) -> ParameterGroups:
        schedules = {str(label): own for label, own in enumerate(self._schedules)}
        flagged = [str(i) for i, group in enumerate(self.param_groups) if group["grad_centralization"]]
        return ParameterGroups(schedules, self._labels, frozenset(flagged))

    def _start(self) -> None:
        """Make a fresh state, copy what is known into it, and let ``self.state`` show it."""
        self._ahead.forget()
        self._update.begin()
        self._inner, continues = self._update.state, any(self.state.values())
        saved = {name: self.state.get(parameter, {}) for name, parameter in self._params.items()}
        if self._owners is not None:
            saved |= moved(self._owners.parts, saved)
        for name, entry in views(self._inner, self._found, self._params, self._labels, self._held()).items():
            restore(entry, saved[name], name, self._format.differs)
            self.state[self._params[name]] = with_unfound(entry, saved[name], self._known.unfound)
        shares = self._owners is not None or self._options.work_sharing != "none"
        if continues and (shares or not self._known.recorded):
            marks = METHODS[self._options.inverse].marks
            self._known.ready |= layers_with_inverses(self.state.values(), marks)
        if self._world is not None and shares:
            self._known.ready = set().union(*self._world.everybodys(self._known.ready))
        for label, counters in counters_of(self._inner).items():
            group = self.param_groups[int(label)]
            restore(counters, {name: group[name] for name in counters if name in group}, f"group {label}")
            group |= counters


SCHEDULES: dict[str, Callable[[Any], Schedule]] = {
    "lr": partial(Schedule, "lr"),
    "damping": damping_schedule,
    "momentum": partial(number_schedule, "momentum"),
    "weight_decay": partial(number_schedule, "weight_decay"),
    "fallback_lr": partial(Schedule, "fallback_lr"),
}
"""What a group of parameters may have a value of its own for."""


def _complete(found: Coverage, params: Mapping[str, Tensor]) -> Coverage:
    """The coverage with a place for parameters that no compiled graph has used."""
    found = found.restrict(frozenset(params))
    others = {name: NO_GRAPH for name in params if name not in found.trained}
    return replace(found, fallback={**found.fallback, **others}, unused=())
