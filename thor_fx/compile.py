"""The drop-in door: a compiled model whose backward also delivers Kronecker factors when asked.

The model stays the module it was; only what its ``__call__`` runs changes. A plain step runs what
``torch.compile(model)`` runs. When the optimizer wants factors, the next forward pass in training
mode runs a second compiled form of the model, whose joint graph has been rewritten.
"""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from .arguments import check_choice, check_dynamic, check_type, checked_disabled
from .capture import (
    CompilationFailed,
    GraphBreak,
    Runner,
    add_slots,
    describe_forward_inputs,
    examples_of,
    export_joint,
    is_fake,
    make_slot,
    own_code,
    patient,
    rnns_looked_into,
    tracing_settings,
    without_drawing,
    without_dynamo,
)
from .collector import Collector, SlottedGraph
from .distributed.wrappers import unwrapped
from .inductor import (
    COMPILER_ERRORS,
    JointPass,
    check_backend,
    check_settings,
    compile_as_torch_does,
    compile_differentiable,
    tell_of_compiler,
)
from .joint_graphs import describe_joint
from .layers import Coverage, CoverageError, coverage
from .logs import log_coverage
from .own_passes import Statistics, apply_own, checked_passes, fixed_shape, key_of, statistics_of
from .parameters import check_params
from .passes import PassError, emit_factors, outputs
from .passes.layout import Rules
from .passes.likelihoods import LikelihoodError
from .passes.outputs import Factor, Input, InputDescriptor, Param, Rows, Split, Statistic, Terms
from .passes.pipeline import Pass
from .passes.splice import Decompositions, inside
from .passes.stages import run_watched
from .passes.survey import survey
from .recurrent import has_recurrent_operator, trainable_rnns
from .trace_log import tracer
from .uncompiled import OnCompileError

Module = TypeVar("Module", bound=nn.Module)


