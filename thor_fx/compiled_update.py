"""The update of the drop-in door: one compiled function for every kind of step that occurs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .capture import tracing_alone, without_dynamo
from .factors import Moments, flat_moments
from .inductor import Compiled, compile_graph
from .layers import Coverage
from .passes.switches import without
from .transform import State, Transform
from .uncompiled import OnCompileError
from .update import fixed_arguments, update_graph


class Given(NamedTuple):
    """What a step has measured.

    Attributes:
        gradients: by parameter.
        moments: by the name of the sums; empty in a plain step.
        terms: ``n``, 0-D; None in a plain step.
        scales: what a gradient scaler says, by name (:mod:`thor_fx.scaling`).
        refreshes: of the layers that were measured, those to invert; None: all.
        compares: whether the change of the loss that the step should make is wanted.
    """

    gradients: Mapping[str, Tensor]
    moments: Mapping[str, Moments]
    terms: Tensor | None
    scales: Mapping[str, Tensor]
    refreshes: frozenset[str] | None = None
    compares: bool = False

    @property
    def kind(self) -> Any:
        """What the compiled function depends on."""
        names = tuple(self.gradients), tuple(self.moments), self.terms is not None, tuple(self.scales)
        return names, self.refreshes, self.compares

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors, in the order that :func:`~thor_fx.update.update_graph` takes them."""
        terms = [] if self.terms is None else [self.terms]
        return [
            *self.gradients.values(), *flat_moments(self.moments).values(), *terms, *self.scales.values()
        ]  # fmt: skip


@dataclass
class CompiledUpdate:
    """A transform with its state, written in place by every step.

    Attributes:
        tx: the transform.
        found: the coverage that its state is about.
        params: the parameters, by name.
        backend: compiles the update.
        factor_backend: compiles that of factor steps.
        mode: as in ``torch.compile``.
        options: Inductor settings, as in ``torch.compile``.
        disabled: optimisations to go without.
        on_error: what becomes of an update that cannot be compiled.
        state: of the transform.
    """

    tx: Transform
    found: Coverage
    params: Mapping[str, Tensor]
    backend: str
    factor_backend: str
    mode: str | None = None
    options: Mapping[str, Any] | None = None
    disabled: tuple[str, ...] = ()
    on_error: OnCompileError = "raise"
    state: State = None
    _leaves: list[Tensor] = field(default_factory=list)
    _compiled: dict[Any, Compiled] = field(default_factory=dict)

    def begin(self) -> None:
        """Make a fresh state; what has been compiled stays."""
        self.state = self.tx.init(self.params, self.found)
        self._leaves = pytree.tree_leaves(self.state)

    def __call__(self, given: Given, rates: list[Tensor]) -> None:
        """Take one step; ``rates`` are the hyper-parameters in the order of their names."""
        kind = given.kind
        if kind not in self._compiled:
            with tracing_alone():
                self._compiled[kind] = self._compile(given)
        self._compiled[kind](*self.params.values(), *given.tensors, *self._leaves, *rates)

    def _compile(self, given: Given) -> Compiled:
        for name, gradient in given.gradients.items():
            if gradient.layout != torch.strided:
                raise TypeError(
                    f"the gradient of {name!r} is {gradient.layout}: Thor needs dense gradients "
                    "(sparse=False on the embedding)"
                )
        gradients, moments, terms, scales, refreshes, compares = given
        measured = gradients, moments, terms, scales
        kind: dict[str, Any] = {"refreshes": refreshes, "compares": compares}
        with without(self.disabled):
            gm = update_graph(self.tx, self.found, self.params, *measured, **kind)
        fakes = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
        backend = self.factor_backend if moments else self.backend
        settings: dict[str, Any] = {"backend": backend, "mode": self.mode, "options": self.options}
        settings["on_error"] = self.on_error
        return without_dynamo(compile_graph(gm, fakes, fixed=fixed_arguments(gm), **settings))
