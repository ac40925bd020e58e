"""Kronecker factors of a layer, from the sums that a factor step returns.

Let the loss average over ``n`` terms, let ``a_r`` be the input and ``g_r = dL/ds_r`` the gradient of
the pre-activation in row ``r`` of ``R``, and let the loss carry the scale ``s``. Then::

    A = (1/R) sum_r a_r a_r^T            G = (n / s^2) sum_r g_r g_r^T

``n`` undoes the mean in the loss: ``n g_r`` are the gradients of single terms. For a plain Linear
``R = n``, and these are ``E[a a^T]`` and ``E[g g^T]`` (Martens & Grosse 2015, eq. 1; for weights
that are shared over positions, the *expand* setting of Eschenhagen et al. 2023, eq. 11). A layer with
E groups (a grouped convolution, experts) has E such pairs, each over its own rows.

A weight that is used as ``W`` and as ``W.T`` (a tied auto-encoder) has two Kronecker products in its
block: ``A (x) G`` of the first and, with the sides exchanged, ``G' (x) A'`` of the second. Their sum is
approximated by one, as factored damping does (Martens & Grosse 2015, section 6.3)::

    (A + G'/pi) (x) (G + pi A')     with     pi^2 = (tr G tr G') / (tr A tr A')

where ``pi`` is what makes the superfluous cross terms smallest in trace norm.

Where sides keep the mean of their rows (Eva), the pair is two vectors::

    a = (1/R) sum_r a_r                  g = sqrt(n/R) (1/s) sum_r g_r

For a plain Linear ``R = n``, and ``g`` is the mean of the gradients ``n g_r`` of single terms (Zhang et al.
2023, section 3). For other weights the root keeps ``g`` in the units of ``G``: by Jensen's inequality
``a a^T <= A`` and ``g g^T <= G``, whatever ``R``. Vectors of both uses of a tied weight are added in the same
way, ``(a + g'/sqrt(pi)) / sqrt(2)`` and ``(g + sqrt(pi) a') / sqrt(2)``, which keeps the inequality.
This is the *empirical* Fisher, from the labels of the data. For the other estimators the ``g_r`` come from
the likelihood of the model's output (:mod:`thor_fx.passes.scores`), are those of single terms and carry no
scale; with ``n`` as the graph has it, whatever ``batch_size`` says::

    G = (1/n) sum_r g_r g_r^T
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .arguments import check_choice, check_integer, check_likelihood, check_number, check_sharing, shown
from .capture import LossFn
from .curvature_operator import CurvatureOperator
from .interpreted import interpreted
from .layers import Layer, coverage
from .passes import canonicalize, emit_factors, outputs, pipeline
from .passes.layout import BiasRule, Fisher, Likelihood, Rules, Sharing
from .passes.outputs import Factor, Rows, Terms
from .passes.sides import Side, trace, widen, without_bias
from .passes.survey import survey
from .precision import as_written
from .trace import trace_step


class Moments(NamedTuple):
    """What one factor step measures of one layer.

    Attributes:
        activations: ``sum_r a_r a_r^T``, of the shape of the layer's input side; None where nothing is kept;
            ``sum_r a_r`` where that side keeps a mean.
        cotangents: ``sum_r g_r g_r^T``, of the shape of the output side, and so on.
        rows: ``R``, 0-D; or (E,) where every group has its own.
    """

    activations: Tensor | None
    cotangents: Tensor | None
    rows: Tensor


@dataclass(frozen=True)
class Kronecker:
    """The factor pair of one layer: its curvature block is approximately ``A (x) G``.

    Attributes:
        A: shape (in, in); (E, in, in) where there are E groups; (in,), its diagonal, for an embedding.
        G: shape (out, out); (E, out, out) where there are E groups.
        rows: ``R``, the rows that ``A`` averages over; of all groups together where they differ.
        n: the terms that the loss averages over.
        kind: the kind of operation that uses the weight.
        groups: E, the number of independent factor pairs.
    """

    A: Tensor
    G: Tensor
    rows: int
    n: int
    kind: str = "linear"
    groups: int = 1


class Factors(dict[str, Kronecker]):
    """The factor pairs of a model, by name of layer, and what the layers are.

    Attributes:
        layers: by name.
        shapes: of all parameters of the model.
    """

    def __init__(
        self,
        pairs: Mapping[str, Kronecker],
        layers: Mapping[str, Layer],
        shapes: Mapping[str, torch.Size],
    ) -> None:
        super().__init__(pairs)
        self.layers: Mapping[str, Layer] = layers
        self.shapes: Mapping[str, torch.Size] = shapes

    def tensors(self) -> dict[str, Tensor]:
        """All factors as plain tensors, ``"layer.A"`` and ``"layer.G"``: to save, or for other libraries."""
        return {f"{name}.{side}": getattr(pair, side) for name, pair in self.items() for side in ("A", "G")}

    def operator(self, damping: float = 0.0, scale: float = 1.0) -> CurvatureOperator:
        """The curvature ``scale * blockdiag(A (x) G) + damping * I`` as a linear operator.

        It acts on the parameters that belong to layers, in the order of the model.

        Args:
            damping: zero or more.
            scale: the number of data, say, for the precision of a posterior.

        Raises:
            TypeError: an argument is no number.
            ValueError: an argument is negative, or there are no layers.
        """
        check_number("damping", damping)
        check_number("scale", scale, positive=True)
        if not self:
            raise ValueError("there are no layers, so there is no curvature: thor_fx.explain says why")
        covered = {param for layer in self.layers.values() for param in layer.params}
        shapes = {name: shape for name, shape in self.shapes.items() if name in covered}
        return CurvatureOperator(self, self.layers, shapes, float(damping), float(scale))


def cotangent_scale(
    fisher: Fisher, terms: Tensor | float, measured: Tensor | float, loss_scale: float
) -> Tensor | float:
    """What sums of ``g_r g_r^T`` are multiplied by to be ``G``.

    Args:
        fisher: the estimator.
        terms: ``n``, as the user says.
        measured: ``n``, as the graph does.
        loss_scale: ``s``.
    """
    return terms / loss_scale**2 if fisher == "empirical" else 1 / measured


def factor_pair(
    moments: Mapping[str, Moments], layer: Layer, scale: Tensor | float
) -> tuple[Tensor | None, Tensor | None]:
    """``A`` and ``G`` of a layer over all of its uses, in the shapes of its sides.

    None in place of a factor of which nothing is kept. ``scale``: see :func:`cotangent_scale`.
    """
    measured = [sums for sums in layer.sums if sums.name in moments]
    pairs = []
    for sums in measured:
        m = moments[sums.name]
        a = None if m.activations is None else m.activations / _like(m.rows.clamp(min=1), m.activations)
        g = None if m.cotangents is None else _cotangents(m, sums.output, m.cotangents, scale)
        a = without_bias(a, sums.input) if a is not None and layer.bias is None else a
        sides = (g, sums.output), (a, sums.input)
        pairs.append(sides if sums.flipped else sides[::-1])
    total = pairs[0] if len(pairs) == 1 else _one_product(*pairs)
    wanted = layer.input, layer.output
    a, g = (
        None if value is None else widen(value, have, want)
        for (value, have), want in zip(total, wanted, strict=True)
    )
    return a, g


def _cotangents(m: Moments, side: Side, value: Tensor, scale: Tensor | float) -> Tensor:
    """``G``, or the vector ``g``."""
    if side.kind == "mean":
        return value * _like((scale / m.rows.clamp(min=1)) ** 0.5, value)
    return value * scale


_Measured = tuple[Tensor | None, Side]


def _one_product(
    first: tuple[_Measured, _Measured], second: tuple[_Measured, _Measured]
) -> tuple[_Measured, _Measured]:
    """The Kronecker product nearest to the sum of two, by the traces of their factors."""
    (a, g), (other_a, other_g) = first, second
    square = (_trace(*g) * _trace(*other_a)) / (_trace(*a) * _trace(*other_g))
    pi = torch.where(square.isfinite() & (square > 0), square, torch.ones_like(square)) ** 0.5
    return _add(a, other_a, 1 / pi), _add(g, other_g, pi)


def _add(one: _Measured, other: _Measured, weight: Tensor) -> _Measured:
    """The weighted sum of two factors in the form that keeps more."""
    (x, have), (y, other_have) = one, other
    if x is None or y is None:  # what is not kept of one is not kept of the sum
        return None, have if x is None else other_have
    if have.kind == "mean":
        return (x + _like(weight, x) ** 0.5 * y) / 2**0.5, have
    want = have if other_have.kind == "diagonal" else other_have
    return widen(x, have, want) + _like(weight, x) * widen(y, other_have, want), want


def _trace(value: Tensor | None, side: Side) -> Tensor:
    return torch.tensor(float(side.dim)) if value is None else trace(value, side)


def _like(per_group: Tensor, value: Tensor) -> Tensor:
    """A number for every group, with axes of length 1 behind it so that it multiplies factors."""
    return per_group.reshape(per_group.shape + (1,) * (value.dim() - per_group.dim()))


def kronecker(
    moments: Mapping[str, Moments],
    layers: Mapping[str, Layer],
    terms: Tensor | float,
    scale: Tensor | float | None = None,
) -> dict[str, Kronecker]:
    """The factor pairs of all layers, by name; ``scale`` is :func:`cotangent_scale`, by default ``terms``."""
    result = {}
    for name, layer in layers.items():
        a, g = factor_pair(moments, layer, terms if scale is None else scale)
        assert a is not None, "without max_dim everything is kept"
        assert g is not None, "without max_dim everything is kept"
        rows = sum(int(moments[sums.name].rows.sum()) for sums in layer.sums)
        result[name] = Kronecker(a, g, rows, int(terms), layer.kind, layer.groups)
    return result


def moments_of(results: Mapping[Any, Any]) -> dict[str, Moments]:
    """Sort what a factor graph returns (values or nodes, by descriptor) by layer."""
    layers = [descriptor.layer for descriptor in results if isinstance(descriptor, Rows)]
    return {
        layer: Moments(results.get(Factor(layer, "A")), results.get(Factor(layer, "G")), results[Rows(layer)])
        for layer in layers
    }


def flat_moments(moments: Mapping[str, Moments]) -> dict[Any, Tensor]:
    """The inverse of :func:`moments_of`."""
    return {
        descriptor: value
        for name, m in moments.items()
        for descriptor, value in zip((Factor(name, "A"), Factor(name, "G"), Rows(name)), m, strict=True)
        if value is not None
    }


def factors(
    loss_fn: LossFn,
    params: Mapping[str, Tensor] | LossFn | None = None,
    *batch: Any,
    batch_size: int | None = None,
    loss_scale: float = 1.0,
    sharing: Sharing = "expand",
    bias: BiasRule = "raw",
    fisher: Fisher = "empirical",
    likelihood: Likelihood | None = None,
    progress: bool = False,
    backend: str = "eager",
) -> Factors:
    """The Kronecker factors of every layer: undamped and not cut into blocks.

    Of one batch, ``factors(loss_fn, params, *batch)``; or of a data set, ``factors(model, loss_fn, loader)``:
    of every batch that ``loader`` yields, ``model`` is given the first member and ``loss_fn`` the output and
    all other members, ``loss_fn(model(x), y)``; of a mapping, ``loss_fn(model(**batch))``. ``loss_fn=None``
    says that the model returns its loss. The model runs in the mode it is in, and nothing of it is changed.

    Args:
        loss_fn: ``loss_fn(params, *batch)``, returns a scalar loss or ``(loss, aux)``; or the model.
        params: floating-point tensors by name; or the loss function of the model's output, a mean over its
            terms.
        *batch: tensors and nests of tensors; or the loader.
        batch_size: terms ``n`` that the loss averages over; None: the rows of the site nearest the
            loss. A loss that is a *sum* over ``n`` terms is ``n`` times their mean: also pass
            ``loss_scale=n``.
        loss_scale: what ``loss_fn`` multiplies the mean loss by.
        sharing: ``"expand"``: every position is a row; ``"reduce"``: the positions of one datum are
            averaged (``A``) and summed (``G``) to one row; or ``name -> "expand" | "reduce"``.
        bias: ``"joint"``: the last row and column of ``A`` are those of the bias; ``"raw"``: without it.
        fisher: ``"empirical"``, ``"sampled"`` or ``"exact"``: as in :func:`thor_fx.thor`.
        likelihood: of the model's output; None: as read off the loss. As in :func:`thor_fx.thor`.
        progress: of a data set: show a progress bar.
        backend: of a data set: ``"inductor"`` compiles, which pays where there are many batches; else the
            graphs are interpreted.

    Returns:
        ``Kronecker(A, G, rows, n, kind, groups)`` by name of layer, a dict that can also be a linear operator
        (:meth:`Factors.operator`), in the definitions at the top of
        :mod:`thor_fx.factors`. ``A`` of a convolution is ordered as ``weight.flatten(1)``. A layer is
        called as its parameter, with ``[start:stop]`` behind it where a part of the parameter has
        factors of its own.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: an argument has a wrong value, the loss does not depend on ``params``, the estimator
            needs a likelihood and none is known, or batches of a data set use different layers.

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> f = factors(lambda p, x: (x @ p["w"]).mean(), {"w": torch.ones(2, 1)}, x)
        >>> f["w"].A
        tensor([[ 5.,  7.],
                [ 7., 10.]])
        >>> f["w"].G, f["w"].rows, f["w"].n
        (tensor([[1.]]), 2, 2)
        >>> model, halves = torch.nn.Linear(2, 1, bias=False), x.split(1)
        >>> torch.equal(factors(model, torch.mean, halves)["weight"].A, f["w"].A)
        True
    """
    check_integer("batch_size", batch_size, optional=True)
    check_number("loss_scale", loss_scale, positive=True)
    check_sharing("sharing", sharing)
    check_choice("bias", bias, BiasRule)
    check_choice("fisher", fisher, Fisher)
    check_likelihood("likelihood", likelihood)
    rules = Rules(sharing, bias, fisher=fisher, likelihood=likelihood, loss_scale=float(loss_scale))
    if isinstance(loss_fn, nn.Module):
        return _of_data(loss_fn, params, batch, rules, batch_size, progress=progress, backend=backend)
    known: Any = params  # tracing refuses what is no mapping
    layers, moments, found = measure(loss_fn, known, *batch, rules=rules)
    measured = 1 if found is None else found
    terms = measured if batch_size is None else batch_size
    pairs = kronecker(moments, layers, terms, cotangent_scale(fisher, terms, measured, loss_scale))
    return Factors(pairs, layers, {name: p.shape for name, p in known.items()})


def _of_data(
    model: nn.Module, loss_fn: Any, rest: Sequence[Any], rules: Rules, batch_size: int | None, **how: Any
) -> Factors:
    from .data_factors import factors_over  # it measures with what is defined here

    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(
            "factors(model, loss_fn, loader) needs a loss function of the model's output, or None, got "
            f"{shown(loss_fn)}; factors of parameters are those of a loss: factors(loss_fn, params, *batch)"
        )
    if len(rest) != 1:
        raise TypeError(f"factors(model, loss_fn, loader) takes one loader, got {len(rest)} arguments there")
    if batch_size is not None:
        raise ValueError("batch_size is that of one batch: of a data set, leave it out")
    return factors_over(model, loss_fn, rest[0], rules, **how)


def measure(
    loss_fn: LossFn, params: Mapping[str, Tensor], *batch: Any, rules: Rules
) -> tuple[Mapping[str, Layer], dict[str, Moments], Tensor | None]:
    """The layers, their moments and the loss terms of one factor step, which is interpreted."""
    traced = trace_step(loss_fn, params, *batch)
    with as_written(next(iter(params.values())).device):  # the casts of the caller's autocast are in it
        step = pipeline.run(traced, [canonicalize])
        layers = coverage(survey(step, rules), rules).layers
        graph = pipeline.run(step, [partial(emit_factors, rules=rules)])
        results = run_graph(graph, params, *batch)
    return layers, moments_of(results), results.get(Terms())


def run_graph(gm: fx.GraphModule, params: Mapping[str, Tensor], *batch: Any) -> dict[Any, Tensor]:
    """Interpret a graph made by :func:`~thor_fx.trace.trace_step`; its results by descriptor."""
    leaves = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
    with torch.no_grad():
        values = interpreted(gm)(*params.values(), *leaves)
    return dict(zip(outputs.output_nodes(gm), values, strict=True))
