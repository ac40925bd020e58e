"""Where the factors of a compiled model arrive, from backward passes that the user runs as he likes.

NOTE: [Runs and passes] A *run* is one forward call of one compiled graph; a *pass* is one ``backward()``.
Sums over rows add up over everything: runs, passes (micro-batches) and graphs (graph breaks). The number
of terms ``n`` that the loss averages over does not: two runs in one pass (a loss over pairs) share the
terms of one loss, two passes (micro-batches) have terms of their own. So ``n`` is the largest over the
runs of a pass, and adds up over passes. Of several graphs in one pass the first that backward reaches
counts: it is nearest to the loss.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from .capture import current_backward, new_leaf
from .factors import Moments, moments_of
from .layers import Coverage
from .passes.outputs import OutputDescriptor, Terms


@dataclass(eq=False)
class SlottedGraph:
    """A compiled graph whose backward fills slots.

    Attributes:
        coverage: the parameters it uses.
        slots: leaves whose ``grad`` is what the descriptor says.
        params: the parameters that its factors belong to.
    """

    coverage: Coverage
    slots: Mapping[OutputDescriptor, Tensor]
    params: tuple[Tensor, ...] = ()

    def take(self) -> dict[OutputDescriptor, Tensor]:
        """The sums that have been collected since the last call; empty if nothing has."""
        taken = {d: s.grad for d, s in self.slots.items() if s.grad is not None and d != Terms()}
        for slot in self.slots.values():
            slot.grad = None
        return taken


@dataclass
class LossTerms:
    """How many terms the loss averages over; see NOTE: [Runs and passes]."""

    _passes: dict[int, tuple[str | None, Tensor]] = field(default_factory=dict)

    def add(self, backward: int, layer: str | None, terms: Tensor) -> None:
        """A run was reached by a backward pass; ``layer`` is where its ``terms`` were read."""
        nearest, known = self._passes.get(backward, (layer, terms))
        if nearest == layer:
            self._passes[backward] = nearest, terms.maximum(known)

    def take(self) -> Tensor | None:
        """The terms of all passes since the last call, 0-D; None if there was none."""
        values = [terms for _, terms in self._passes.values()]
        self._passes.clear()
        return sum(values[1:], start=values[0]) if values else None


@dataclass
class Collector:
    """Where the factors of a model arrive.

    Attributes:
        backend: what the model is compiled with.
        wanted: whether the next forward pass in training mode is to collect factors.
        graphs: every graph compiled so far.
        coverage: the coverage of all graphs together; None before the first.
        version: changes with the coverage.
    """

    backend: str
    wanted: bool = True
    graphs: list[SlottedGraph] = field(default_factory=list)
    coverage: Coverage | None = None
    version: int = 0

    _terms: LossTerms = field(default_factory=LossTerms)
    _filled: bool = False

    def add(self, graph: SlottedGraph) -> None:
        """Remember one more compiled graph."""
        self.graphs.append(graph)
        merged = graph.coverage if self.coverage is None else self.coverage.merge(graph.coverage)
        self.version += merged != self.coverage
        self.coverage = merged

    def begin(self, graph: SlottedGraph) -> list[Tensor]:
        """The slots for one run of a graph.

        The slot of the terms is a new one, so that this run is heard apart from others. Gradients that
        have been reset by hand (``model.zero_grad()``) take what was collected with them.
        """
        outside = current_backward() is None
        if self._filled and outside and all(p.grad is None for g in self.graphs for p in g.params):
            self.clear()
        self._filled |= Terms() not in graph.slots  # nobody will tell
        return [self._listening(graph, s) if d == Terms() else s for d, s in graph.slots.items()]

    def clear(self) -> None:
        """Forget what has been collected."""
        if self._filled:
            self.take()

    def take(self) -> tuple[dict[str, Moments], Tensor | None]:
        """The moments by layer and the number of loss terms, since the last call."""
        if not self._filled:
            return {}, None
        self._filled = False
        sums: dict[OutputDescriptor, Tensor] = {}
        for graph in self.graphs:
            for descriptor, value in graph.take().items():
                sums[descriptor] = sums[descriptor] + value if descriptor in sums else value
        return moments_of(sums), self._terms.take()

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
