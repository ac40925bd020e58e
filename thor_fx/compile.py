"""The drop-in door: a compiled model whose backward also delivers Kronecker factors when asked.

The model stays the module it was; only what its ``__call__`` runs changes. A plain step runs what
``torch.compile(model)`` runs. When the optimizer wants factors, the next forward pass in training
mode runs a second compiled form of the model, whose joint graph has been rewritten.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import fx, nn

from .arguments import check_choice, check_dynamic, check_type, checked_disabled
from .capture import (
    CompilationFailed,
    GraphBreak,
    Runner,
    own_code,
    patient,
    rnns_looked_into,
    tracing_settings,
    without_dynamo,
)
from .collector import Collector
from .distributed.wrappers import unwrapped
from .factor_graphs import FactorGraph
from .inductor import (
    COMPILER_ERRORS,
    check_backend,
    check_settings,
    compile_as_torch_does,
    replays,
    tell_of_compiler,
)
from .layers import CoverageError
from .own_passes import Statistics, checked_passes
from .parameters import check_params
from .passes import PassError
from .passes.likelihoods import LikelihoodError
from .passes.pipeline import Pass
from .recurrent import has_recurrent_operator
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
    shared_graph: bool = False,
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
        shared_graph: plain steps run the graph of factor steps, and leave its products out
            (:mod:`thor_fx.passes.gates`): there is one graph to compile, not two, of other code than that of
            ``torch.compile(model)``: ``docs/compiling.md``.
        **kwargs: further arguments of ``torch.compile`` (``fullgraph``, ``dynamic``, ...).

    Returns:
        ``model`` itself; call it, not its ``forward``.

    Raises:
        TypeError: ``model`` is no module, or has a parameter that is not floating-point; a pass is not
            callable, or another argument has a wrong type; the message names it.
        ValueError: ``model`` has no trainable parameter; a backend, a mode, a setting of Inductor, an
            optimisation or ``on_compile_error`` is unknown; there are both ``mode`` and ``options``,
            which torch refuses; or ``shared_graph`` with a ``factor_backend`` or with CUDA graphs.

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
    check_type("shared_graph", shared_graph, bool, "True or False")
    if shared_graph:
        _check_shared(backend, factors_by, mode, options)
    check_dynamic(kwargs.get("dynamic"))
    own, disabled = checked_passes(passes), checked_disabled(disable_passes)
    inner = unwrapped(model)
    settings: dict[str, Any] = {"mode": mode, "options": options, "strict": strict}
    settings |= {"on_compile_error": on_compile_error, "shared_graph": shared_graph}
    collector = Collector(backend, factors_by, **settings, passes=own, disabled=disabled)
    collector.use(collector.rules)
    call = _Call(inner, collector, kwargs)
    inner._compiled_call_impl = call  # NOTE: the slot nn.Module.compile() uses; dropped when pickled
    return model


def _check_shared(
    backend: str, factor_backend: str, mode: str | None, options: Mapping[str, Any] | None
) -> None:
    if factor_backend != backend:
        raise ValueError(
            "shared_graph=True compiles one graph for all steps: "
            f"factor_backend must be None, got {factor_backend!r}"
        )
    if replays(mode, options):
        raise ValueError(
            "shared_graph=True asks the host in every step what to leave out, and CUDA graphs ask nothing: "
            f"leave out shared_graph, or mode={mode!r} and options={options!r}"
        )


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
            return without_dynamo(FactorGraph(model, collector, forward, inputs))

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
        trains = self._model.training and torch.is_grad_enabled()
        collects = trains and (self.collector.wanted or self.collector.shared_graph)
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


ONE_GRAPH = (
    "thor_fx: fisher={!r} draws cotangents of the model's output and follows them through its backward, so "
    "the model must be one graph: see TORCH_LOGS=graph_breaks, or pass fisher='empirical'"
)
