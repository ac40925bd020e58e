"""Training steps before they are taken: their graphs, what these cost, their kernels, what those take."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from .arguments import checked_disabled
from .block_size import choose_by_step
from .capture import LossFn
from .cost_model import Predicted, predicted
from .cost_table import cost_table
from .hyper import HyperTensors
from .inductor import inductor_decompositions
from .kernels import Generated, Kernel, generate
from .kinds import Kind, kinds
from .layers import Coverage
from .own_passes import checked_passes
from .passes import canonicalize, pipeline
from .passes.phases import mark
from .passes.stages import Stage
from .rates import Rates, measured_rates
from .recompute import recompute
from .step_cost import StepCost, step_cost
from .step_time import MeasuredStep, measure
from .trace import capture_once
from .transform import Params, Transform
from .whole_step import WholeStep, covered, results_of

StepKind = Literal["plain", "factor"]


@dataclass(frozen=True)
class StepReport:
    """The whole steps of the functional door.

    Attributes:
        graphs: by kind; every node says its phase (:mod:`thor_fx.passes.phases`). A graph takes what the loss
            function reads, the state of the transform, and its hyper-parameters, and writes new values there.
        stages: by kind, what every pass did, in order.
        costs: by kind, as the graphs say.
        predicted: what training will cost at best.
        coverage: of the model.
        rates: of the machine.
    """

    graphs: Mapping[StepKind, fx.GraphModule]
    stages: Mapping[StepKind, Sequence[Stage]]
    costs: Mapping[StepKind, StepCost]
    predicted: Predicted
    coverage: Coverage
    rates: Rates
    _arguments: Sequence[Any] = field(repr=False)
    _generated: dict[StepKind, Generated] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        return f"{self.predicted}\n{cost_table(list(self.costs.values()))}"

    def kernels(self, kind: StepKind) -> list[Kernel]:
        """The kernels that Inductor makes of a step, in their order. The first call compiles."""
        return self._compiled(kind).kernels

    def measured(self, kind: StepKind) -> MeasuredStep:
        """A step that runs several times, on copies of everything. The first call compiles."""
        arguments = [value.clone() if isinstance(value, Tensor) else value for value in self._arguments]
        return measure(self.graphs[kind], self._compiled(kind), self.costs[kind], arguments)

    def to_dict(self, measured: Mapping[StepKind, MeasuredStep] | None = None) -> dict[str, Any]:
        """Costs and what is foretold of them, with what was measured, in types that JSON knows."""
        known = measured or {}
        found: dict[str, Any] = {"predicted": asdict(self.predicted), "rates": asdict(self.rates)}
        for kind, cost in self.costs.items():
            found[kind] = asdict(known[kind].cost if kind in known else cost)
        for kind, run in known.items():
            found[kind] |= {"seconds": run.seconds, "kernels": [asdict(kernel) for kernel in run.kernels]}
        return found

    def _compiled(self, kind: StepKind) -> Generated:
        if kind not in self.graphs:
            raise ValueError(f"kind must be one of {list(self.graphs)}, got {kind!r}")
        if kind not in self._generated:
            self._generated[kind] = generate(self.graphs[kind])
        return self._generated[kind]


def step_report(
    loss_fn: LossFn,
    params: Params,
    batch: Sequence[Any],
    tx: Transform,
    *,
    rates: Rates | None = None,
    passes: Sequence[pipeline.Pass] = (),
    disable_passes: Sequence[str] = (),
) -> StepReport:
    """Look at the steps that :func:`thor_fx.compile_step` would compile. Nothing is compiled yet.

    Args:
        loss_fn: ``loss_fn(params, *batch)``, returns a scalar loss or ``(loss, aux)``.
        params: floating-point tensors by name.
        batch: the other arguments, tensors and nests of tensors.
        tx: what to train with: ``thor_fx.thor(...)``.
        rates: of the machine; None: they are measured, on the device of the parameters.
        passes: as in :func:`thor_fx.compile_step`, as the next.
        disable_passes: optimisations to go without, by name.

    Raises:
        TypeError: ``params`` is no mapping of tensors.
        ValueError: an optimisation is unknown, ``tx`` wants no factors, or the loss does not depend on
            ``params`` or is no scalar.

    Example:
        >>> import thor_fx
        >>> def loss_fn(params, x):
        ...     return (x @ params["w"]).square().mean()
        >>> tx = thor_fx.thor(lr=0.1, damping=0.1, momentum=0.9)
        >>> report = step_report(loss_fn, {"w": torch.ones(3, 2)}, [torch.ones(5, 3)], tx)
        >>> {phase: cost.flops for phase, cost in report.costs["plain"].phases.items()}
        {'forward': 60, 'backward': 60, 'update': 60}
    """
    if tx.resolve is not None:
        found = choose_by_step(loss_fn, params, batch, tx.rules)
        tx = tx.resolve(None if found is None else found.chosen)
    rates = rates or measured_rates(next(iter(params.values())).device)
    captured, flat = capture_once(loss_fn, params, *batch)
    graph, beginning = pipeline.observe(captured.graph, [canonicalize, mark])
    coverage = covered(graph, params, tx.rules)
    trained = {name: p for name, p in params.items() if name in coverage.trained}
    again = [partial(recompute, decompositions=inductor_decompositions())]
    own, disabled = checked_passes(passes), checked_disabled(disable_passes)
    whole = WholeStep(tx, coverage, list(trained), results_of(captured.forward), own, disabled)
    stages: dict[StepKind, list[Stage]] = {name: list(beginning) for name in get_args(StepKind)}
    graphs = {
        name: whole.graph(graph, kind, again, watch=partial(_remember, stages[name]))
        for name, kind in _kinds(tx).items()
    }
    costs = {name: step_cost(gm, name, rates) for name, gm in graphs.items()}
    foretold = predicted(graph, coverage, tx, rates)
    return StepReport(
        graphs, stages, costs, foretold, coverage, rates, [*flat, *_further(tx, trained, coverage)]
    )


def _remember(stages: list[Stage], stage: Stage, _gm: fx.GraphModule) -> None:
    stages.append(stage)


def _kinds(tx: Transform) -> dict[StepKind, Kind]:
    compares = kinds(tx)[0].compares
    return {"plain": Kind("plain", compares), "factor": Kind("refresh", compares)}


def _further(tx: Transform, trained: Params, coverage: Coverage) -> list[Tensor]:
    """The arguments of a whole step beyond those of the loss function."""
    with torch.no_grad():
        state = tx.init(trained, coverage)
    return [*pytree.tree_leaves(state), *HyperTensors()(tx.hyper(0), trained)]
