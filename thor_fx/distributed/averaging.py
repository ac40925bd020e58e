"""Gradients and factors of all ranks together, as if one process had seen the whole batch.

Rank k of W has a loss ``L_k`` over ``n_k`` terms; what is minimised is their mean, ``L = (1/W) sum_k L_k``,
as DistributedDataParallel has it. With rows ``a_r``, and ``g_r = dL_k/ds_r`` as rank k measures it, the
definitions at the top of :mod:`thor_fx.factors` say for ``L``, with ``n = sum_k n_k`` and ``R = sum_k R_k``::

    dL/dW = (1/W) sum_k dL_k/dW
    A     = (1/R) sum_k sum_r a_r a_r^T
    G     = (n/W^2) sum_k sum_r g_r g_r^T

so ranks with more rows weigh more in ``A``, and all that is sent are sums. Vectors in place of factors (Eva)
carry ``1/W`` where ``G`` carries ``1/W^2``. Cotangents that are drawn are those of single terms and carry
neither. All ranks invert what they have averaged. The mean of the inverses of W factors, which MindSpore's
``nn.thor`` takes, is another matrix: by Jensen's inequality it is larger than the inverse of the mean.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..factors import Moments, flat_moments, moments_of
from ..layers import Coverage
from ..passes.layout import layer_of
from ..passes.outputs import Factor
from ..passes.sides import Side
from ..transform import Params, Signals, State, Transform, Updates
from .buckets import by_bytes, by_indices, by_readers, restricted
from .collectives import World, wait, wait_all
from .factor_sums import Bucket, FactorSums
from .packing import joined, packed_numel, parted
from .readers import NOBODY, Readers, everybody


@dataclass(frozen=True)
class Averaging:
    """How tensors of all ranks become one.

    Attributes:
        world: the ranks.
        split_indices: the last layers of the buckets of factors; None: buckets by bytes.
        reduce_dtype: what factors are rounded to while they travel; None: nothing.
        gradients: whether gradients are averaged here; else somebody else has done that.
        rescales: whether cotangents are those of the loss of one rank; else they are those of single terms.
        copies: how many ranks see the same rows (tensor parallel): all of them send the same, and count once.
        readers: who reads the factors of which layer.
        arrived: whether factors have been added up before the update (:mod:`.sending`).
    """

    world: World
    split_indices: Sequence[int] | None = None
    reduce_dtype: torch.dtype | None = None
    gradients: bool = True
    rescales: bool = True
    copies: int = 1
    readers: Readers = everybody
    arrived: bool = False

    def buckets(
        self, coverage: Coverage, itemsize: int = 4, readers: Mapping[str, int] = NOBODY
    ) -> list[list[str]]:
        """The layers whose factors travel together.

        Args:
            coverage: the layers.
            itemsize: bytes of a number that is not rounded.
            readers: by layer, the rank that alone reads its factors.

        Raises:
            ValueError: ``split_indices`` has an index of no layer.
        """
        layers = coverage.layers
        if self.split_indices is not None:
            return by_indices(list(layers), self.split_indices)
        itemsize = itemsize if self.reduce_dtype is None else self.reduce_dtype.itemsize
        sizes = {name: itemsize * sum(map(packed_numel, layer.measured)) for name, layer in layers.items()}
        owned = {name: size for name, size in sizes.items() if name in readers}
        shared = {name: size for name, size in sizes.items() if name not in readers}
        return [*by_bytes(shared), *by_readers(owned, readers, self.world.size)]

    def signals(self, signals: Signals, params: Params) -> Signals:
        """The signals of a step with the factors of all ranks, of the layers that this rank reads."""
        if signals.moments is None:
            return signals
        assert signals.terms is not None, "a factor step knows its terms"
        flat = flat_moments(signals.moments)
        factors = {d: value for d, value in flat.items() if isinstance(d, Factor)}
        counts = {d: value for d, value in flat.items() if not isinstance(d, Factor)}
        summed = None if self.arrived else self.sums(factors, signals.coverage, params)
        started = self.world.sum(joined([*counts.values(), signals.terms], torch.float64))
        sums: dict[Any, Tensor] = {**(factors if summed is None else summed())}
        *known, terms = parted(wait(started), [*counts.values(), signals.terms])
        sums |= dict(zip(counts, known, strict=True))
        readers, rank = self.readers(signals.coverage, params), self.world.rank
        moments = moments_of({d: sums[d] for d in flat if readers.get(layer_of(d.layer), rank) == rank})
        if self.copies > 1:
            moments, terms = {n: self._once(m) for n, m in moments.items()}, terms / self.copies
        if self.rescales:
            moments = {name: self._rescaled(name, m, signals.coverage) for name, m in moments.items()}
        return replace(signals, moments=moments, terms=terms)

    def sums(
        self, factors: Mapping[Factor, Tensor], coverage: Coverage, params: Params
    ) -> Callable[[], dict[Factor, Tensor]]:
        """Begin to add up factors over all ranks; what is returned waits for those that this rank reads."""
        itemsize = next((factor.element_size() for factor in factors.values()), 0)
        readers = self.readers(coverage, params)
        buckets = self.buckets(coverage, itemsize, readers)
        return self.factor_sums(coverage, readers).start(factors, members(buckets, factors))

    def factor_sums(self, coverage: Coverage, readers: Mapping[str, int]) -> FactorSums:
        """Sums of the factors of these layers; ``readers`` as for :meth:`buckets`."""
        return FactorSums(self.world, _sides(coverage), readers, self.reduce_dtype)

    def _once(self, moments: Moments) -> Moments:
        a, g, rows = (None if sums is None else sums / self.copies for sums in moments)
        assert rows is not None
        return Moments(a, g, rows)

    def _rescaled(self, name: str, moments: Moments, coverage: Coverage) -> Moments:
        if moments.cotangents is None:
            return moments
        power = 1 if name in coverage.plain_sums else 2
        return moments._replace(cotangents=moments.cotangents / (self.world.size // self.copies) ** power)

    def means(self, gradients: Updates) -> dict[str, Tensor]:
        """Gradients over all ranks, in buckets, those of the last parameters first."""
        backwards = {name: gradients[name] for name in reversed(list(gradients))}
        kinds: dict[torch.dtype, dict[str, int]] = {}
        for name, gradient in backwards.items():
            kinds.setdefault(gradient.dtype, {})[name] = gradient.numel() * gradient.element_size()
        buckets = [bucket for sizes in kinds.values() for bucket in by_bytes(sizes)]
        started = [self.world.sum(joined([backwards[name] for name in bucket])) for bucket in buckets]
        new: dict[str, Tensor] = {}
        for bucket, arrived in zip(buckets, wait_all(started), strict=True):
            new |= zip(
                bucket,
                parted(arrived / self.world.size, [backwards[name] for name in bucket]),
                strict=True,
            )
        return {name: new[name] for name in gradients}


def average_over_ranks(inner: Transform, averaging: Averaging) -> Transform:
    """Let a transform see the gradients and the factors of all ranks.

    The collectives are operators of the graph that the update is traced into.
    """
    averaging = replace(averaging, rescales=inner.rules.fisher == "empirical")

    def init(params: Params, coverage: Coverage) -> State:
        averaging.buckets(coverage)  # or say what is wrong with split_indices
        return inner.init(params, coverage)

    def update(updates: Updates, state: State, params: Params, signals: Signals) -> tuple[Updates, State]:
        means = averaging.means(updates) if averaging.gradients else updates
        return inner.update(means, state, params, averaging.signals(signals, params))

    return inner._replace(init=init, update=update, world=averaging.world)


def members(buckets: Sequence[Sequence[str]], factors: Iterable[Factor]) -> list[Bucket]:
    """The factors that travel together: of a bucket of layers first all ``A``, then all ``G``, by name."""
    known = sorted(factors, key=lambda factor: factor.layer)  # ranks may know them in different orders
    return [
        [d for side in ("A", "G") for d in known if d.side == side and layer_of(d.layer) in bucket]
        for bucket in restricted(buckets, {layer_of(d.layer) for d in known})
    ]


def _sides(coverage: Coverage) -> dict[Factor, Side]:
    """The side of every factor that is measured."""
    every = [sums for layer in coverage.layers.values() for sums in layer.sums]
    inputs = {Factor(sums.name, "A"): sums.input for sums in every}
    return inputs | {Factor(sums.name, "G"): sums.output for sums in every}
