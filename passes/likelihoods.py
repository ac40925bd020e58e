"""Find the heads of a step graph: read off the backward of its loss what the likelihood is.

NOTE: [Why backwards] A loss has many forward spellings. Its backward begins with nodes that depend on
nothing but where backward starts and on data: masks, labels, class weights, the mean's 1/N. Where the
first of them meets a value of the model is the cotangent of the model's output, and there are few forms::

    categorical   dz = g - softmax(z) sum_c g       g: anything that does not depend on the model
    bernoulli     dz = g (k sigmoid(z) - m)         k = 1; with pos_weight, k = pos_weight y + 1 - y
    gaussian      dd = g 2 d, where the loss contains d^2; or dz = g (2/numel) (z - y)

The condition on ``g`` says that the loss is linear in log-probabilities, or quadratic in ``d``. A focal
loss is neither, and is not recognised.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from .anatomy import Anatomy, anatomy, tangents
from .elementwise import elementwise_heads
from .heads import Head, KindOfHead, OfClasses, Unmasked
from .layout import Likelihood
from .nodes import CASTS, PERMUTES, RESHAPES, arguments, chain, downstream, shape, source, target
from .operands import Matrix
from .outputs import Loss, Output, output_nodes
from .patches import Pixels
from .preactivation import preactivation
from .sites import SiteReport
from .walk import Site

aten = torch.ops.aten


class LikelihoodError(ValueError):
    """No likelihood is known for the loss, or not one that the estimator can use."""


class UnknownLossError(LikelihoodError):
    """The loss, or the output that it is a function of, is not found in the graph."""


def find_heads(
    gm: fx.GraphModule, report: SiteReport, likelihood: Likelihood | None, loss_scale: float = 1.0
) -> tuple[Head, ...]:
    """The outputs of the model and their likelihoods.

    Args:
        gm: a step graph or joint graph.
        report: what :func:`~thor_fx.passes.sites.find_sites` says of it.
        likelihood: None: as the loss is. A name: the heads of that kind or, where the loss shows none,
            the model's output. A callable: the same with a distribution of the user's own.
        loss_scale: what the loss is multiplied by inside of the graph.

    Raises:
        UnknownLossError: the loss is not recognised, and ``likelihood`` is None; or no output is found.
        LikelihoodError: the scale of the loss, or the rows of the output, are not known.
    """
    parts = anatomy(gm)
    seen = list(_recognised(gm, parts))
    if likelihood is None and not seen:
        names = "'categorical', 'bernoulli', 'gaussian'"
        raise UnknownLossError(f"{_not_recognised(gm)}: pass likelihood={names} or a callable")
    wanted = [head for head in seen if likelihood in {None, head.kind}]
    if likelihood is not None and not wanted:
        return (_named(gm, report, likelihood, seen),)
    return tuple(_complete(head, report, parts, loss_scale) for head in wanted)


def _recognised(gm: fx.GraphModule, parts: Anatomy) -> Iterator[Head]:
    """Heads in the order of the graph; what lies below a head is the model, not its loss."""
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    found = [*_categorical_heads(gm, parts), *elementwise_heads(gm, parts)]
    below: set[fx.Node] = set()
    for head in sorted(found, key=lambda head: order[head.cotangent]):
        if head.cotangent not in below:
            below |= downstream([head.cotangent])
            yield head


def _categorical_heads(gm: fx.GraphModule, parts: Anatomy) -> Iterator[Head]:
    for node in gm.graph.nodes:
        if target(node) is aten._log_softmax_backward_data.default:
            start, log_p, axis, _ = arguments(node)
            output = source(log_p) if target(log_p) is aten._log_softmax.default else log_p
        elif target(node) is aten.sub.Tensor and (parsed := _decomposed(node)) is not None:
            start, output, axis = parsed
        else:
            continue
        if parts.is_coefficient(start):
            yield Head("categorical", output, node, axis, OfClasses(start))


def _decomposed(node: fx.Node) -> tuple[fx.Node, fx.Node, int] | None:
    """``g - exp(log_p) sum(g)``: the parts ``g``, ``log_p`` and the axis."""
    start, product = arguments(node)[:2]
    if not isinstance(product, fx.Node) or target(product) is not aten.mul.Tensor:
        return None
    sides: dict[Any, fx.Node] = {target(arg): arg for arg in product.args if isinstance(arg, fx.Node)}
    total, p = sides.get(aten.sum.dim_IntList), sides.get(aten.exp.default)
    if total is None or p is None or source(total) is not start or len(arguments(total)[1]) != 1:
        return None
    return start, source(p), arguments(total)[1][0]


def _complete(head: Head, report: SiteReport, parts: Anatomy, loss_scale: float) -> Head:
    try:
        scale = parts.scale(head.cotangent)
    except LookupError:
        if not head.weights.relative:
            raise LikelihoodError(
                f"the {head.kind} loss is not one scalar of the graph, so its scale is not known: return the "
                "loss as a scalar, or pass likelihood= by name and compute the loss outside of the model"
            ) from None
        scale = None
    return replace(
        head, scale=loss_scale if scale is None else scale, positions=_positions(head.output, report)
    )


# --- a likelihood by name ----------------------------------------------------------------------------


def _named(gm: fx.GraphModule, report: SiteReport, likelihood: Likelihood, seen: list[Head]) -> Head:
    """The model's output with a likelihood that the user names."""
    kind: KindOfHead = "custom" if callable(likelihood) else likelihood
    sampler = likelihood if callable(likelihood) else None
    output, cotangent = _output(gm, report, seen)
    axis = _class_axis(output, report.nearest) if len(shape(output)) > 1 else None
    if axis is None and kind in {"categorical", "custom"}:
        raise LikelihoodError(
            f"likelihood={likelihood!r} needs an output with rows; the model's has shape {shape(output)}"
        )
    curvature = 2.0 if kind == "gaussian" else 1.0  # of the mean over all elements
    weights = Unmasked(cotangent, curvature, elementwise=kind in {"gaussian", "bernoulli"})
    positions = _positions(output, report)
    return Head(kind, output, cotangent, axis, weights, positions=positions, sampler=sampler)


