"""The drop-in door: a compiled model whose backward also delivers Kronecker factors when asked.

The model stays the module it was; only what its ``__call__`` runs changes. A plain step runs what
``torch.compile(model)`` runs. When the optimizer wants factors, the next forward pass in training
mode runs a second compiled form of the model, whose joint graph has been rewritten.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from .capture import (
    Runner,
    add_slots,
    describe_forward_inputs,
    describe_joint,
    export_joint,
    has_recurrent_operator,
    make_slot,
    own_code,
    rnns_looked_into,
    tracing_settings,
    trainable_rnns,
    without_dynamo,
)
from .factors import Moments, moments_of
from .inductor import JointPass, check_backend, compile_differentiable
from .layers import Coverage, coverage
from .parameters import check_params
from .passes import emit_factors, find_sites, outputs
from .passes.emit_factors import transposed
from .passes.outputs import Factor, Input, InputDescriptor, Param, Rows, Terms
from .passes.splice import Decompositions

Module = TypeVar("Module", bound=nn.Module)


def compile(
    model: Module,
    *,
    backend: str = "inductor",
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Module:
    """Compile a model so that :class:`thor_fx.Thor` can read its Kronecker factors.

    The same object is returned: state dict, training mode, device moves, hooks and pickling are the
    module's own. In evaluation mode and under ``no_grad`` nothing is collected.

    Args:
        model: any module with trainable parameters.
        backend: ``"inductor"``; or ``"aot_eager"`` or ``"eager"`` to interpret the graphs.
        mode: as in ``torch.compile``.
        options: Inductor settings, as in ``torch.compile``.
        **kwargs: further arguments of ``torch.compile`` (``fullgraph``, ``dynamic``, ...).

    Returns:
        ``model`` itself; call it, not its ``forward``.

    Raises:
        TypeError: ``model`` is no module, or has a parameter that is not floating-point.
        ValueError: ``model`` has no trainable parameter, or ``backend`` is unknown.

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
    check_params(dict(model.named_parameters()))
    call = _Call(model, backend, mode, options, kwargs)
    model._compiled_call_impl = call  # NOTE: the slot nn.Module.compile() uses; dropped when pickled
    return model


def collector_of(model: Any) -> "Collector":
    """The collector of a compiled model.

    Raises:
        TypeError: ``model`` is not compiled by us.
    """
    call = getattr(model, "_compiled_call_impl", None)
    if not isinstance(call, _Call):
        raise TypeError(
            f"model must be compiled by thor_fx, got {type(model).__name__}: call "
            "model = thor_fx.compile(model) first (instead of torch.compile)"
        )
    return call.collector


