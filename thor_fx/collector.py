"""Where the factors of a compiled model arrive, from backward passes that the user runs as he likes.

NOTE: [Runs and passes] A *run* is one forward call of one compiled graph; a *pass* is one ``backward()``.
Sums over rows add up over everything: runs, passes (micro-batches) and graphs (graph breaks). The number
of terms ``n`` that the loss averages over does not: two runs in one pass (a loss over pairs) share the
terms of one loss, two passes (micro-batches) have terms of their own. So ``n`` is the largest over the
runs of a pass, and adds up over passes. Of several graphs in one pass the first that backward reaches
counts: it is nearest to the loss.

That is so for the empirical Fisher, whose cotangents say how the loss combines the runs. The other
estimators make terms of equal weight in every run: all of them count.

NOTE: [One slot] Graphs that make one factor (a weight that is used in two of them, a batch of another shape)
share its slot. Autograd adds up all that a pass delivers to a leaf before it calls the hooks of that leaf:
then the factor is that of the pass.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from .capture import current_backward, new_leaf
from .distributed.dtensors import is_part
from .factors import Moments, flat_moments, moments_of
from .layers import Coverage, Layer, turned_name
from .passes.layout import Rules, layer_of
from .passes.outputs import Factor, OutputDescriptor, Rows, Statistic, Terms
from .passes.pipeline import Pass
from .passes.reindex import disjoint, simplify
from .uncompiled import OnCompileError

Awaited = Callable[[], Mapping[Factor, Tensor]]
"""Waits for factors that are on their way."""

Send = Callable[[Mapping[Factor, Tensor]], Awaited]


class Beside(Protocol):
    """What takes factors from slots and sends them: :class:`thor_fx.distributed.beside.Beside`."""

    @property
    def readers(self) -> Mapping[str, int]:
        """By layer, the rank that alone reads its factors."""

    def settle(self) -> dict[Factor, Tensor]:
        """Wait for what was sent since the last call."""

    def close(self) -> None:
        """Take no more."""


@dataclass(eq=False)
class SlottedGraph:
    """A compiled graph whose backward fills slots.

    Attributes:
        coverage: the parameters it uses.
        slots: leaves whose ``grad`` is what the descriptor says; see NOTE: [One slot].
        params: the parameters that its factors belong to, by name.
        sent: what has left the slots and comes back as factors of all ranks, one entry for every pass.
    """

    coverage: Coverage
    slots: Mapping[OutputDescriptor, Tensor]
    params: Mapping[str, Tensor] = field(default_factory=dict)
    sent: list[Awaited] = field(default_factory=list)

    def take(self) -> dict[OutputDescriptor, Tensor]:
        """The sums that have been collected since the last call; empty if nothing has."""
        taken = {d: s.grad for d, s in self.slots.items() if s.grad is not None and d != Terms()}
        for slot in self.slots.values():
            slot.grad = None
        arrived = [awaited() for awaited in self.sent]
        self.sent = []
        for factors in arrived:
            _add(taken, factors)
        return taken

    def factors(self) -> dict[Factor, Tensor]:
        """The slots of factors."""
        return {d: slot for d, slot in self.slots.items() if isinstance(d, Factor)}

    def outdated_by(self, new: "SlottedGraph") -> bool:
        """Whether another parameter has taken the place of one of these, or another dtype or device."""
        replaced = any(new.params.get(name, p) is not p for name, p in self.params.items())
        slots = ((slot, new.slots.get(d, slot)) for d, slot in self.slots.items())
        return replaced or any((s.dtype, s.device) != (n.dtype, n.device) for s, n in slots)

    def sharing(self, known: Mapping[Factor, Tensor]) -> "SlottedGraph":
        """The same graph; its factors go to the slots that others have for them, as far as there are some."""
        slots = dict(self.slots)
        for factor, slot in self.factors().items():
            other = known.get(factor)
            if other is not None and _alike(other, slot):
                slots[factor] = other
        return replace(self, slots=slots)

    def turned(self, known: Mapping[str, Layer]) -> "SlottedGraph":
        """The same graph; what it calls the matrix of a layer is the transpose where others say so."""
        layers = dict(self.coverage.layers)
        for name, layer in layers.items():
            other = known.get(name)
            if other is not None and _is_transpose(layer, other, tuple(self.params[layer.param].shape)):
                layers[name] = replace(layer.turned(), path=other.path)
        other_way = {name for name, layer in layers.items() if layer.path != self.coverage.layers[name].path}
        slots = {_turned(d, other_way): slot for d, slot in self.slots.items()}
        return SlottedGraph(replace(self.coverage, layers=layers), slots, self.params)


def _alike(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


def _is_transpose(layer: Layer, other: Layer, shape: tuple[int, ...]) -> bool:
    return layer.path != other.path and simplify(layer.turned().path, shape) == other.path


def _turned(descriptor: OutputDescriptor, layers: set[str]) -> OutputDescriptor:
    """Of the layer's matrix becomes of its transpose, and the other way round."""
    if not isinstance(descriptor, Factor | Rows) or layer_of(descriptor.layer) not in layers:
        return descriptor
    return replace(descriptor, layer=turned_name(descriptor.layer))