def _output(gm: fx.GraphModule, report: SiteReport, seen: list[Head]) -> tuple[fx.Node, fx.Node]:
    """The model's output and its cotangent."""
    results, given = output_nodes(gm), tangents(gm)
    for index, tangent in given.items():
        output = results.get(Output(index))
        loss_inside = any(shape(other) == () for other in given.values())  # then this one is zero
        if output is not None and not loss_inside:
            return output, tangent
    logits = [head for head in seen if head.kind != "gaussian"]
    if logits:
        return logits[0].output, logits[0].cotangent
    found = None if report.nearest is None else preactivation(gm, report.nearest)
    if found is None:
        raise UnknownLossError(
            f"{_not_recognised(gm)}, and the model's output is not found: compute the loss from logits with "
            "torch.nn.functional.cross_entropy or the like, or train with thor_fx.compile(model)"
        )
    return found


def _class_axis(output: fx.Node, nearest: Site | None) -> int:
    """Where the classes lie: along the features of the layer nearest the loss."""
    sizes = shape(output)
    if nearest is None:
        return -1
    fitting = [axis for axis, size in enumerate(sizes) if axis > 0 and size == nearest.cotangent.features]
    usual = 1 if isinstance(nearest.cotangent, Pixels) else len(sizes) - 1
    return fitting[0] if len(fitting) == 1 else usual


def _positions(output: fx.Node, report: SiteReport) -> Any:
    """Rows per datum, where the rows of all data lie in one axis and that was not so before."""
    dims = len(shape(output))
    if dims > 2:
        return None
    node = output
    while target(node) in CASTS | RESHAPES | PERMUTES and len(shape(node)) == dims:
        node = source(node)
    if (
        len(shape(node)) == dims
        and report.nearest is not None
        and isinstance(report.nearest.activation, Matrix)
    ):
        node, features = report.nearest.activation.node, 1  # the last axis
    else:
        features = dims - 1
    sizes = shape(node)
    rows = sizes[: len(sizes) - features]
    positions = math.prod(rows[1:])
    return positions if len(rows) > 1 and rows[0] * positions == shape(output)[0] else None


def _not_recognised(gm: fx.GraphModule) -> str:
    loss = output_nodes(gm).get(Loss())
    if loss is None and tangents(gm):
        results = output_nodes(gm)
        scalars = [results.get(Output(i)) for i, tangent in tangents(gm).items() if shape(tangent) == ()]
        if not scalars:
            return "the loss is computed outside of the compiled model"
        loss = scalars[0]
    return f"no likelihood is recognised in the loss, {chain(loss, 6)}"
