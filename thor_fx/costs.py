"""What second-order training adds to a step, layer by layer: memory and arithmetic.

With R rows, sides ``d`` and blocks of ``b``: a dense factor takes ``2 R d^2`` floating-point operations,
one in F blocks ``2 R F b^2``, a diagonal ``2 R d``, a mean ``R d``. What becomes of the factors, and what
that takes, is up to the method of inversion (:mod:`thor_fx.inverses`). E groups take E times as much.
``A`` of a convolution counts like that of a matrix of patches; where its kernel moves by one pixel, it takes
less (:mod:`thor_fx.passes.shifts`).
"""

from dataclasses import dataclass

from .inverses import METHODS, Inverse
from .layers import Layer, Sums


@dataclass(frozen=True)
class Cost:
    """What one layer adds, or all layers together.

    Attributes:
        factor_bytes: of the sums, alive during a factor step.
        state_bytes: of what is made of the factors, kept between steps.
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


def cost(layer: Layer, block_size: int | None, itemsize: int = 4, inverse: Inverse = "cholesky") -> Cost:
    """What a layer adds to a step.

    Args:
        layer: as traced; symbolic rows count as none.
        block_size: in which dense factors are inverted.
        itemsize: bytes of a number: 8 for a float64 model, else 4.
        inverse: the method of inversion.
    """
    work = METHODS[inverse].work(layer, block_size)
    return Cost(
        factor_bytes=itemsize * sum(side.numel for side in layer.measured),
        state_bytes=itemsize * work.numbers,
        factor_flops=sum(_product_flops(sums) for sums in layer.sums) + work.refresh_flops,
        step_flops=work.step_flops,
    )


def _product_flops(sums: Sums) -> int:
    sides = sums.input, sums.output
    return sum((1 if side.kind == "mean" else 2) * sums.count * side.numel for side in sides)