def compile(
    model: Module,
    *,
    backend: str = "inductor",
    factor_backend: str | None = None,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    strict: bool = False,
    passes: Sequence[Pass] = (),
    disable_passes: Collection[str] = (),
    on_compile_error: OnCompileError = "raise",
    **kwargs: Any,
) -> Module:
    """Compile a model so that :class:`thor_fx.Thor` can read its Kronecker factors.

    The same object is returned: state dict, training mode, device moves, hooks and pickling are the
    module's own. In evaluation mode and under ``no_grad`` nothing is collected.

    Args:
        model: any module with trainable parameters.
        backend: ``"inductor"``; or ``"aot_eager"`` or ``"eager"`` to interpret the graphs.
        factor_backend: the same for factor steps and their updates; None: ``backend``. ``"aot_eager"`` saves
            most of what they take to compile, and costs time in every one of them: ``docs/compiling.md``.
        mode: as in ``torch.compile``; the update of :class:`thor_fx.Thor` is compiled with it, too.
        options: Inductor settings, as in ``torch.compile``, likewise.
        strict: raise a :class:`~thor_fx.CoverageError` in the first factor step where a weight (a
            parameter of two or more axes) would take the first-order rule. Without it, weights that no
            compiled graph uses are named in a warning.
        passes: passes of your own over the graph of a factor step: ``docs/passes.md``. What they measure is
            read with :func:`thor_fx.statistics`.
        disable_passes: optimisations to go without, by name; the results are the same up to rounding:
            ``docs/passes.md``.
        on_compile_error: ``"eager"``: a graph that Inductor cannot compile runs uncompiled, with a warning
            that gives the reason; so does an update. ``"raise"``: it is an error.
        **kwargs: further arguments of ``torch.compile`` (``fullgraph``, ``dynamic``, ...).

    Returns:
        ``model`` itself; call it, not its ``forward``.

    Raises:
        TypeError: ``model`` is no module, or has a parameter that is not floating-point; a pass is not
            callable, or another argument has a wrong type; the message names it.
        ValueError: ``model`` has no trainable parameter; a backend, a mode, a setting of Inductor, an
            optimisation or ``on_compile_error`` is unknown; or there are both ``mode`` and ``options``,
            which torch refuses.

    Example:
        >>> import torch, thor_fx
        >>> model = thor_fx.compile(torch.nn.Linear(3, 2), backend="aot_eager")
        >>> opt = thor_fx.Thor(model, lr=0.1, damping=0.1, momentum=0.9)
        >>> model(torch.eye(3)).square().mean().backward()
        >>> opt.step()
        >>> sorted(opt.coverage.layers)
        ['weight']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}: {model!r}")
    check_backend(backend)
    factors_by = backend if factor_backend is None else factor_backend
    check_backend(factors_by, "factor_backend")
    check_params(dict(model.named_parameters()), name="model", parts=True)
    check_settings(mode, options)
    if backend == "inductor" and mode is not None and options is not None:
        raise ValueError("torch.compile takes mode or options: options may hold what mode stands for")
    check_type("strict", strict, bool, "True or False")
    check_choice("on_compile_error", on_compile_error, OnCompileError)
    check_dynamic(kwargs.get("dynamic"))
    own, disabled = checked_passes(passes), checked_disabled(disable_passes)
    inner = unwrapped(model)
    settings: dict[str, Any] = {"mode": mode, "options": options, "strict": strict}
    settings["on_compile_error"] = on_compile_error
    collector = Collector(backend, factors_by, **settings, passes=own, disabled=disabled)
    collector.use(collector.rules)
    call = _Call(inner, collector, kwargs)
    inner._compiled_call_impl = call  # NOTE: the slot nn.Module.compile() uses; dropped when pickled
    return model


def collector_of(model: Any) -> Collector:
    """The collector of a compiled model.

    Raises:
        TypeError: ``model`` is not compiled by us.
    """
    call = getattr(unwrapped(model), "_compiled_call_impl", None)
    if not isinstance(call, _Call):
        advice = "call model = thor_fx.compile(model) first (instead of torch.compile)"
        if not isinstance(model, nn.Module):
            advice += ", and pass the model itself, not its parameters"
        raise TypeError(f"model must be compiled by thor_fx, got {type(model).__name__}: {advice}")
    return call.collector


def statistics(model: nn.Module) -> Statistics:
    """What the ``passes`` of a compiled model have measured since the last step.

    To be read after ``backward`` and before the optimizer's ``step`` or ``zero_grad``, which clear it.
    Micro-batches add up, as gradients do.

    Args:
        model: compiled with ``thor_fx.compile(model, passes=[...])``.

    Returns:
        Tensors by the name of the statistic and that of the parameter; nothing after backward passes without
        factors.

    Raises:
        TypeError: ``model`` is not compiled by us.

    Example:
        >>> import torch, thor_fx
        >>> from thor_fx.passes import Grad, Statistic, outputs, splice
        >>> def norms(gm):
        ...     gradient = outputs.output_nodes(gm)[Grad("weight")]
        ...     norm = splice(gradient, torch.linalg.vector_norm, gradient)
        ...     outputs.append(gm, [(Statistic("norm", "weight"), norm)])
        >>> model = thor_fx.compile(torch.nn.Linear(3, 2), backend="aot_eager", passes=[norms])
        >>> model(torch.eye(3)).sum().backward()
        >>> round(float(thor_fx.statistics(model)["norm", "weight"]), 3)
        2.449
    """
    return collector_of(model).statistics()


class _Call:
    """What a compiled model runs in place of its own ``__call__``."""

    def __init__(
        self,
        model: nn.Module,
        collector: Collector,
        kwargs: Mapping[str, Any],
    ) -> None:
        self.collector = collector
        backend, mode, options = collector.backend, collector.mode, collector.options
        self._model = model
        self._tracing_settings, self._rnns_looked_into = tracing_settings(), rnns_looked_into()
        self._captures_rnn = not any(isinstance(part, nn.RNNBase) for part in model.modules())
        settings: dict[str, Any] = {"backend": backend}
        if backend == "inductor" and collector.on_compile_error == "eager":
            forgiving = partial(compile_as_torch_does, mode=mode, options=options, on_error="eager")
            settings = {"backend": forgiving}
        elif backend == "inductor":
            settings |= {"mode": mode, "options": options}

        def plain(*args: Any, **kw: Any) -> Any:
            return model._call_impl(*args, **kw)

        def factor(*args: Any, **kw: Any) -> Any:
            return model._call_impl(*args, **kw)

        def factor_backend(forward: fx.GraphModule, inputs: Sequence[Any]) -> Runner:
            self._captures_rnn |= has_recurrent_operator(forward)
            build = _FactorCompiler(model, collector, collector.rules, copy.deepcopy(forward), inputs)
            return without_dynamo(_Instances(build, examples_of(forward)))

        self._plain = patient(torch.compile(own_code(plain), **settings, **kwargs))

        def compile_factor() -> Callable[..., Any]:
            whole = {} if self.collector.rules.fisher == "empirical" else {"fullgraph": True}
            return patient(torch.compile(own_code(factor), backend=factor_backend, **{**kwargs, **whole}))

        self._compile_factor = compile_factor
        self._factor = compile_factor()
        self._generation = self.collector.generation

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._run(*args, **kwargs)
        except COMPILER_ERRORS as error:
            tell_of_compiler(error)
            raise

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        collects = self.collector.wanted and self._model.training and torch.is_grad_enabled()
        if not collects and self._breaks_at_rnn():
            with self._rnns_looked_into():
                return self._plain(*args, **kwargs)
        if not collects:
            return self._plain(*args, **kwargs)
        if self._generation != self.collector.generation:
            self._factor, self._generation = self._compile_factor(), self.collector.generation
        with self._tracing_settings():
            try:
                return self._factor(*args, **kwargs)
            except CompilationFailed as error:
                if isinstance(error.inner_exception, CoverageError | LikelihoodError | PassError):
                    raise error.inner_exception from None
                raise
            except GraphBreak as error:
                fisher = self.collector.rules.fisher
                if fisher != "empirical":
                    error.add_note(ONE_GRAPH.format(fisher))
                raise

    def _breaks_at_rnn(self) -> bool:
        """Whether factor graphs have been compiled and none contains the recurrent layers (packed sequences).

        Plain steps must then break where these did: a frame that Dynamo gives up on, because of a
        recurrent module, it never enters again, in factor steps neither.
        """
        return bool(self.collector.graphs) and not self._captures_rnn


def _tensors_of(module: nn.Module) -> list[Tensor]:
    """The buffers and the plain tensors that a module has as attributes."""
    values = (*module.buffers(recurse=False), *vars(module).values())
    return [value for value in values if isinstance(value, Tensor)]


ONE_GRAPH = (
    "thor_fx: fisher={!r} draws cotangents of the model's output and follows them through its backward, so "
    "the model must be one graph: see TORCH_LOGS=graph_breaks, or pass fisher='empirical'"
)


# NOTE: [Modules of one class] Where Dynamo compiles a frame of its own (behind a graph break in a loop, or
# under FSDP), all modules of one class run what it has compiled for the first of them: their parameters are
# arguments, and no guard tells them apart. Which ones they are has to be looked up in every call.


class _Instances:
    """One of Dynamo's graphs, with slots of its own for every set of parameters that it is run with."""

    def __init__(self, build: "_FactorCompiler", examples: Sequence[Any]) -> None:
        self._build = build
        described = build.described(examples)
        self._places = [place for place, one in enumerate(described) if isinstance(one, Param)]
        self._built: dict[tuple[int, ...], tuple[_Built, list[Tensor]]] = {}
        self._runners: dict[tuple[int, ...], Runner] = {}
        self._shown: set[tuple[int, ...]] = set()
        self._first = self._runner(examples)

    def __call__(self, *args: Any) -> Any:
        if any(map(is_fake, args)):  # Dynamo cuts a graph at DDP's buckets, and asks for shapes
            return self._first(*args)
        return self._runner(args)(*args)

    def _runner(self, args: Sequence[Any]) -> Runner:
        collector, key = self._build.collector, tuple(id(args[place]) for place in self._places)
        if key not in self._built:
            params = [args[place] for place in self._places]  # while they live, their addresses are theirs
            with without_drawing():  # where Dynamo captures, it sees to that itself
                self._built[key] = self._build(args), params
        built = self._built[key][0]
        if collector.looks is not None:
            if key not in self._shown:
                built.show(collector, collector.looks)
                self._shown.add(key)
            return self._build.plain()
        if key not in self._runners:
            self._runners[key] = built.added(collector)
        return self._runners[key]


