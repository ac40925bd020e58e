"""Where the model ends and the loss begins: the outputs that a likelihood gives a distribution to.

Let a loss be ``L = sum_r w_r NLL_r(z_r)`` over the rows ``r`` of an output ``z``. A *head* is such an
output, its cotangent ``dL/dz`` in the backward, and where the weights ``w_r`` are read.

==============  ==================================  ===========================  =========================
likelihood      ``z_r``                             score of a drawn label       Hessian of ``NLL_r``
==============  ==================================  ===========================  =========================
categorical     logits, one row of C classes        ``p - e_y``, ``y ~ p``       ``diag(p) - p p^T``
bernoulli       logits, element by element          ``p - y``, ``y ~ p``         ``p (1 - p)``
gaussian        any numbers, element by element     ``eps ~ N(0, 1)``            1
==============  ==================================  ===========================  =========================

For the last two a row is one element. A callable likelihood is asked for scores of its own.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from .operands import widened

KindOfHead = Literal["categorical", "bernoulli", "gaussian", "custom"]
Sampler = Callable[[Tensor], Tensor]
"""``sampler(z) -> dNLL/dz`` of labels drawn from the distribution that ``z`` stands for; same shape."""


@dataclass(frozen=True)
class Weights(ABC):
    """How much every row of a head counts in the loss."""

    @property
    @abstractmethod
    def nodes(self) -> tuple[fx.Node, ...]:
        """What :meth:`read` takes the values of."""

    @property
    def relative(self) -> bool:
        """Whether the weights of all rows have to be divided by their sum."""
        return False

    @property
    def scaled(self) -> bool:
        """Whether they carry what the loss was multiplied by."""
        return True

    @abstractmethod
    def read(self, z: Tensor, axis: int | None, *values: Tensor) -> Tensor:
        """Weights that broadcast against ``z``, whose rows lie along ``axis``; not negative."""


@dataclass(frozen=True)
class OfClasses(Weights):
    """Of a loss that is linear in log-probabilities: ``w_r = -sum_c dL/dlogp_rc``.

    Class indices, soft labels, smoothed labels, class weights and masks all arrive here.
    """

    cotangent: fx.Node

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The cotangent of the log-probabilities."""
        return (self.cotangent,)

    @property
    def relative(self) -> bool:
        """However a loss is scaled, it is a mean of log-probabilities."""
        return True

    def read(self, z: Tensor, axis: int | None, *values: Tensor) -> Tensor:
        """The shape of ``z`` with 1 at ``axis``."""
        del z
        assert axis is not None, "there are classes"
        return widened(values[0]).sum(axis, keepdim=True).abs()


@dataclass(frozen=True)
class Product(Weights):
    """Of a loss that is a sum over elements: the product of what the loss multiplies an element by.

    Attributes:
        factors: nodes, numbers, or ``"numel"``: the elements of ``z``.
        divisors: the same, to divide by.
    """

    factors: tuple[Any, ...]
    divisors: tuple[Any, ...]

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """Those among the factors, then those among the divisors."""
        return tuple(part for part in (*self.factors, *self.divisors) if isinstance(part, fx.Node))

    def read(self, z: Tensor, axis: int | None, *values: Tensor) -> Tensor:
        """Any shape that broadcasts."""
        del axis
        given = iter(values)

        def value(part: Any) -> Any:
            if isinstance(part, fx.Node):
                return widened(next(given))
            return z.numel() if part == "numel" else part

        result = torch.ones((), dtype=widened(z).dtype, device=z.device)
        for factor in self.factors:
            result = result * value(factor)
        for divisor in self.divisors:
            result = result / value(divisor)
        return result.abs()


@dataclass(frozen=True)
class Unmasked(Weights):
    """Of a loss that is not known: all rows count alike, but for those whose cotangent is zero everywhere.

    Attributes:
        cotangent: ``dL/dz``.
        curvature: a factor of all weights.
        elementwise: the loss averages over the elements of a row, too.
    """

    cotangent: fx.Node
    curvature: float = 1.0
    elementwise: bool = False

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The cotangent."""
        return (self.cotangent,)

    @property
    def scaled(self) -> bool:
        """The cotangent is compared with zero only."""
        return False

    def read(self, z: Tensor, axis: int | None, *values: Tensor) -> Tensor:
        """The shape of ``z`` with 1 at ``axis``."""
        if axis is None:
            return torch.full_like(widened(z), self.curvature) / z.numel()
        counts = (values[0] != 0).any(axis, keepdim=True).to(widened(z).dtype)
        share = self.curvature / (z.shape[axis] if self.elementwise else 1)
        return share * counts / counts.sum().clamp(min=1)


@dataclass(frozen=True)
class Head:
    """One output with its likelihood.

    Attributes:
        kind: the likelihood.
        output: ``z``; of a categorical one, anything whose softmax along ``axis`` is the distribution.
        cotangent: ``dL/dz``.
        axis: where the elements of a row lie; None for an output of one axis, where a row is an element.
        weights: how much every row counts.
        scale: what the loss was multiplied by.
        positions: rows of one datum where all rows lie in one axis: of row ``r`` it is the
            ``r % positions``-th; None: the axes between the first and the rest tell.
        sampler: of a custom likelihood.
    """

    kind: KindOfHead
    output: fx.Node
    cotangent: fx.Node
    axis: int | None
    weights: Weights
    scale: fx.Node | float = 1.0
    positions: Any = None
    sampler: Sampler | None = None

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The output, the cotangent (for its layout), those of the weights, then the scale."""
        scale = (self.scale,) if isinstance(self.scale, fx.Node) else ()
        return (self.output, self.cotangent, *self.weights.nodes, *scale)

    def __str__(self) -> str:
        named = isinstance(self.weights, Unmasked)
        return f"{self.kind}{'' if named else ' (read off the loss)'}"
