"""One of Dynamo's graphs, compiled with slots that receive the factors of its layers."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from .capture import (
    Runner,
    add_slots,
    describe_forward_inputs,
    examples_of,
    export_joint,
    is_fake,
    make_slot,
    without_drawing,
)
from .collector import Collector, SlottedGraph
from .inductor import JointPass, compile_as_torch_does, compile_differentiable
from .joint_graphs import describe_joint
from .layers import Coverage, coverage
from .logs import log_coverage
from .own_passes import apply_own, fixed_shape, key_of, statistics_of
from .passes import emit_factors, outputs
from .passes.gates import gate
from .passes.layout import Rules
from .passes.outputs import Factor, Input, InputDescriptor, Param, Rows, Split, Statistic, Terms
from .passes.pipeline import Pass
from .passes.splice import Decompositions, inside
from .passes.stages import run_watched
from .passes.survey import survey
from .recurrent import trainable_rnns
from .trace_log import tracer

# NOTE: [Modules of one class] Where Dynamo compiles a frame of its own (behind a graph break in a loop, or
# under FSDP), all modules of one class run what it has compiled for the first of them: their parameters are
# arguments, and no guard tells them apart. Which ones they are has to be looked up in every call.


@cache
def told(wanted: bool) -> Tensor:
    """What a graph is told that asks whether its factors are wanted."""
    return torch.tensor(wanted, device="cpu")


class FactorGraph:
    """One of Dynamo's graphs, with slots of its own for every set of parameters that it is run with.

    Args:
        model: whose parameters they are.
        collector: gets what arrives in the slots.
        forward: the graph.
        inputs: fake values of its arguments.
    """

    def __init__(
        self, model: nn.Module, collector: Collector, forward: fx.GraphModule, inputs: Sequence[Any]
    ) -> None:
        examples = examples_of(forward)
        self._compiler = _FactorCompiler(model, collector, collector.rules, copy.deepcopy(forward), inputs)
        described = self._compiler.described(examples)
        self._places = [place for place, one in enumerate(described) if isinstance(one, Param)]
        self._instances: dict[tuple[int, ...], _Instance] = {}
        self._first = self._runner(examples)

    def __call__(self, *args: Any) -> Any:
        """Run the graph; factors arrive in backward, if they are wanted."""
        if any(map(is_fake, args)):  # Dynamo cuts a graph at DDP's buckets, and asks for shapes
            return self._first(*args)
        return self._runner(args)(*args)

    def _runner(self, args: Sequence[Any]) -> Runner:
        collector, instance = self._compiler.collector, self._instance(args)
        if collector.looks is not None and not instance.shown:
            instance.built.show(collector, collector.looks)
            instance.shown = True
        if collector.shared_graph and (collector.looks is not None or not collector.wanted):
            return instance.built.unmeasured
        if collector.looks is not None:
            return self._compiler.plain()
        if instance.runner is None:
            instance.runner = instance.built.added(collector)
        return instance.runner

    def _instance(self, args: Sequence[Any]) -> "_Instance":
        params = [args[place] for place in self._places]
        key = tuple(map(id, params))
        if key not in self._instances:
            with without_drawing():  # where Dynamo captures, it sees to that itself
                self._instances[key] = _Instance(self._compiler(args), params)
        return self._instances[key]


@dataclass
class _Instance:
    """The graph with one set of parameters.

    Attributes:
        built: what runs.
        params: while they live, their addresses are theirs.
        runner: what runs and lets its factors arrive; None until factors are wanted.
        shown: whether its layers were told of.
    """

    built: "_Built"
    params: list[Tensor]
    runner: Runner | None = None
    shown: bool = False


@dataclass(frozen=True)
class _Built:
    """A compiled graph that nobody knows of yet; without slots where it uses no parameter.

    Attributes:
        compiled: takes whether factors are wanted, if it asks, and the slots behind its arguments.
        slotted: the graph.
        asks: whether it leaves out products for factors that are not wanted.
    """

    compiled: Runner
    slotted: SlottedGraph | None
    asks: bool = False

    def added(self, collector: Collector) -> Runner:
        """Let the factors of every run arrive."""
        if self.slotted is None:
            return self.compiled
        return _runner(
            self.compiled, collector.add(self.slotted), collector, [told(True)] if self.asks else []
        )

    @cached_property
    def unmeasured(self) -> Runner:
        """Run the graph without its factors, if it asks for them."""
        if self.slotted is None:
            return self.compiled
        compiled, rest = self.compiled, [told(False), *(s.detach() for s in self.slotted.slots.values())]

        def run(*args: Any) -> Any:
            return compiled(*args, *rest)

        return run

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
        return _Built(self.compiled[form], SlottedGraph(found, slots, owners), self.collector.shared_graph)

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
        shares = self.collector.shared_graph
        first = [told(True)] if shares else []
        slotted, fakes = add_slots(self.forward, [*first, *slots.values()])
        wanted = Input(len(described)) if shares else None
        described += tuple(Input(len(described) + i) for i in range(len(fakes)))
        fill = _FillSlots(described, tuple(slots), self.rules, self.collector.passes, wanted)
        return self._compile(slotted, [*self.inputs, *fakes], fill, key=_key(fill, found))

    def _compile(
        self, forward: fx.GraphModule, inputs: Sequence[Any], joint_pass: JointPass, key: str | None
    ) -> Runner:
        known = self.collector
        settings: dict[str, Any] = {"backend": known.factor_backend, "mode": known.mode}
        settings |= {"options": known.options, "on_error": known.on_compile_error}
        with trainable_rnns():
            return compile_differentiable(forward, inputs, joint_pass, key=key, **settings)


def _tensors_of(module: nn.Module) -> list[Tensor]:
    """The buffers and the plain tensors that a module has as attributes."""
    values = (*module.buffers(recurse=False), *vars(module).values())
    return [value for value in values if isinstance(value, Tensor)]


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
    return repr((fill.inputs, _splits(fill.inputs), fill.slots, rules, sharing, own, fill.wanted))


def _runner(
    compiled: Callable[..., Any], graph: SlottedGraph, collector: Collector, first: Sequence[Tensor]
) -> Runner:
    def run(*args: Any) -> Any:
        return compiled(*args, *first, *collector.begin(graph))

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
    """The joint pass: emit factors, and put each where the gradient of its slot belongs.

    Attributes:
        inputs: what the inputs of the graph are.
        slots: what the last of them are for.
        rules: which factors to emit.
        passes: the user's own.
        wanted: the input that says whether factors are wanted; None: they always are.
    """

    inputs: tuple[InputDescriptor, ...]
    slots: tuple[outputs.OutputDescriptor, ...]
    rules: Rules
    passes: tuple[Pass, ...]
    wanted: Input | None = None

    def __call__(self, gm: fx.GraphModule, *, decompositions: Decompositions) -> None:
        describe_joint(gm, self.inputs)
        before = len(outputs.results(gm))
        watch = tracer("factor graph")
        emit = partial(emit_factors, rules=self.rules, decompositions=decompositions)
        run_watched(emit, gm, emit_factors.__name__, watch)
        with inside(decompositions):
            apply_own(gm, self.passes, watch=watch)
        if self.wanted is not None:
            gate(gm, outputs.input_nodes(gm)[self.wanted], self.slots)
        emitted = outputs.output_nodes(gm)
        missing = [descriptor for descriptor in self.slots if descriptor not in emitted]
        if missing:
            raise RuntimeError(f"the compiled graph has no {missing}: please report this model")
        first, returned = before - len(self.slots), outputs.results(gm)
        assert all(node is None for node in returned[first:before]), "a slot has a gradient already"
        out = outputs.output_node(gm.graph)
        out.args = ([*returned[:first], *(emitted[descriptor] for descriptor in self.slots)],)