@dataclass(frozen=True)
class _Built:
    """A compiled graph that nobody knows of yet; without slots where it uses no parameter.

    Attributes:
        compiled: takes the slots behind its arguments.
        slotted: the graph.
    """

    compiled: Runner
    slotted: SlottedGraph | None

    def added(self, collector: Collector) -> Runner:
        """Let the factors of every run arrive."""
        if self.slotted is None:
            return self.compiled
        return _runner(self.compiled, collector.add(self.slotted), collector)

    def show(self, collector: Collector, looked_for: frozenset[str]) -> None:
        """Tell of the layers that are looked for."""
        if self.slotted is not None:
            found = self.slotted.coverage.restrict(looked_for)
            collector.show(replace(self.slotted, coverage=found))


PLAIN = "plain"


@dataclass(frozen=True)
class _FactorCompiler:
    """Compiles one of Dynamo's graphs with slots for its factors; what is alike is compiled once."""

    model: nn.Module
    collector: Collector
    rules: Rules
    forward: fx.GraphModule
    inputs: Sequence[Any]
    compiled: dict[Any, Runner] = field(default_factory=dict)

    def described(self, examples: Sequence[Any]) -> tuple[InputDescriptor, ...]:
        """What the arguments are."""
        params = dict(self.model.named_parameters())
        held = {id(t) for part in self.model.modules() for t in _tensors_of(part)}
        return describe_forward_inputs(self.forward, examples, params, lambda t: id(t) in held)

    def __call__(self, examples: Sequence[Any]) -> _Built:
        """What runs with the parameters of ``examples``."""
        params, described = dict(self.model.named_parameters()), self.described(examples)
        used = {d.name: params[d.name] for d in described if isinstance(d, Param)}
        if not used:
            return _Built(self._compile(self.forward, self.inputs, lambda _gm, **_: None, key=""), None)
        joint = export_joint(self.forward, described)
        found = coverage(survey(joint, self.rules), self.rules)
        log_coverage(f"graph {len(self.collector.graphs)}", found)
        self.collector.copies = max([self.collector.copies, *(split.size for split in _splits(described))])
        if self.collector.strict:
            found.check({name: p.dim() for name, p in params.items()})
        slots = {descriptor: make_slot(shape, used[param]) for descriptor, shape, param in _slots(found)}
        measured = self._statistics(joint)
        slots |= {one: make_slot(fixed_shape(one, value), value) for one, value in measured.items()}
        form = _form(described, found, measured)
        if form not in self.compiled:
            self.compiled[form] = self._compile_slotted(described, found, slots)
        owners = {name: used[name] for layer in found.layers.values() for name in layer.params}
        return _Built(self.compiled[form], SlottedGraph(found, slots, owners))

    def plain(self) -> Runner:
        """What ``torch.compile`` makes of the graph."""
        if PLAIN not in self.compiled:
            with trainable_rnns(), without_drawing():
                self.compiled[PLAIN] = compile_as_torch_does(
                    self.forward,
                    self.inputs,
                    backend=self.collector.backend,
                    mode=self.collector.mode,
                    options=self.collector.options,
                    on_error=self.collector.on_compile_error,
                )
        return self.compiled[PLAIN]

    def _statistics(self, joint: fx.GraphModule) -> dict[Statistic, Tensor]:
        """What the user's passes measure, as fake values: slots are there before the graph is compiled."""
        if not self.collector.passes:
            return {}
        emit_factors(joint, rules=self.rules)
        apply_own(joint, self.collector.passes)
        return {one: node.meta["val"] for one, node in statistics_of(joint).items()}

    def _compile_slotted(
        self,
        described: tuple[InputDescriptor, ...],
        found: Coverage,
        slots: Mapping[outputs.OutputDescriptor, Tensor],
    ) -> Runner:
        slotted, fakes = add_slots(self.forward, list(slots.values()))
        described += tuple(Input(len(described) + i) for i in range(len(slots)))
        fill = _FillSlots(described, tuple(slots), self.rules, self.collector.passes)
        return self._compile(slotted, [*self.inputs, *fakes], fill, key=_key(fill, found))

    def _compile(
        self, forward: fx.GraphModule, inputs: Sequence[Any], joint_pass: JointPass, key: str | None
    ) -> Runner:
        known = self.collector
        settings: dict[str, Any] = {"backend": known.factor_backend, "mode": known.mode}
        settings |= {"options": known.options, "on_error": known.on_compile_error}
        with trainable_rnns():
            return compile_differentiable(forward, inputs, joint_pass, key=key, **settings)