@dataclass
class LossTerms:
    """How many terms the loss averages over; see NOTE: [Runs and passes].

    Attributes:
        all_runs: the terms of all runs of a pass add up.
    """

    all_runs: bool = False
    _passes: dict[int, tuple[str | None, Tensor]] = field(default_factory=dict)

    def add(self, backward: int, layer: str | None, terms: Tensor) -> None:
        """A run was reached by a backward pass; ``layer`` is where its ``terms`` were read."""
        nearest, known = self._passes.get(backward, (layer, terms))
        if nearest == layer or self.all_runs:
            first = backward not in self._passes
            more = known + terms if self.all_runs and not first else terms.maximum(known)
            self._passes[backward] = nearest, more

    def take(self) -> Tensor | None:
        """The terms of all passes since the last call, 0-D; None if there was none."""
        values = [terms for _, terms in self._passes.values()]
        self._passes.clear()
        return sum(values[1:], start=values[0]) if values else None


class Collected(NamedTuple):
    """What there is for a step.

    Attributes:
        moments: of this rank, by layer.
        terms: the number of loss terms, 0-D; None: nothing was collected.
        sent: whether factors have left for their owners before.
        beside: who sends factors beside backward.
        arrived: those of all ranks that were sent so.
    """

    moments: Mapping[str, Moments]
    terms: Tensor | None
    sent: bool
    beside: Beside | None
    arrived: Mapping[Factor, Tensor]


