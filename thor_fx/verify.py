"""A certificate for one's own model: what thor_fx measures against slow, independent computations.

For every layer, in float64 and on a small batch of B examples:

* *gradient*: of the step graph, against eager autograd;
* *Fisher*: ``|A (x) G - F| / |F|`` in the Frobenius norm, where ``F = (1/B) sum_i vec(g_i) vec(g_i)^T`` is
  the dense empirical Fisher block of the gradients ``g_i`` of single examples (for ``fisher="exact"``: the
  dense generalised Gauss-Newton block of the whole batch, :mod:`thor_fx.ggn`), and *cosine*, the cosine
  of the angle between the two. A Kronecker product is an approximation: the error is zero where it is
  exact (one example without shared weights, linear networks, ...), not in general;
* invariances of ``A`` and ``G``, which hold exactly where examples do not influence each other: a batch
  *repeated*, in another *order*, *summed* instead of averaged, and *split* into micro-batches.
"""

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import check_choice, check_integer, check_likelihood, check_sharing
from .batches import Batch, converted, examples_of, map_examples
from .capture import LossFn
from .factors import Kronecker, Moments, cotangent_scale, kronecker, moments_of, run_graph
from .ggn import curvature_rows
from .layers import Layer, coverage
from .parameters import check_params, trainable
from .passes import Grad, Terms, canonicalize, emit_factors, pipeline
from .passes.layout import BiasRule, Fisher, LikelihoodName, Rules, Sharing
from .passes.reindex import take
from .passes.survey import survey
from .trace import trace_step


@dataclass(frozen=True)
class Errors:
    """Relative errors of one layer; NaN where something was not compared.

    Attributes:
        gradient: of the step graph, against eager autograd.
        fisher: of ``A (x) G`` against the dense Fisher block; NaN where that is too large.
        cosine: between the two; 1 where they agree up to a factor.
        repeated: of the factors, when the batch is doubled.
        order: when its examples are in reverse order.
        summed: when the loss is a sum over its terms.
        split: when factors are averaged over two micro-batches.
    """

    gradient: float
    fisher: float
    cosine: float
    repeated: float
    order: float
    summed: float
    split: float

    @property
    def invariance(self) -> float:
        """The largest error of those that are zero for every model without coupled examples."""
        return max(self.gradient, self.repeated, self.order, self.summed, self.split)


@dataclass(frozen=True)
class Certificate:
    """The errors of every layer; ``print(certificate)`` shows them as a table."""

    layers: Mapping[str, Errors]

    @property
    def worst(self) -> float:
        """The largest error of an invariance, over all layers."""
        return max((errors.invariance for errors in self.layers.values()), default=0.0)

    def __str__(self) -> str:
        titles = ["layer", *(field.name for field in fields(Errors))]
        rows = [[name, *(_shown(value) for value in astuple(e))] for name, e in self.layers.items()]
        widths = [max(len(row[column]) for row in [titles, *rows]) for column in range(len(titles))]
        lines = [
            "  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in [titles, *rows]
        ]
        return "\n".join([*lines, f"largest error of an invariance: {_shown(self.worst)}"])


def _shown(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1e}"


