"""The passes of the functional door: forward and backward become a whole training step."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import fx

from .distributed.start_early import start_early
from .kinds import Kind
from .layers import Coverage, coverage
from .own_passes import apply_own
from .parameters import trainable
from .passes import accumulate, emit_factors, outputs, pipeline
from .passes.layout import Rules
from .passes.pipeline import Pass, name_of
from .passes.stages import Watch, run_watched
from .passes.survey import survey
from .passes.switches import without
from .trace_log import tracer
from .transform import Params, Transform
from .update import append_update, return_forward


@dataclass(frozen=True)
class WholeStep:
    """How a step graph becomes one that also updates.

    Attributes:
        tx: the update.
        found: the coverage of the model.
        trained: the names of all trained parameters, in the order of the state.
        results: how many values the forward graph returns.
        own: passes of the caller's.
        disabled: optimisations to go without.
    """

    tx: Transform
    found: Coverage
    trained: Sequence[str]
    results: int
    own: tuple[Pass, ...] = ()
    disabled: tuple[str, ...] = ()

    def graph(
        self,
        step: fx.GraphModule,
        kind: Kind,
        recomputes: Sequence[Pass] = (),
        watch: Watch | None = None,
    ) -> fx.GraphModule:
        """A copy of ``step`` that does what a step of this kind does.

        Args:
            step: a step graph, canonicalized.
            kind: of the step.
            recomputes: what comes between factors and update.
            watch: is told of every pass; None: torch's structured log is, where there is one.
        """
        plain, watch = kind.factors == "plain", watch or tracer(f"{kind.factors} step")
        rules = replace(self.tx.rules, disabled=self.disabled)
        whole = pipeline.run(step, [] if plain else [partial(emit_factors, rules=rules)], watch=watch)
        own = () if plain else self.own
        apply_own(whole, own, watch=watch)
        done = [] if plain else [emit_factors.__name__, *map(name_of, own)]
        pipeline.apply(whole, self._enabled(recomputes), after=done, watch=watch)
        for graph_pass in self._enabled(self._behind_gradients(kind)):
            run_watched(graph_pass, whole, name_of(graph_pass), watch)
        return whole

    def _behind_gradients(self, kind: Kind) -> list[Pass]:
        refreshes: frozenset[str] | None = frozenset() if kind.factors == "measure" else None
        update = partial(append_update, tx=self.tx, found=self.found, trained=self.trained)
        return [
            self._switched(partial(update, refreshes=refreshes, compares=kind.compares)),
            partial(start_early, trained=self.trained, found=self.found),
            accumulate,
            partial(return_forward, results=self.results),
        ]

    def _switched(self, graph_pass: Pass) -> Pass:
        """The pass, which goes without what is disabled."""

        def switched(gm: fx.GraphModule) -> None:
            with without(self.disabled):
                graph_pass(gm)

        switched.__name__ = name_of(graph_pass)
        return switched

    def _enabled(self, passes: Sequence[Pass]) -> list[Pass]:
        return [one for one in passes if name_of(one) not in self.disabled]


def covered(graph: fx.GraphModule, params: Params, rules: Rules) -> Coverage:
    """What becomes of every one of ``params``, those that the graph does not have among them."""
    found = coverage(survey(graph, rules), rules)
    seen = found.trained | set(found.unused)
    unused = tuple(name for name, p in params.items() if name not in seen and trainable(p))
    frozen = tuple(name for name, p in params.items() if not trainable(p))
    return Coverage(found.layers, found.norms, found.fallback, found.terms, found.unused + unused, frozen)


def results_of(forward: fx.GraphModule) -> int:
    """How many values a forward graph returns."""
    return len(outputs.output_node(forward.graph).args[0])  # type: ignore[arg-type]