class _Call:
    """What a compiled model runs in place of its own ``__call__``."""

    def __init__(
        self,
        model: nn.Module,
        backend: str,
        mode: str | None,
        options: Mapping[str, Any] | None,
        kwargs: Mapping[str, Any],
    ) -> None:
        self.collector = Collector(backend)
        self._model = model
        self._captures_rnn = not any(isinstance(part, nn.RNNBase) for part in model.modules())
        settings: dict[str, Any] = {"mode": mode, "options": options} if backend == "inductor" else {}

        def plain(*args: Any, **kw: Any) -> Any:
            return model._call_impl(*args, **kw)

        def factor(*args: Any, **kw: Any) -> Any:
            return model._call_impl(*args, **kw)

        def factor_backend(forward: fx.GraphModule, inputs: Sequence[Any]) -> Runner:
            params = dict(model.named_parameters())
            self._captures_rnn |= has_recurrent_operator(forward)
            build = _FactorCompiler(self.collector, backend, mode, options)
            return build(forward, inputs, params)

        self._plain = torch.compile(own_code(plain), backend=backend, **settings, **kwargs)
        self._factor = torch.compile(own_code(factor), backend=factor_backend, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        collects = self.collector.wanted and self._model.training and torch.is_grad_enabled()
        if not collects and self._breaks_at_rnn():
            with rnns_looked_into():
                return self._plain(*args, **kwargs)
        if not collects:
            return self._plain(*args, **kwargs)
        with tracing_settings():
            return self._factor(*args, **kwargs)

    def _breaks_at_rnn(self) -> bool:
        """Whether factor graphs have been compiled and none contains the recurrent layers (packed sequences).

        Plain steps must then break where these did: a frame that Dynamo gives up on, because of a
        recurrent module, it never enters again, in factor steps neither.
        """
        return bool(self.collector.graphs) and not self._captures_rnn


@dataclass(eq=False)
class SlottedGraph:
    """A compiled graph whose backward fills slots.

    Attributes:
        coverage: the parameters it uses.
        slots: leaves whose ``grad`` is what the descriptor says.
    """

    coverage: Coverage
    slots: Mapping[outputs.OutputDescriptor, Tensor]

    def take(self) -> dict[outputs.OutputDescriptor, Tensor]:
        """What has been collected since the last call; empty if nothing has."""
        taken = {d: s.grad for d, s in self.slots.items() if s.grad is not None}
        for slot in self.slots.values():
            slot.grad = None
        return taken


@dataclass
class Collector:
    """Where the factors of a model arrive.

    Attributes:
        backend: what the model is compiled with.
        wanted: whether the next forward pass in training mode is to collect factors.
        graphs: every graph compiled so far.
        last: the graph that ran last.
        coverage: the coverage of all graphs together; None before the first.
    """

    backend: str
    wanted: bool = True
    graphs: list[SlottedGraph] = field(default_factory=list)
    last: SlottedGraph | None = None

    coverage: Coverage | None = None

    def add(self, graph: SlottedGraph) -> None:
        """Remember one more compiled graph."""
        self.graphs.append(graph)
        self.coverage = graph.coverage if self.coverage is None else self.coverage.merge(graph.coverage)

    def clear(self) -> None:
        """Forget what has been collected."""
        for graph in self.graphs:
            graph.take()

    def take(self) -> tuple[dict[str, Moments], Tensor | None]:
        """The moments by layer and the number of loss terms, summed over backward passes and graphs.

        The terms are those of the graph that ran last: its output is the nearest to the loss.
        """
        sums: dict[outputs.OutputDescriptor, Tensor] = {}
        for graph in self.graphs:
            nearest = self.last is not None and graph.coverage.terms == self.last.coverage.terms
            for descriptor, value in graph.take().items():
                if isinstance(descriptor, Terms) and not nearest:
                    continue
                sums[descriptor] = sums[descriptor] + value if descriptor in sums else value
        return moments_of(sums), sums.get(Terms())


@dataclass(frozen=True)
class _FactorCompiler:
    """Compiles one of Dynamo's graphs with slots for its factors."""

    collector: Collector
    backend: str
    mode: str | None
    options: Mapping[str, Any] | None

    def __call__(
        self, forward: fx.GraphModule, inputs: Sequence[Any], params: Mapping[str, Tensor]
    ) -> Runner:
        described = describe_forward_inputs(forward, params)
        if not any(isinstance(descriptor, Param) for descriptor in described):
            return self._compile(forward, inputs, lambda _gm, **_: None, key="")
        found = _analyse(forward, described)
        used = {d.name: params[d.name] for d in described if isinstance(d, Param)}
        slots = {
            descriptor: make_slot(shape, used[layer]) for descriptor, shape, layer in _slot_shapes(found)
        }
        slotted, fakes = add_slots(forward, list(slots.values()))
        described += tuple(Input(len(described) + i) for i in range(len(slots)))
        fill = _FillSlots(described, tuple(slots))
        compiled = self._compile(slotted, [*inputs, *fakes], fill, key=repr(fill))
        graph = SlottedGraph(found, slots)
        self.collector.add(graph)
        return without_dynamo(_runner(compiled, graph, self.collector))

    def _compile(
        self, forward: fx.GraphModule, inputs: Sequence[Any], joint_pass: JointPass, key: str
    ) -> Runner:
        backend, mode, options = self.backend, self.mode, self.options
        with trainable_rnns():
            return compile_differentiable(
                forward, inputs, joint_pass, key=key, backend=backend, mode=mode, options=options
            )


def _runner(compiled: Callable[..., Any], graph: SlottedGraph, collector: Collector) -> Runner:
    extra = list(graph.slots.values())

    def run(*args: Any) -> Any:
        collector.last = graph
        return compiled(*args, *extra)

    return run


def _analyse(forward: fx.GraphModule, described: Sequence[InputDescriptor]) -> Coverage:
    """What the parameters of a forward graph are, before anything is compiled."""
    return coverage(find_sites(export_joint(forward, described)))


def _slot_shapes(found: Coverage) -> list[tuple[outputs.OutputDescriptor, tuple[int, ...], str]]:
    """Every slot: what goes there, its shape, and the parameter that it belongs to."""
    shapes: list[tuple[outputs.OutputDescriptor, tuple[int, ...], str]] = []
    for name, layer in found.layers.items():
        uses = [(name, layer.in_, layer.out)]
        uses += [(transposed(name), layer.out, layer.in_)] if layer.both_ways else []
        for use, in_, out in uses:
            shapes.append((Factor(use, "A"), (in_, in_), layer.param))
            shapes.append((Factor(use, "G"), (out, out), layer.param))
            shapes.append((Rows(use), (), layer.param))
    if found.terms is not None:
        shapes.append((Terms(), (), found.layers[found.terms].param))
    return shapes


@dataclass(frozen=True)
class _FillSlots:
    """The joint pass: emit factors, and put each where the gradient of its slot belongs."""

    inputs: tuple[InputDescriptor, ...]
    slots: tuple[outputs.OutputDescriptor, ...]

    def __call__(self, gm: fx.GraphModule, *, decompositions: Decompositions) -> None:
        describe_joint(gm, self.inputs)
        out, before = outputs.output_node(gm.graph), outputs.results(gm)
        emit_factors(gm, decompositions=decompositions)
        emitted = outputs.output_nodes(gm)
        missing = [descriptor for descriptor in self.slots if descriptor not in emitted]
        if missing:
            raise RuntimeError(f"the compiled graph has no {missing}: please report this model")
        first = len(before) - len(self.slots)
        assert all(node is None for node in before[first:]), "a slot has a gradient already"
        out.args = ([*before[:first], *(emitted[descriptor] for descriptor in self.slots)],)
