"""What second-order training adds to a step, layer by layer: memory and arithmetic.

With R rows, sides ``d`` and blocks of ``b``: a dense factor takes ``2 R d^2`` floating-point operations,
one in F blocks ``2 R F b^2``, a diagonal ``2 R d``. The damped inverse of a block takes ``b^3`` (Cholesky
``b^3/3``, inverse from it ``2 b^3/3``). Preconditioning an (out, in) gradient by blocks takes
``2 out in (b_out + b_in)``, on every step. E groups take E times as much.
"""

from dataclasses import dataclass

from . import blocks
from .layers import Layer, Sums
from .passes.sides import Side


@dataclass(frozen=True)
class Cost:
    """What one layer adds, or all layers together.

    Attributes:
        factor_bytes: of the sums, alive during a factor step.
        state_bytes: of the inverses, kept between steps.
        factor_flops: of the sums and the refresh, on a factor step.
        step_flops: of preconditioning, on every step.
    """

    factor_bytes: int = 0
    state_bytes: int = 0
    factor_flops: int = 0
    step_flops: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.factor_bytes + other.factor_bytes,
            self.state_bytes + other.state_bytes,
            self.factor_flops + other.factor_flops,
            self.step_flops + other.step_flops,
        )


def cost(layer: Layer, block_size: int | None, itemsize: int = 4) -> Cost:
    """What a layer adds to a step.

    Args:
        layer: as traced; symbolic rows count as none.
        block_size: in which dense factors are inverted.
        itemsize: bytes of a number: 8 for a float64 model, else 4.
    """
    sides = layer.input, layer.output
    stored = [_numel(side) for sums in layer.sums for side in (sums.input, sums.output)]
    cuts = [_blocks(side, block_size) for side in sides]
    kept = [
        sum(count * b**2 for count, b in cut) or _numel(side) for cut, side in zip(cuts, sides, strict=True)
    ]
    inverted = sum(count * b**3 for cut in cuts for count, b in cut)
    along = sum(
        sum(count * b**2 for count, b in cut) / side.dim for cut, side in zip(cuts, sides, strict=True)
    )
    return Cost(
        factor_bytes=itemsize * sum(stored),
        state_bytes=itemsize * sum(kept),
        factor_flops=sum(_product_flops(sums) for sums in layer.sums) + inverted,
        step_flops=int(2 * layer.groups * layer.out * layer.in_ * along / layer.groups),
    )


def _numel(side: Side) -> int:
    if side.kind == "identity":
        return 0
    total = 1
    for length in side.shape:
        total *= length
    return total


def _blocks(side: Side, block_size: int | None) -> list[tuple[int, int]]:
    """The blocks that are inverted, in all groups: (count, b)."""
    if side.kind not in {"dense", "blocks"}:
        return []
    return [(side.groups * count, b) for count, b in blocks.sizes(side, block_size)]


def _product_flops(sums: Sums) -> int:
    return sum(2 * sums.count * _numel(side) for side in (sums.input, sums.output))
