"""The graph of a whole training step: what the functional door compiles."""

from collections.abc import Sequence
from functools import partial

from torch import fx

from .distributed.start_early import start_early
from .kinds import Kind
from .layers import Coverage, coverage
from .parameters import trainable
from .passes import accumulate, emit_factors, outputs, pipeline
from .passes.layout import Rules
from .passes.survey import survey
from .transform import Params, Transform
from .update import append_update, return_forward


def whole_step(
    graph: fx.GraphModule,
    results: int,
    tx: Transform,
    found: Coverage,
    trained: Sequence[str],
    kind: Kind,
    recomputes: Sequence[pipeline.Pass] = (),
) -> fx.GraphModule:
    """Loss, gradients, factors and update in one graph, whose nodes say their phase.

    Args:
        graph: a step graph in canonical form; it is left alone.
        results: how many values the forward graph returned: the whole step returns these, and nothing else.
        tx: the update.
        found: the coverage of the model.
        trained: names of all parameters that the state is about, in its order.
        kind: of the step.
        recomputes: the passes that compute activations again.
    """
    measures = [] if kind.factors == "plain" else [partial(emit_factors, rules=tx.rules)]
    whole = pipeline.run(graph, [*measures, *recomputes])
    refreshes: frozenset[str] | None = frozenset() if kind.factors == "measure" else None
    append_update(whole, tx, found, trained, refreshes=refreshes, compares=kind.compares)
    start_early(whole, trained, found)
    accumulate(whole)
    return_forward(whole, results)
    return whole


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