@dataclass
class Collector:
    """Where the factors of a model arrive.

    Attributes:
        backend: what the model is compiled with.
        factor_backend: what its factor steps are compiled with.
        wanted: whether the next forward pass in training mode is to collect factors.
        looks: the parameters whose layers it only looks for, while it runs what a plain step runs; None: it
            measures.
        graphs: every graph compiled so far.
        coverage: the coverage of all graphs together; None before the first.
        version: changes with what the coverage says of parameters.
        rules: which factors to collect.
        generation: how often those have changed.
        mode: what the model is compiled with, as in ``torch.compile``; the update is, too.
        options: Inductor settings, likewise.
        strict: whether a weight without factors is an error.
        copies: how many ranks see the same rows, because they have parts of the same parameters.
        has_sent: whether factors have left since the last :meth:`take`.
        passes: the user's own, over factor graphs.
        disabled: optimisations that factor graphs and updates go without.
        on_compile_error: what becomes of a graph that cannot be compiled.
        shared_graph: whether plain steps run what factor steps run, and leave its products out.
        reader: who takes the factors; a later one takes them from an earlier one.
        send: starts to send the factors of a graph once backward has made them, and returns what waits for
            those to keep in their place. None: all are kept.
        beside: sends factors of all graphs beside backward, to all ranks. None: nobody does.
    """

    backend: str
    factor_backend: str
    wanted: bool = True
    looks: frozenset[str] | None = None
    graphs: list[SlottedGraph] = field(default_factory=list)
    coverage: Coverage | None = None
    version: int = 0
    rules: Rules = field(default_factory=Rules)
    generation: int = 0
    mode: str | None = None
    options: Mapping[str, Any] | None = None
    strict: bool = False
    copies: int = 1
    passes: tuple[Pass, ...] = ()
    disabled: tuple[str, ...] = ()
    on_compile_error: OnCompileError = "raise"
    shared_graph: bool = False
    reader: object = None
    send: Send | None = None
    beside: Beside | None = None
    has_sent: bool = False

    _terms: LossTerms = field(default_factory=LossTerms)
    _filled: bool = False
    _returned: tuple[Mapping[Any, Tensor], Tensor | None] = field(default_factory=lambda: ({}, None))
    _overlapping: set[str] = field(default_factory=set)
    _watched: dict[SlottedGraph, set[Factor]] = field(default_factory=dict)  # what this pass has made

    def use(self, rules: Rules) -> None:
        """Collect the factors that these rules ask for; what was compiled for others is forgotten.

        Raises:
            ValueError: they take more than products, and plain steps would do it as well.
        """
        if self.shared_graph and rules.fisher != "empirical":
            raise ValueError(
                f"fisher={rules.fisher!r} follows cotangents of its own through backward, and plain steps of "
                "thor_fx.compile(model, shared_graph=True) would do it as well: leave one of them out"
            )
        rules = replace(rules, disabled=self.disabled)
        if rules != self.rules:
            self.clear()
            self.send_beside(None)
            self.rules, self.graphs, self.coverage = rules, [], None
            self._terms = LossTerms(all_runs=rules.fisher != "empirical")
            self._overlapping.clear()
            self._watched.clear()
            self.generation += 1

    def add(self, graph: SlottedGraph) -> SlottedGraph:
        """Remember one more compiled graph; returned with the names that others use for its layers."""
        graph = self.show(graph)
        if not any(map(is_part, graph.params.values())):  # else a graph is sent as a whole
            graph = graph.sharing(self.slots)
        self.graphs.append(graph)
        return graph

    def show(self, graph: SlottedGraph) -> SlottedGraph:
        """Make the layers of a graph known; returned as by :meth:`add`, and not remembered."""
        merged = graph.coverage
        current = [known for known in self.graphs if not known.outdated_by(graph)]
        if len(current) < len(self.graphs):
            self.graphs, self.version, self.send = current, self.version + 1, None
        if self.coverage is not None:
            graph = graph.turned(self.coverage.layers)
            self._overlapping |= _unlike(self.coverage.layers, graph.coverage.layers)
            merged = self.coverage.merge(graph.coverage)
        self._overlapping |= _overlapping(merged, graph.params)
        merged = _without(merged, self._overlapping)
        known = self.coverage
        if known is None or replace(merged, terms=known.terms) != known:  # runs say where terms are read
            self.version += 1
            self.send = None  # who gets the factors of new layers is not known yet
        self.coverage = merged
        return graph

    def begin(self, graph: SlottedGraph) -> list[Tensor]:
        """The slots for one run of a graph.

        The slot of the terms is a new one, so that this run is heard apart from others. Gradients that
        have been reset by hand (``model.zero_grad()``) take what was collected with them.
        """
        outside = current_backward() is None
        if self._filled and outside and all(p.grad is None for g in self.graphs for p in g.params.values()):
            self.clear()
        self._filled |= Terms() not in graph.slots  # nobody will tell
        if self.send is not None and graph not in self._watched:
            self._watch(graph)
        return [self._listening(graph, s) if d == Terms() else s for d, s in graph.slots.items()]

    def clear(self) -> None:
        """Forget what has been collected."""
        self.arrived()
        if self._filled:
            self.take()

    @property
    def slots(self) -> dict[Factor, Tensor]:
        """Where factors are delivered."""
        found: dict[Factor, Tensor] = {}
        for graph in reversed(self.graphs):  # where the first graph delivers them, if others do it elsewhere
            found |= graph.factors()
        return found

    def places(self) -> dict[str, int]:
        """By layer, the place of the first graph that uses it."""
        return {name: i for i, graph in reversed([*enumerate(self.graphs)]) for name in graph.coverage.layers}

    def send_beside(self, beside: Beside | None) -> None:
        """Let another one send factors beside backward, or nobody."""
        if self.beside is not None:
            self.beside.close()
        self.beside = beside

    def arrived(self) -> dict[Factor, Tensor]:
        """The factors of all ranks that were sent beside backward since the last call."""
        return {} if self.beside is None else self.beside.settle()

    def take(self) -> tuple[dict[str, Moments], Tensor | None]:
        """The moments by layer and the number of loss terms, since the last call; of this rank."""
        if not self._filled:
            return {}, None
        self._filled = self.has_sent = False
        known, terms = self._returned
        sums: dict[OutputDescriptor, Tensor] = dict(known)
        for graph in self.graphs:
            _add(sums, graph.take())
        new, self._returned = self._terms.take(), ({}, None)
        return moments_of(sums), new if terms is None else terms + (0 if new is None else new)

    def collected(self) -> Collected:
        """All that there is for a step."""
        sent, beside, arrived = self.has_sent, self.beside, self.arrived()
        return Collected(*self.take(), sent, beside, arrived)

    def put_back(self, found: Collected) -> None:
        """What a step that ended early could not use is for the next one, if nothing of it was sent."""
        if found.moments and not found.sent and not found.arrived:
            self._filled = True
            self._returned = flat_moments(found.moments), found.terms

    def statistics(self) -> dict[tuple[str, str], Tensor]:
        """What the user's passes have measured and no step has used, summed over passes and graphs."""
        found: dict[tuple[str, str], Tensor] = {}
        for descriptor, slot in ((d, s) for graph in self.graphs for d, s in graph.slots.items()):
            if isinstance(descriptor, Statistic) and slot.grad is not None:
                key = descriptor.name, descriptor.param
                found[key] = found[key] + slot.grad if key in found else slot.grad
        return found

    def _watch(self, graph: SlottedGraph) -> None:
        self._watched[graph] = set()
        for factor, slot in graph.factors().items():
            slot.register_post_accumulate_grad_hook(partial(self._made, graph, factor))

    def _made(self, graph: SlottedGraph, factor: Factor, _slot: Tensor) -> None:
        """Called in backward; with its last factor all of them leave."""
        slots, made = graph.factors(), self._watched[graph]
        made.add(factor)
        if len(made) < len(slots):
            return
        made.clear()
        if self.send is None:
            return
        self.has_sent = True
        factors = {d: slot.grad for d, slot in slots.items() if slot.grad is not None}
        for slot in slots.values():
            slot.grad = None
        graph.sent.append(self.send(factors))

    def _listening(self, graph: SlottedGraph, slot: Tensor) -> Tensor:
        leaf = new_leaf(slot)
        leaf.register_hook(partial(self._arrived, graph.coverage.terms, current_backward()))
        return leaf

    def _arrived(self, layer: str | None, outer: int | None, terms: Tensor) -> None:
        """Called in backward; ``outer`` is the pass that the run itself was part of (checkpointing)."""
        backward = current_backward() if outer is None else outer
        assert backward is not None, "hooks run in backward"
        self._filled = True
        self._terms.add(backward, layer, terms.clone())


