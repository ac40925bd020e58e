"""The functional door: a whole training step as one compiled graph.

Loss, gradients, factors, refresh and parameter update are nodes of one ATen graph.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from .ahead import Ahead
from .alarm import Alarm
from .arguments import check_choice, check_dynamic, check_type, checked_disabled
from .between import run_between
from .block_size import choose_by_step
from .block_size_rule import BlockSizeReport
from .blocks import BlockSize
from .capture import Captured, LossCapture, LossFn, Runner
from .distributed.agreement import agreed, check_ranks
from .distributed.faults import waiting_for_others
from .hearing import Hearing, was_taken
from .hyper import HyperTensors
from .inductor import Compiled, check_backend, check_settings, compile_graph, inductor_decompositions
from .kinds import Kind, kind_of, kinds
from .layers import Coverage
from .logs import log_coverage
from .metrics import Metrics, metrics, trace
from .own_passes import Statistics, checked_passes, statistics_of
from .parameters import check_one_device, check_params, trainable
from .passes import canonicalize, pipeline
from .passes.outputs import Statistic
from .passes.pipeline import Pass
from .precision import as_written
from .recompute import recompute
from .state_form import Form
from .state_versions import STEP, VERSION, migrated
from .trace_log import tracer
from .transform import Params, State, Taken, Transform
from .uncompiled import OnCompileError
from .update import fixed_arguments, loss_alone
from .whole_step import WholeStep, covered, results_of


class StepState(NamedTuple):
    """What a training step carries over.

    Attributes:
        step: steps taken so far; one that is skipped does not count, on a GPU a few steps later
            (:mod:`thor_fx.hearing`).
        inner: the state of the transform.
        buffers: buffers of the model, where the loss function takes them.
        ready: whether any step so far was not skipped; until then every step is a factor step.
        due: the next factor step, where a refresh rule has set it; None: as ``frequency`` says.
        damping: of the next step, where it adapts itself (:class:`thor_fx.LevenbergMarquardt`).
        block_size: what ``block_size="auto"`` has become; None where it was given, or nothing can be cut.
        version: of what it holds, for states that were saved: :mod:`thor_fx.state_versions`.
        overdue: whether the next step has to be a factor step, because one was skipped.
    """

    step: int
    inner: State
    buffers: Any = None
    ready: bool = False
    due: int | None = None
    damping: float | None = None
    block_size: int | None = None
    version: int = 0  # that of a saved state which has none
    overdue: bool = False


class StepOutput(NamedTuple):
    """What a training step returns besides parameters and state.

    Attributes:
        loss: 0-D.
        aux: what the loss function returned beside it.
        statistics: what the caller's ``passes`` have measured, by the name of the statistic and that of the
            parameter; empty in steps without factors.
    """

    loss: Tensor
    aux: Any
    statistics: Mapping[tuple[str, str], Tensor] = {}


def compile_step(
    loss_fn: LossFn,
    tx: Transform,
    *,
    donate: bool = True,
    backend: str = "inductor",
    factor_backend: str | None = None,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
    strict: bool = False,
    passes: Sequence[Pass] = (),
    disable_passes: Collection[str] = (),
    on_compile_error: OnCompileError = "raise",
) -> "CompiledStep":
    """Compile loss, gradient, factors and update into one function.

    Args:
        loss_fn: ``loss_fn(params, *batch)``, returns a scalar loss or ``(loss, aux)``. With buffers,
            ``loss_fn(params, buffers, *batch)`` returns ``(loss, (new_buffers, aux))``.
        tx: the update, e.g. :func:`thor_fx.thor`.
        donate: write the new parameters and state into the tensors that came in, as
            ``torch.optim`` does. False leaves the arguments alone and costs a copy of both.
        backend: ``"inductor"``; or ``"aot_eager"`` or ``"eager"`` to interpret the rewritten graph.
        factor_backend: the same for factor steps; None: ``backend``. ``"aot_eager"`` saves most of what they
            take to compile, and costs time in every one of them: ``docs/compiling.md``.
        mode: as in ``torch.compile``.
        options: Inductor settings, as in ``torch.compile``.
        dynamic: as in ``torch.compile``: by default a second batch size recompiles once, for all sizes.
        strict: raise where a weight (a parameter of two or more axes) would take the first-order rule.
        passes: passes of your own over the graph of a factor step: ``docs/passes.md``. What they measure is
            in the ``statistics`` of the output.
        disable_passes: optimisations to go without, by name; the results are the same up to rounding:
            ``docs/passes.md``.
        on_compile_error: ``"eager"``: a step that Inductor cannot compile runs uncompiled, with a warning
            that gives the reason. ``"raise"``: it is an error.

    Returns:
        A step with ``state = step.init(params, *batch)`` and
        ``params, state, out = step(params, state, *batch)``.

    Raises:
        TypeError: ``loss_fn`` is not callable, ``tx`` is no transform, a pass is not callable, or another
            argument has a wrong type; the message names it.
        ValueError: a backend, a mode, a setting of Inductor, an optimisation or ``on_compile_error`` is
            unknown.

    Example:
        >>> import torch, thor_fx
        >>> def loss_fn(params, x, y):
        ...     return ((x @ params["w"] - y) ** 2).mean()
        >>> params = {"w": torch.zeros(3, 1)}
        >>> x, y = torch.eye(3), torch.ones(3, 1)
        >>> tx = thor_fx.thor(lr=0.2, damping=0.1, momentum=0.0, frequency=1)
        >>> step = compile_step(loss_fn, tx, backend="eager")
        >>> state = step.init(params, x, y)
        >>> for _ in range(5):
        ...     params, state, out = step(params, state, x, y)
        >>> bool(out.loss < 0.5)
        True
    """
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be callable, got {type(loss_fn).__name__}: {loss_fn!r}")
    if not isinstance(tx, Transform):
        raise TypeError(f"tx must be a Transform, e.g. thor_fx.thor(...), got {type(tx).__name__}: {tx!r}")
    check_backend(backend)
    factors_by = backend if factor_backend is None else factor_backend
    check_backend(factors_by, "factor_backend")
    check_settings(mode, options)
    for name, value in (("donate", donate), ("strict", strict)):
        check_type(name, value, bool, "True or False")
    check_dynamic(dynamic)
    check_choice("on_compile_error", on_compile_error, OnCompileError)
    plain, factor = (_Compiler(by, mode, options, on_compile_error) for by in (backend, factors_by))
    own, disabled = checked_passes(passes), checked_disabled(disable_passes)
    return CompiledStep(loss_fn, tx, donate, plain, factor, dynamic, strict, own, disabled)


@dataclass(frozen=True)
class _Compiler:
    backend: str
    mode: str | None
    options: Mapping[str, Any] | None
    on_error: OnCompileError

    def __call__(self, gm: fx.GraphModule, fakes: Sequence[Any], fixed: Collection[fx.Node] = ()) -> Compiled:
        settings: dict[str, Any] = {"backend": self.backend, "mode": self.mode, "options": self.options}
        settings["on_error"] = self.on_error
        return compile_graph(gm, fakes, fixed=fixed, **settings)

    @property
    def recomputes(self) -> list[pipeline.Pass]:
        """The pass that recomputes activations, where that pays: computing and reading them is one kernel."""
        if self.backend != "inductor":
            return []
        return [partial(recompute, decompositions=inductor_decompositions())]


@dataclass
class _Call:
    """What the runner is told besides Dynamo's arguments, and what it says besides the forward results.

    Attributes:
        kind: of the step.
        extra: further arguments.
        later: the loss after the step, if it compares.
        statistics: what the caller's passes have measured.
    """

    kind: Kind
    extra: list[Tensor]
    later: Tensor | None = None
    statistics: Statistics = field(default_factory=dict)


@dataclass(frozen=True)
class _Run:
    """A compiled step, and what it returns behind the results of the loss function."""

    compiled: Compiled
    statistics: tuple[Statistic, ...]


class _Traced(Exception):
    """Leaves the runner when only the trace was wanted."""

    def __init__(self, coverage: Coverage) -> None:
        self.coverage = coverage


class CompiledStep:
    """A training step; see :func:`compile_step`.

    Attributes:
        coverage: which parameters are preconditioned and how; None before ``init``.
        block_size_report: how ``block_size="auto"`` was decided; None before, and where nothing was measured.
    """

    def __init__(
        self,
        loss_fn: LossFn,
        tx: Transform,
        donate: bool,
        compiler: _Compiler,
        factor_compiler: _Compiler,
        dynamic: bool | None,
        strict: bool,
        passes: tuple[Pass, ...],
        disabled: tuple[str, ...],
    ) -> None:
        self.coverage: Coverage | None = None
        self.block_size_report: BlockSizeReport | None = None
        self._tx = tx
        self._auto = tx.resolve
        given = tx.rules.block_size if tx.frequency is not None else None
        self._block_size: BlockSize = given if tx.resolve is None else "auto"
        self._donate = donate
        self._strict = strict
        self._passes, self._disabled = passes, disabled
        self._compiler, self._factor_compiler = compiler, factor_compiler
        self._hyper = HyperTensors()
        self._loss_fn, self._dynamic = loss_fn, dynamic
        self._capture = LossCapture(loss_fn, self._compile, dynamic)
        self._params: Params = {}
        self._call: _Call | None = None
        self._flat: tuple[State, list[Tensor]] = (None, [])
        self._form: Form | None = None  # of its state; unknown before the first graph
        self._ahead = Ahead()
        self._hearing, self._alarm = Hearing(), Alarm()

    def init(self, params: Params, *batch: Any, buffers: Any = None) -> StepState:
        """Trace, compile, and return the state for the first step. Nothing runs yet.

        With ``block_size="auto"`` one pass over the batch does run, interpreted, and its factors are inverted
        at several block sizes; a state that was saved needs no ``init``, and keeps its block size.

        Raises:
            TypeError: ``params`` is no mapping of floating-point tensors.
            ValueError: nothing to train, the loss is no scalar, or it does not depend on ``params``; or
                ``block_size="auto"`` and a factor is not finite on this batch.
            CoverageError: ``strict``, and a weight has no Kronecker pair.
        """
        check_params(params)
        check_one_device(params)
        self.coverage = None
        self._hyper = HyperTensors()
        if not self._donate:  # steps run on copies: Dynamo guards on whether a tensor is the model's own
            params, _, _ = _copies(params, StepState(0, None))
        chosen = self._choose_block_size(params, batch if buffers is None else (buffers, *batch))
        try:
            self._run(params, None, batch, buffers)
        except _Traced as traced:
            self.coverage = traced.coverage
        if self.coverage is None:
            raise ValueError("the loss does not depend on any of params: it is a constant")
        inner = self._first_state(params, self.coverage)
        check_ranks(self._tx, _trained(params, self.coverage), self.coverage)
        damping = None if self._tx.adaptive is None else self._tx.adaptive.initial
        return StepState(0, inner, buffers, damping=damping, block_size=chosen, version=VERSION)

    def __call__(self, params: Params, state: StepState, *batch: Any) -> tuple[Params, StepState, StepOutput]:
        """Take one step.

        Returns:
            The new parameters and state (with ``donate`` the same tensors, changed), and the output.

        Raises:
            TypeError: ``state`` does not come from ``init``.
            ValueError: ``state`` comes from the ``init`` of another step, or of a later thor_fx.
            RuntimeError: ``params`` are not those that ``init`` was called with.
        """
        if not isinstance(state, StepState):
            raise TypeError(f"state must come from step.init(params, *batch), got {type(state).__name__}")
        if state.version != VERSION:
            state = migrated(state, state.version, STEP, "state")._replace(version=VERSION)
        self._check_rules(state)
        if self._auto is not None and state.block_size != self.block_size:
            self._resolve(state.block_size, params)
        came = state.inner
        if not self._donate:
            params, state, copies = _copies(params, state)
            self._ahead.follow(copies)
        adapted = {} if state.damping is None else {"damping": state.damping}
        hyper = self._hyper({**self._tx.hyper(state.step), **adapted}, params)
        kind = kind_of(self._tx, state.step, state.due, ready=state.ready, overdue=state.overdue)
        if kind.factors != "plain":
            self._ahead.forget()
        call = _Call(kind, [*self._leaves(state.inner), *hyper])
        with waiting_for_others(self._tx.world, f"in step {state.step}"):
            loss, aux = self._run(params, call, batch, state.buffers)
        buffers, aux = (None, aux) if state.buffers is None else aux
        heard = self._hearing.after(state.inner, came, factors=kind.factors != "plain")
        ready = state.ready or (heard.moved and was_taken(state.inner))  # waits, until the first good step
        with as_written(loss.device):
            due = self._between(params, state, kind, hyper) if heard.moved else state.due
            damping = self._damping(state, loss, call.later)
        if kind.factors != "plain" or not heard.counts:
            self._alarm.look(state.inner, self._hearing.skipped)
        overdue = heard.missed or (state.overdue and not heard.moved)
        new = state._replace(step=state.step + heard.counts, buffers=buffers, ready=ready)
        new = new._replace(due=due, damping=damping, overdue=overdue)
        return params, new, StepOutput(loss, aux, call.statistics)

    def metrics(self, state: StepState) -> Metrics:
        """Numbers for any logger: as :meth:`thor_fx.Thor.metrics`. Reading them waits for the device."""
        rates = self._tx.hyper(max(0, state.step - 1))
        adapted = {} if state.damping is None else {"damping": state.damping}
        own = {
            name: float(value) for name, value in {**rates, **adapted}.items() if name in {"lr", "damping"}
        }
        counts = metrics(state.inner)
        self._alarm.tell(skipped=int(counts["skipped_steps"]), failed=int(counts["failed_inverses"]))
        found: Metrics = {"step": state.step, **own, **counts}
        if self.coverage is None or self._block_size == "auto":
            return found
        return found | trace(state.inner, self.coverage.layers, self._block_size)

    def _between(self, params: Params, state: StepState, kind: Kind, hyper: Sequence[Tensor]) -> int | None:
        """What the transform does after the step, in place; when it wants factors next."""
        if self._tx.between is None or not state.ready:
            return state.due
        assert self.coverage is not None
        layers = frozenset(self.coverage.layers)
        measured = layers if kind.factors == "measure" else frozenset[str]()
        taken = Taken(state.step, measured, layers, self._ahead)
        trained = _trained(params, self.coverage)
        due = run_between(self._tx, state.inner, trained, self.coverage, hyper, taken)
        return state.due if due is None else due

    def _damping(self, state: StepState, before: Tensor, later: Tensor | None) -> float | None:
        if self._tx.adaptive is None or state.damping is None or later is None:
            return state.damping
        return self._tx.adaptive.after(state.damping, state.inner, before, later, self._tx.world)

    @property
    def block_size(self) -> BlockSize:
        """The side of the blocks; ``"auto"`` before ``init`` has chosen one; None: nothing is cut."""
        return self._block_size

    def _choose_block_size(self, params: Params, batch: Sequence[Any]) -> int | None:
        """What "auto" becomes; None where a block size was given, or nothing can be cut."""
        if self._auto is None:
            return None
        find = partial(choose_by_step, self._loss_fn, params, batch, self._tx.rules)
        self.block_size_report = agreed(self._tx.world, find)
        chosen = None if self.block_size_report is None else self.block_size_report.chosen
        self._resolve(chosen, params)
        return chosen

    def _resolve(self, block_size: int | None, params: Params) -> None:
        """Go on with this block size; what was compiled for another is forgotten."""
        assert self._auto is not None, "the block size was given"
        if block_size == self._block_size:
            return
        self._tx, self._block_size = self._auto(block_size), block_size
        self._capture = LossCapture(self._loss_fn, self._compile, self._dynamic)
        if self.coverage is not None:
            self._first_state(params, self.coverage)

    def _first_state(self, params: Params, found: Coverage) -> State:
        inner = self._tx.init(_trained(params, found), found)
        self._form = Form.of(inner)
        return inner

    def _run(
        self, params: Params, call: _Call | None, batch: Sequence[Any], buffers: Any
    ) -> tuple[Tensor, Any]:
        self._params, self._call = params, call
        given = batch if buffers is None else (buffers, *batch)
        try:
            return self._capture(params, *given, data=batch)
        finally:
            self._params, self._call = {}, None

    def _leaves(self, inner: State) -> list[Tensor]:
        """The tensors of the state; donated state is the same object in every step."""
        if self._flat[0] is not inner:
            self._flat = inner, pytree.tree_leaves(inner) if self._form is None else self._form.leaves(inner)
        return self._flat[1]

    def _check_rules(self, state: StepState) -> None:
        """Refuse a state whose damping adapts itself where that of the step does not, and the reverse."""
        if (state.damping is None) != (self._tx.adaptive is None):
            raise ValueError(
                f"state does not belong to this step: its damping is {state.damping}, and this step has "
                f"{'no' if self._tx.adaptive is None else 'a'} damping=LevenbergMarquardt(...): use the "
                "damping= that it was saved with, or take another state from this step.init(params, *batch)"
            )

    def _compile(self, captured: Captured) -> Runner:
        """Called by Dynamo when no guard fits: all kinds of step, from one trace.

        That was taken under the caller's autocast, whose casts are in the graph; nothing is cast behind it.
        """
        device = next(iter(self._params.values())).device
        with as_written(device):
            return self._kinds(captured, device)

    def _kinds(self, captured: Captured, device: torch.device) -> Runner:
        graph = pipeline.run(captured.graph, [canonicalize], watch=tracer("step"))
        found = covered(graph, self._params, self._tx.rules)
        log_coverage("step", found)
        if self._strict:
            found.check({name: p.dim() for name, p in self._params.items()})
        self._accept(found)
        if self._form is None and self._call is not None:  # the state was saved: there was no init
            self._form = Form.of(self._tx.init(_shapes_of(_trained(self._params, found)), found))
            self._form.leaves(self._flat[0])
        runs = {kind: self._compile_kind(graph, captured, kind) for kind in kinds(self._tx)}
        again = None if self._tx.adaptive is None else self._compile_loss(graph)

        def runner(*flat: Any) -> Sequence[Any]:
            if self._call is None:
                raise _Traced(found)
            with torch.no_grad(), as_written(device):
                run = runs[self._call.kind]
                results = run.compiled(*flat, *self._call.extra)
                behind = len(results) - len(run.statistics)
                measured = zip(run.statistics, results[behind:], strict=True)
                self._call.statistics = {(one.name, one.param): value for one, value in measured}
                if self._call.kind.compares and again is not None:
                    (self._call.later,) = again(*flat)
                return results[:behind]

        return runner

    def _accept(self, found: Coverage) -> None:
        if self.coverage is not None and self.coverage.layers != found.layers:
            raise RuntimeError(
                "the layers of this call are not those that step.init saw: call step.init again "
                f"(then: {sorted(self.coverage.layers)}, now: {sorted(found.layers)})"
            )
        if self.coverage is not None and self.coverage.trained != found.trained:
            raise RuntimeError(
                "params are not those that step.init saw: call step.init again (trained in one of the two "
                f"only: {sorted(self.coverage.trained ^ found.trained)})"
            )
        self.coverage = found

    def _compile_kind(self, graph: fx.GraphModule, captured: Captured, kind: Kind) -> _Run:
        assert self.coverage is not None
        compiler = self._compiler if kind.factors == "plain" else self._factor_compiler
        about = self._tx, self.coverage, list(_trained(self._params, self.coverage))
        assembly = WholeStep(*about, results_of(captured.forward), self._passes, self._disabled)
        whole = assembly.graph(graph, kind, compiler.recomputes)
        fakes = [node.meta["val"] for node in whole.graph.find_nodes(op="placeholder")]
        compiled = compiler(whole, fakes, fixed_arguments(whole) if self._donate else ())
        return _Run(compiled, tuple(statistics_of(whole)))

    def _compile_loss(self, graph: fx.GraphModule) -> Compiled:
        """The forward pass alone: what it changes besides (running statistics) is not written."""
        fakes = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
        return self._compiler(loss_alone(graph), fakes)


def _copies(params: Params, state: StepState) -> tuple[Params, StepState, Mapping[int, Tensor]]:
    """Copies of all tensors but frozen ones; what was one tensor under two names stays one. And by ``id``."""
    known: dict[int, Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        return known.setdefault(id(tensor), tensor.detach().clone())

    copied = {name: copy(p) if trainable(p) else p for name, p in params.items()}
    inner, buffers = pytree.tree_map_only(Tensor, copy, (state.inner, state.buffers))
    return copied, state._replace(inner=inner, buffers=buffers), known


def _shapes_of(params: Params) -> dict[str, Tensor]:
    """Tensors without memory in place of the parameters."""
    return {name: torch.empty_like(p, device="meta") for name, p in params.items()}


def _trained(params: Params, found: Coverage) -> dict[str, Tensor]:
    return {name: p for name, p in params.items() if name in found.trained}