def _splits(described: Sequence[InputDescriptor]) -> list[Split]:
    splits = [descriptor.split for descriptor in described if isinstance(descriptor, Param)]
    return [split for split in splits if split is not None]


def _form(
    described: Sequence[InputDescriptor], found: Coverage, measured: Mapping[Statistic, Tensor]
) -> tuple[Any, ...]:
    """What tells apart the compiled graphs of modules of one class, whose parameters have other names."""
    places = {d.name: place for place, d in enumerate(described) if isinstance(d, Param)}
    kinds = tuple(type(descriptor) for descriptor in described)
    sums = [[(s.input, s.output, s.flipped) for s in layer.sums] for layer in found.layers.values()]
    layers = [
        (places[layer.param], layer.path, layer.sharing, places.get(layer.bias or ""), layer.bias_path, *own)
        for layer, own in zip(found.layers.values(), sums, strict=True)
    ]
    statistics = [(d.name, places.get(d.param, d.param), *map(int, v.shape)) for d, v in measured.items()]
    return kinds, *layers, *statistics


def _key(fill: "_FillSlots", found: Coverage) -> str | None:
    """All that the compiled graph depends on, without the address of a function in it; None: not known."""
    own = key_of(fill.passes)
    if callable(fill.rules.likelihood) or own is None:
        return None
    sharing = tuple(layer.sharing for layer in found.layers.values())
    rules = replace(fill.rules, sharing="expand", layer_filter=None)
    return repr((fill.inputs, _splits(fill.inputs), fill.slots, rules, sharing, own))


