"""What second-order training will cost, before anything is compiled or run.

Floors of the work (:mod:`thor_fx.rates`): of forward and backward, as :mod:`thor_fx.step_cost` counts them;
and of these::

    work      operations                bytes
    update    of preconditioning        gradients and inverses read, parameters and momentum read and written
    factors   of the products A and G   rows read, factors written
    refresh   of the inversions         factors read, inverses written

A real step takes longer; how much longer one step takes than another is foretold better than either time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from .costs import Cost, cost
from .inverses import METHODS
from .layers import Coverage, Layer
from .memory_traffic import size_of
from .passes.outputs import Param, input_nodes
from .rates import Rates
from .step_cost import step_cost
from .transform import Transform


@dataclass(frozen=True)
class Predicted:
    """What steps cost at best; times in seconds.

    Attributes:
        forward_backward: time of the loss and the gradients.
        update: time of the update in every step.
        factors: time of the sums in a factor step.
        refresh: time of the inversions in a factor step.
        cost: bytes and operations that second-order training adds.
        frequency: steps between factor steps.
    """

    forward_backward: float
    update: float
    factors: float
    refresh: float
    cost: Cost
    frequency: int

    @property
    def plain_step(self) -> float:
        """The time of a step without factors."""
        return self.forward_backward + self.update

    @property
    def factor_step(self) -> float:
        """The time of a step with factors and new inverses."""
        return self.plain_step + self.factors + self.refresh

    @property
    def overhead(self) -> float:
        """How much longer a factor step takes than a plain step, as a part of the latter."""
        return self.factor_step / self.plain_step - 1

    @property
    def mean_overhead(self) -> float:
        """The same, of all steps together."""
        return self.overhead / self.frequency

    def __str__(self) -> str:
        return (
            f"a factor step takes {self.overhead:.1%} longer than a plain step ({_ms(self.factor_step)} and "
            f"{_ms(self.plain_step)} at best); with one in {self.frequency} steps, {self.mean_overhead:.2%} "
            f"on average\n"
            f"forward and backward {_ms(self.forward_backward)}, update {_ms(self.update)}, "
            f"factors {_ms(self.factors)}, refresh {_ms(self.refresh)}"
        )


def predicted(step: fx.GraphModule, found: Coverage, tx: Transform, rates: Rates) -> Predicted:
    """Foretell what training costs.

    Args:
        step: a step graph without factors and without update, with phases.
        found: the coverage of the model.
        tx: what to train with.
        rates: of the machine.

    Raises:
        ValueError: ``tx`` wants no factors.
    """
    if tx.frequency is None:
        raise ValueError("tx wants no factors, so there is no overhead to foretell: pass thor_fx.thor(...)")
    values = [node.meta["val"] for d, node in input_nodes(step).items() if isinstance(d, Param)]
    itemsize, size = max(value.element_size() for value in values), _parameters(step)
    layers, block_size = list(found.layers.values()), tx.rules.block_size
    total = sum((cost(layer, block_size, itemsize, tx.inverse) for layer in layers), start=Cost())
    inversion = sum(METHODS[tx.inverse].work(layer, block_size).refresh_flops for layer in layers)
    known = step_cost(step, "plain", rates).phases.values()
    products, rows = total.factor_flops - inversion, itemsize * _numbers_in_rows(layers)
    return Predicted(
        forward_backward=sum(phase.floor for phase in known),
        update=rates.seconds(total.step_flops, 5 * size + total.state_bytes),
        factors=rates.seconds(products, rows + total.factor_bytes),
        refresh=rates.seconds(inversion, total.factor_bytes + total.state_bytes),
        cost=total,
        frequency=tx.frequency,
    )


def _parameters(step: fx.GraphModule) -> int:
    return sum(size_of(node) for d, node in input_nodes(step).items() if isinstance(d, Param))


def _numbers_in_rows(layers: Sequence[Layer]) -> int:
    """The numbers of all rows of ``A`` and ``G``; patches count as if they were written down."""
    sides = [(s.count, side) for layer in layers for s in layer.sums for side in (s.input, s.output)]
    return sum(count * side.groups * side.dim for count, side in sides if side.kind != "identity")


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"