def _add(sums: dict[OutputDescriptor, Tensor], more: Mapping[Any, Tensor]) -> None:
    for descriptor, value in more.items():
        sums[descriptor] = sums[descriptor] + value if descriptor in sums else value


def _overlapping(found: Coverage, params: Mapping[str, Tensor]) -> set[str]:
    """Parameters of which different graphs use different parts that overlap."""
    paths = {name: [layer.path for layer in found.layers.values() if layer.param == name] for name in params}
    return {name for name, parts in paths.items() if not disjoint(parts, tuple(params[name].shape))}


def _unlike(known: Mapping[str, Layer], new: Mapping[str, Layer]) -> set[str]:
    """Parameters of which different graphs would return sums of different shapes."""
    sides = {sums.name: (sums.input, sums.output) for layer in known.values() for sums in layer.sums}
    return {
        layer.param
        for layer in new.values()
        for sums in layer.sums
        if sides.get(sums.name, (sums.input, sums.output)) != (sums.input, sums.output)
    }


def _without(found: Coverage, params: set[str]) -> Coverage:
    """The coverage with some parameters in the fallback."""
    layers = {name: layer for name, layer in found.layers.items() if layer.param not in params}
    reasons = dict.fromkeys(params, "its uses in several graphs are of parts that overlap or differ")
    return replace(found, layers=layers, fallback={**found.fallback, **reasons}) if params else found