def verify(
    loss_fn: LossFn,
    params: Mapping[str, Tensor],
    *batch: Any,
    sharing: Sharing = "expand",
    bias: BiasRule = "raw",
    fisher: Fisher = "empirical",
    likelihood: LikelihoodName | None = None,
    dtype: torch.dtype | None = torch.float64,
    max_size: int = 2048,
) -> Certificate:
    """Compare the factors of a model with dense Fisher blocks, and check their invariances.

    Args:
        loss_fn: ``loss_fn(params, *batch)``, a mean over the examples of a batch; returns a scalar loss
            or ``(loss, aux)``. It must accept batches of one example.
        params: floating-point tensors by name.
        *batch: tensors and nests of tensors; the first axis of the first tensor is the batch, and all
            tensors with a first axis of that length are cut with it.
        sharing: as in :func:`thor_fx.factors`.
        bias: as in :func:`thor_fx.factors`.
        fisher: ``"empirical"`` or ``"exact"``, which is what ``"sampled"`` is on average.
        likelihood: as in :func:`thor_fx.factors`, by name.
        dtype: what floating-point arguments are converted to; None: left as they are. What ``loss_fn``
            refers to besides (the buffers of a module) must be of that dtype.
        max_size: the largest number of weights in a layer whose dense Fisher block is formed.

    Returns:
        The errors of every layer, to print or to ask.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: the batch has less than two examples, or ``fisher="sampled"``: draws have no invariances.

    Example:
        >>> def loss_fn(params, x, y):
        ...     return ((x @ params["w"] - y) ** 2).mean()
        >>> torch.manual_seed(0)
        <torch._C.Generator object at ...>
        >>> certificate = verify(loss_fn, {"w": torch.randn(3, 1)}, torch.randn(4, 3), torch.randn(4, 1))
        >>> certificate.worst < 1e-12
        True
    """
    check_params(params)
    check_sharing("sharing", sharing)
    check_choice("bias", bias, BiasRule)
    check_choice("fisher", fisher, Fisher)
    if fisher == "sampled":
        raise ValueError(
            "fisher='sampled' is random, so nothing can be verified: pass fisher='exact', its mean"
        )
    check_likelihood("likelihood", likelihood)
    check_integer("max_size", max_size)
    params, batch = converted((dict(params), batch), dtype)
    count = examples_of(batch)
    graphs = _Graphs(loss_fn, params, Rules(sharing, bias, fisher=fisher, likelihood=likelihood))
    whole = graphs.measure(batch)
    layers, found = whole.layers, graphs.pairs(whole, count)
    repeated = graphs.factors(map_examples(batch, count, lambda t: torch.cat([t, t])), 2 * count)
    order = graphs.factors(map_examples(batch, count, lambda t: t.flip(0)), count)
    summed = graphs.scaled(count).factors(batch, count, loss_scale=count)
    cuts = [slice(0, count // 2), slice(count // 2, count)]
    halves = [
        (c.stop - c.start, graphs.measure(map_examples(batch, count, operator.itemgetter(c)))) for c in cuts
    ]
    split = graphs.pairs(_added(halves, count, fisher), count)
    vectors = graphs.curvature(batch, count)
    eager = _gradients(loss_fn, params, batch)
    result = {}
    for name, layer in layers.items():
        error, cosine = _against_fisher(layer, found[name], vectors, max_size)
        result[name] = Errors(
            max(_error(whole.gradients[p], eager[p]) for p in layer.params),
            error,
            cosine,
            _difference(repeated[name], found[name]),
            _difference(order[name], found[name]),
            _difference(summed[name], found[name]),
            _difference(split[name], found[name]),
        )
    return Certificate(result)


# --- what is compared ------------------------------------------------------------------------------


class _Measured(NamedTuple):
    """What one run of a step graph gives: sums by name, gradients by parameter, the layers, and ``n``."""

    moments: Mapping[str, Moments]
    gradients: Mapping[str, Tensor]
    layers: Mapping[str, Layer]
    terms: Tensor | float


@dataclass(frozen=True)
class _Graphs:
    """Factors and gradients by the step graph; every example is one term of the loss."""

    loss_fn: LossFn
    params: Mapping[str, Tensor]
    rules: Rules

    def measure(self, batch: Batch) -> _Measured:
        """Run the step graph of a batch."""
        step = pipeline.run(trace_step(self.loss_fn, self.params, *batch), [canonicalize])
        layers = coverage(survey(step, self.rules), self.rules).layers
        graph = pipeline.run(step, [partial(emit_factors, rules=self.rules)])
        torch.manual_seed(0)
        results = run_graph(graph, self.params, *batch)
        gradients = {
            d.param: v for d, v in results.items() if isinstance(d, Grad) and isinstance(d.param, str)
        }
        return _Measured(moments_of(results), gradients, layers, results.get(Terms(), 1))

    def pairs(self, measured: _Measured, terms: float, loss_scale: float = 1.0) -> dict[str, Kronecker]:
        """Factors by layer."""
        scale = cotangent_scale(self.rules.fisher, terms, measured.terms, loss_scale)
        return kronecker(measured.moments, measured.layers, terms, scale)

    def factors(self, batch: Batch, terms: float, loss_scale: float = 1.0) -> dict[str, Kronecker]:
        """Factors by layer."""
        return self.pairs(self.measure(batch), terms, loss_scale)

    def curvature(self, batch: Batch, count: int) -> list[dict[str, Tensor]]:
        """Vectors whose outer products add up to the dense Fisher, each by parameter."""
        if self.rules.fisher == "exact":
            step = pipeline.run(trace_step(self.loss_fn, self.params, *batch), [canonicalize])
            heads = [head.output for head in survey(step, self.rules).heads]
            return curvature_rows(step, heads, self.params, *batch)
        examples = [map_examples(batch, count, operator.itemgetter(slice(i, i + 1))) for i in range(count)]
        single = [_gradients(self.loss_fn, self.params, example) for example in examples]
        return [{name: g / count**0.5 for name, g in gradients.items()} for gradients in single]

    def scaled(self, scale: float) -> "_Graphs":
        """The same of the loss times a number."""

        def loss_fn(*args: Any) -> Any:
            out = self.loss_fn(*args)
            return (scale * out[0], out[1]) if isinstance(out, tuple) else scale * out

        return replace(self, loss_fn=loss_fn, rules=replace(self.rules, loss_scale=scale))


def _gradients(loss_fn: LossFn, params: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """By eager autograd; zeros where the loss does not depend on a parameter."""
    leaves = {name: p.detach().requires_grad_() if trainable(p) else p.detach() for name, p in params.items()}
    torch.manual_seed(0)
    out = loss_fn(leaves, *batch)
    loss = out[0] if isinstance(out, tuple) else out
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if g is None else g
        for (name, leaf), g in zip(wanted.items(), found, strict=True)
    }


def _against_fisher(
    layer: Layer, pair: Kronecker, vectors: Sequence[Mapping[str, Tensor]], max_size: int
) -> tuple[float, float]:
    """Relative error and cosine of ``A (x) G`` against the dense Fisher block, over all groups."""
    if layer.out * layer.in_ > max_size:
        return float("nan"), float("nan")
    rows = torch.stack([_as_rows(layer, gradients) for gradients in vectors])  # (K, E, out in)
    fisher = torch.einsum("kei,kej->eij", rows, rows)
    a = torch.diag_embed(pair.A) if layer.input.kind == "diagonal" else pair.A
    a, g = (factor if factor.dim() == 3 else factor[None] for factor in (a, pair.G))
    product = torch.stack([torch.kron(g_e, a_e) for a_e, g_e in zip(a, g, strict=True)])
    cosine = (product * fisher).sum() / (product.norm() * fisher.norm())
    return _error(product, fisher), float(cosine)


def _as_rows(layer: Layer, gradients: Mapping[str, Tensor]) -> Tensor:
    """The gradient of a layer, with its bias as the last column, as (E, out in)."""
    matrices = take(layer.path, gradients[layer.param]).reshape(layer.groups, layer.out, -1)
    if layer.bias is not None:
        column = take(layer.bias_path, gradients[layer.bias]).reshape(layer.groups, layer.out, 1)
        matrices = torch.cat([matrices, column], -1)
    return matrices.flatten(1)


def _added(parts: Sequence[tuple[int, _Measured]], count: int, fisher: Fisher) -> _Measured:
    """The sums of a whole batch from those of its parts, whose losses average over fewer examples."""

    def total(values: Sequence[Tensor | None]) -> Tensor | None:
        known = [value for value in values if value is not None]
        return torch.stack(known).sum(0) if known else None

    added = {}
    _, one = parts[0]
    for name, first in one.moments.items():
        every = [(size / count if fisher == "empirical" else 1, part.moments[name]) for size, part in parts]
        rows = torch.stack([m.rows.expand_as(first.rows) for _, m in every]).sum(0)
        cotangents = [None if m.cotangents is None else share**2 * m.cotangents for share, m in every]
        added[name] = Moments(total([m.activations for _, m in every]), total(cotangents), rows)
    return one._replace(moments=added, terms=sum(part.terms for _, part in parts))


def _difference(got: Kronecker, expected: Kronecker) -> float:
    return max(_error(got.A, expected.A), _error(got.G, expected.G))


def _error(got: Tensor, expected: Tensor) -> float:
    scale = float(expected.norm())
    return float((got - expected).norm()) / (scale or 1.0)
