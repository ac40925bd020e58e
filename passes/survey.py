"""The sites that factors are measured at, under a given estimator.

The empirical Fisher is measured wherever there is a site. The other estimators know the curvature of a
likelihood, so they measure the layers that its output depends on. A layer whose gradient comes from
another part of the loss only (an auxiliary loss) has no curvature there: it takes the first-order rule.
Of a layer with several uses, those that the output depends on count. A user may leave out more.
"""

from dataclasses import replace

from torch import fx

from .heads import Head
from .layout import Rules
from .likelihoods import LikelihoodError, find_heads
from .nodes import downstream
from .scores import sizes
from .sites import SiteReport, find_sites, nearest

ELSEWHERE = "its gradient comes from a part of the loss that the likelihood does not describe"
FILTERED = "layer_filter leaves it out"
MAX_DIRECTIONS = 64
"""The most backward passes that ``fisher="exact"`` adds to a factor step."""


def survey(gm: fx.GraphModule, rules: Rules) -> SiteReport:
    """What :func:`~thor_fx.passes.sites.find_sites` says, as far as the estimator measures it.

    Raises:
        LikelihoodError: the estimator needs a likelihood, and none is known, or it is too large.
    """
    report = find_sites(gm)
    if rules.fisher == "empirical":
        return chosen(report, rules)
    heads = find_heads(gm, report, rules.likelihood, rules.loss_scale)
    if rules.fisher == "exact":
        directions(heads)
    return chosen(replace(_below(gm, report, heads), heads=heads), rules)


def chosen(report: SiteReport, rules: Rules) -> SiteReport:
    """The report without the weights that ``layer_filter`` leaves out; ``n`` is read where it was."""
    if rules.layer_filter is None:
        return report
    left = {site.param for site in report.sites if not rules.layer_filter(site.param)}
    return _without(report, left, FILTERED)


def _below(gm: fx.GraphModule, report: SiteReport, heads: tuple[Head, ...]) -> SiteReport:
    """The report without the sites whose cotangents do not come from the heads'."""
    measured = downstream(head.cotangent for head in heads)
    kept = tuple(site for site in report.sites if not measured.isdisjoint(site.cotangent.nodes))
    lost = set(report.layers) - {site.layer for site in kept}
    params = {site.param for site in report.sites if site.layer in lost}
    rest = _without(replace(report, sites=kept), params, ELSEWHERE)
    return replace(rest, nearest=nearest(gm, list(rest.sites)))


def _without(report: SiteReport, params: set[str], reason: str) -> SiteReport:
    sites = tuple(site for site in report.sites if site.param not in params)
    layers = {site.layer for site in sites}
    reasons = {**report.reasons, **dict.fromkeys(sorted(params), reason)}
    biases = {layer: bias for layer, bias in report.biases.items() if layer in layers}
    return replace(report, sites=sites, reasons=reasons, biases=biases)


def directions(heads: tuple[Head, ...]) -> int:
    """How many backward passes ``fisher="exact"`` takes: one per element of a datum's output.

    Raises:
        LikelihoodError: it cannot be done, or takes too many.
    """
    total = sum(_directions(head) for head in heads)
    if total > MAX_DIRECTIONS:
        shapes = ", ".join(str(tuple(head.output.meta["val"].shape)) for head in heads)
        raise LikelihoodError(
            f"fisher='exact' runs a backward pass per element of one output, {total} for shape {shapes}; "
            f"at most {MAX_DIRECTIONS} are allowed: pass fisher='sampled'"
        )
    return total


def _directions(head: Head) -> int:
    value = head.output.meta["val"]
    if head.kind == "custom":
        raise LikelihoodError(
            "fisher='exact' needs the likelihood by name: a callable only draws, so pass fisher='sampled'"
        )
    positions, features = sizes(head, value)
    if not isinstance(positions, int) or not isinstance(features, int):
        raise LikelihoodError(
            f"fisher='exact' needs an output of a fixed size, and the positions of {tuple(value.shape)} "
            "change: pass fisher='sampled'"
        )
    return positions * features