def _runner(compiled: Callable[..., Any], graph: SlottedGraph, collector: Collector) -> Runner:
    def run(*args: Any) -> Any:
        return compiled(*args, *collector.begin(graph))

    return run


def _slots(found: Coverage) -> list[tuple[outputs.OutputDescriptor, tuple[int, ...], str]]:
    """Every slot: what goes there, its shape, and the parameter that it belongs to."""
    shapes: list[tuple[outputs.OutputDescriptor, tuple[int, ...], str]] = []
    for layer in found.layers.values():
        for sums in layer.sums:
            sides = (Factor(sums.name, "A"), sums.input), (Factor(sums.name, "G"), sums.output)
            shapes += [(d, side.shape, layer.param) for d, side in sides if side.kind != "identity"]
            shapes.append((Rows(sums.name), sums.rows, layer.param))
    if found.terms is not None:
        kept = found.layers.get(found.terms)  # its device and dtype; None where layer_filter leaves it out
        shapes.append((Terms(), (), min(found.trained) if kept is None else kept.param))
    return shapes


@dataclass(frozen=True)
class _FillSlots:
    """The joint pass: emit factors, and put each where the gradient of its slot belongs."""

    inputs: tuple[InputDescriptor, ...]
    slots: tuple[outputs.OutputDescriptor, ...]
    rules: Rules
    passes: tuple[Pass, ...]

    def __call__(self, gm: fx.GraphModule, *, decompositions: Decompositions) -> None:
        describe_joint(gm, self.inputs)
        before = len(outputs.results(gm))
        watch = tracer("factor graph")
        emit = partial(emit_factors, rules=self.rules, decompositions=decompositions)
        run_watched(emit, gm, emit_factors.__name__, watch)
        with inside(decompositions):
            apply_own(gm, self.passes, watch=watch)
        emitted = outputs.output_nodes(gm)
        missing = [descriptor for descriptor in self.slots if descriptor not in emitted]
        if missing:
            raise RuntimeError(f"the compiled graph has no {missing}: please report this model")
        first, returned = before - len(self.slots), outputs.results(gm)
        assert all(node is None for node in returned[first:before]), "a slot has a gradient already"
        out = outputs.output_node(gm.graph)
        out.args = ([*returned[:first], *(emitted[descriptor] for descriptor in self.slots)],)
