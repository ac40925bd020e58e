"""The block size that THOR's rule gives for a model on this device: :mod:`thor_fx.block_size_rule`."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .arguments import check_choice, check_integer, check_sharing
from .block_size_rule import THRESHOLD, BlockSizeReport, all_finite, rule
from .capture import LossFn
from .factors import Kronecker, Moments, factor_pair, measure
from .inversion_time import Timer
from .layers import Layer
from .options import MAX_DIM
from .passes.layout import BiasRule, Rules, Sharing
from .passes.outputs import Factor
from .precision import as_written


def block_size_report(
    loss_fn: LossFn,
    params: Mapping[str, Tensor],
    *batch: object,
    sharing: Sharing = "expand",
    bias: BiasRule = "raw",
    max_dim: int | None = MAX_DIM,
    threshold: float = THRESHOLD,
    timer: Timer | None = None,
) -> BlockSizeReport:
    """Measure which block size suits a model on this device: what ``block_size="auto"`` does.

    The factors are computed once, on ``batch``, by interpreting the step graph; then they are inverted at
    every candidate, several times.

    Args:
        loss_fn: ``loss_fn(params, *batch)``, returns a scalar loss or ``(loss, aux)``.
        params: floating-point tensors by name.
        *batch: tensors and nests of tensors: a real batch, since losses depend on the data.
        sharing: as in :func:`thor_fx.thor`.
        bias: as in :func:`thor_fx.thor`.
        max_dim: sides longer than this have no whole factor and no say.
        threshold: the largest loss that counts as none.
        timer: says how many milliseconds an :class:`~thor_fx.inversion_time.Inversion` takes; None: a clock.

    Returns:
        Both curves, their crossing and the block size.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: an argument has a wrong value, no layer has a whole factor, or a factor is not finite.

    Example:
        >>> import torch
        >>> def loss_fn(params, x):
        ...     return (x @ params["w"]).square().mean()
        >>> batch = torch.block_diag(torch.ones(16, 16), torch.ones(16, 16))  # A has two blocks
        >>> params, clock = {"w": torch.ones(32, 8)}, lambda work: 2.0 * work.block_size  # no real one here
        >>> report = block_size_report(loss_fn, params, batch, timer=clock)
        >>> print(report)
        block size  refresh ms  performance  factors that lose < 1%
                 1           2        1.000                   0.000
                16          32        0.062                   1.000
                32          64        0.031                   1.000
        the curves cross at 4.183 on cpu: block_size=16
        largest losses there: none of 1% or more
    """
    check_sharing("sharing", sharing)
    check_choice("bias", bias, BiasRule)
    check_integer("max_dim", max_dim, optional=True)
    return rule(_factors_of(loss_fn, params, batch, Rules(sharing, bias, max_dim)), threshold, timer)


def report_of(
    factors: Mapping[str, Kronecker], *, threshold: float = THRESHOLD, timer: Timer | None = None
) -> BlockSizeReport:
    """The same report from factors that are there already: :func:`thor_fx.factors`.

    Args:
        factors: by name of layer.
        threshold: the largest loss that counts as none.
        timer: says how many milliseconds an :class:`~thor_fx.inversion_time.Inversion` takes; None: a clock.

    Raises:
        TypeError: ``threshold`` is no number.
        ValueError: ``threshold`` is not positive, no factor is whole, or one is not finite.
    """
    found: dict[Factor, Tensor] = {}
    for name, pair in factors.items():
        for factor, value in ((Factor(name, "A"), pair.A), (Factor(name, "G"), pair.G)):
            if value.dim() == (3 if pair.groups > 1 else 2):  # else it is a diagonal
                found[factor] = value.reshape(-1, *value.shape[-2:])
    return rule(found, threshold, timer)


def choose_by_step(
    loss_fn: LossFn, params: Mapping[str, Tensor], batch: Sequence[object], rules: Rules
) -> BlockSizeReport | None:
    """The report for a training step; None where no factor is whole, so that nothing can be cut.

    Random numbers are drawn as if nothing had been measured.

    Raises:
        ValueError: a factor is not finite.
    """
    device = next(iter(params.values())).device
    kind = "cuda" if device.type == "cpu" else device.type
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=kind):
        factors = _factors_of(loss_fn, params, batch, rules)
    with as_written(device):
        return rule(factors) if factors else None


def choose(
    moments: Mapping[str, Moments], layers: Mapping[str, Layer], terms: Tensor | None
) -> BlockSizeReport | None:
    """The report from what a factor step has measured; None where that does not allow a choice.

    So it is where no factor is whole, or one is not finite, as in a step with an overflow.
    """
    factors = whole_factors(moments, layers, terms)
    return rule(factors) if factors and all_finite(factors) else None


def _factors_of(
    loss_fn: LossFn, params: Mapping[str, Tensor], batch: Sequence[object], rules: Rules
) -> dict[Factor, Tensor]:
    layers, moments, terms = measure(loss_fn, params, *batch, rules=rules)
    return whole_factors(moments, layers, terms)


def whole_factors(
    moments: Mapping[str, Moments], layers: Mapping[str, Layer], terms: Tensor | None
) -> dict[Factor, Tensor]:
    """The factors of a step that a block size may cut, each (E, d, d): the dense ones of layers that ran."""
    found: dict[Factor, Tensor] = {}
    for name, layer in layers.items():
        if not any(sums.name in moments for sums in layer.sums):
            continue
        a, g = factor_pair(moments, layer, 1.0 if terms is None else terms)
        if a is not None and layer.input.kind == "dense":
            found[Factor(name, "A")] = a.reshape(-1, layer.in_, layer.in_)
        if g is not None and layer.output.kind == "dense":
            found[Factor(name, "G")] = g.reshape(-1, layer.out, layer.out)
    return found
