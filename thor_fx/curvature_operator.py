"""The curvature of a model as a linear operator: damped, inverted, to any power, sampled from.

Over all parameters that belong to a layer, in the order of the model and flat, the operator is::

    F = scale * blockdiag(A (x) G) + damping * I

block by block, ``F vec(W) = vec(scale G W A + damping W)``. With the eigendecompositions ``A = Q_A a Q_A^T``
and ``G = Q_G g Q_G^T`` any power of it is exact (Grosse & Martens 2016, section 4.1; Ritter et al. 2018 for
the Laplace approximation)::

    F^p vec(W) = vec(Q_G ((Q_G^T W Q_A) * (scale g a^T + damping)^p) Q_A^T)
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .layers import Layer
from .matrices import matrices, put_back

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

    from .factors import Kronecker


class Eigen(NamedTuple):
    """Of one layer: ``Q_A`` (E, in, in), None where ``A`` is diagonal; ``Q_G``; eigenvalues (E, out, in)."""

    inputs: Tensor | None
    outputs: Tensor
    values: Tensor


@dataclass(frozen=True, eq=False)
class CurvatureOperator:
    """A symmetric operator on flat vectors of parameters; :meth:`thor_fx.Factors.operator` makes one.

    Attributes:
        pairs: the factors, by layer.
        layers: what the layers are.
        shapes: of the parameters that it acts on, by name, in their order in the vector.
        damping: see the top of this module.
        scale: likewise; the number of data makes the precision of a posterior of the mean curvature.
    """

    pairs: "Mapping[str, Kronecker]"
    layers: Mapping[str, Layer]
    shapes: Mapping[str, torch.Size]
    damping: float = 0.0
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        count = sum(self._sizes)
        return count, count

    @property
    def dtype(self) -> torch.dtype:
        """Of the factors."""
        return next(iter(self.pairs.values())).G.dtype

    @property
    def device(self) -> torch.device:
        """Of the factors."""
        return next(iter(self.pairs.values())).G.device

    def __matmul__(self, v: Tensor) -> Tensor:
        """The product with a vector (P,), or with the columns of a matrix (P, K)."""
        return self._mapped(v, self._product)

    def power(self, exponent: float, v: Tensor) -> Tensor:
        """``F^exponent v`` of a vector (P,) or of columns (P, K); eigenvalues below zero count as zero.

        Raises:
            ValueError: the exponent is negative, and there is no damping: ``F`` may have no inverse.
        """
        if exponent < 0 and self.damping <= 0:
            raise ValueError("damping must be positive for a negative power: F may be singular without it")
        return self._mapped(v, lambda name, m: self._powered(exponent, name, m))

    def solve(self, v: Tensor) -> Tensor:
        """``F^-1 v``: see :meth:`power`."""
        return self.power(-1.0, v)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws of ``N(0, F^-1)``, as columns (P, count).

        Args:
            count: how many.
            generator: of random numbers.
        """
        noise = torch.randn(self.shape[0], count, dtype=self.dtype, device=self.device, generator=generator)
        return self.power(-0.5, noise)

    def logdet(self) -> Tensor:
        """``log det F``, 0-D."""
        return sum((own.log().sum() for own in self._eigenvalues()), start=self._zero)

    def trace(self) -> Tensor:
        """``tr F``, 0-D."""
        return sum((own.sum() for own in self._eigenvalues()), start=self._zero)

    def with_damping(self, damping: float) -> "CurvatureOperator":
        """The same curvature with another damping; what has been decomposed stays so."""
        other = replace(self, damping=damping)
        if "_eigen" in self.__dict__:
            other.__dict__["_eigen"] = self._eigen
        return other

    def split(self, v: Tensor) -> dict[str, Tensor]:
        """A flat vector (P,) as tensors by parameter."""
        parts = v.split(self._sizes)
        return {
            name: part.view(shape) for part, (name, shape) in zip(parts, self.shapes.items(), strict=True)
        }

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Tensors by parameter as a flat vector (P,); those of other parameters are left out."""
        return torch.cat([tensors[name].reshape(-1) for name in self.shapes])

    def to_scipy(self, exponent: float = 1.0) -> "LinearOperator":
        """``F^exponent`` as a ``scipy.sparse.linalg.LinearOperator``.

        Raises:
            ImportError: SciPy is not installed.
        """
        try:
            from scipy.sparse.linalg import LinearOperator
        except ImportError as error:
            raise ImportError("to_scipy needs SciPy: pip install scipy") from error

        def apply(v: Any) -> Any:
            given = torch.as_tensor(v, dtype=self.dtype, device=self.device)
            new = self @ given if exponent == 1 else self.power(exponent, given)
            return new.cpu().numpy()

        kind = torch.empty((), dtype=self.dtype).numpy().dtype
        return LinearOperator(
            self.shape, matvec=apply, rmatvec=apply, matmat=apply, rmatmat=apply, dtype=kind
        )

    @property
    def _sizes(self) -> list[int]:
        return [math.prod(shape) for shape in self.shapes.values()]

    @property
    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=self.dtype, device=self.device)

    def _mapped(self, v: Tensor, change: Callable[[str, Tensor], Tensor]) -> Tensor:
        if v.dim() not in {1, 2} or v.shape[0] != self.shape[0]:
            raise ValueError(
                f"v must have shape ({self.shape[0]},) or ({self.shape[0]}, K), got {tuple(v.shape)}"
            )
        columns = v.reshape(self.shape[0], -1)
        return torch.stack([self._column(c, change) for c in columns.unbind(1)], 1).reshape(v.shape)

    def _column(self, v: Tensor, change: Callable[[str, Tensor], Tensor]) -> Tensor:
        tensors = self.split(v)
        for name, layer in self.layers.items():
            put_back(layer, change(name, matrices(layer, tensors)), tensors)
        return self.join(tensors)

    def _product(self, name: str, m: Tensor) -> Tensor:
        pair = self.pairs[name]
        a, g = pair.A, pair.G
        right = m * a if a.dim() == 1 else m @ a
        return self.scale * (g @ right) + self.damping * m

    def _powered(self, exponent: float, name: str, m: Tensor) -> Tensor:
        inputs, outputs, _ = self._eigen[name]
        turned = outputs.mT @ m if inputs is None else outputs.mT @ m @ inputs
        turned = outputs @ (turned * self._values(name) ** exponent)
        return turned if inputs is None else turned @ inputs.mT

    def _values(self, name: str) -> Tensor:
        return self.scale * self._eigen[name].values + self.damping

    def _eigenvalues(self) -> list[Tensor]:
        return [self._values(name) for name in self.layers]

    @cached_property
    def _eigen(self) -> dict[str, Eigen]:
        return {name: _decomposed(self.pairs[name]) for name in self.layers}


def _decomposed(pair: "Kronecker") -> Eigen:
    g, outputs = torch.linalg.eigh(pair.G)
    a, inputs = (pair.A, None) if pair.A.dim() == 1 else torch.linalg.eigh(pair.A)
    values = g.clamp(min=0).unsqueeze(-1) * a.clamp(min=0).unsqueeze(-2)
    return Eigen(inputs, outputs, values if values.dim() == 3 else values.unsqueeze(0))
