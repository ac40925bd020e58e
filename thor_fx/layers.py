"""What outlives the graph about every parameter: its layer, or why it has none."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from .passes.reindex import Path
from .passes.sites import UNUSED, SiteReport


@dataclass(frozen=True)
class Layer:
    """One preconditioned weight, or a part of one.

    Attributes:
        name: the parameter's name, with ``[start:stop]`` where the layer is a part of it.
        param: the parameter's name.
        out: side of ``G``.
        in_: side of ``A``.
        path: where the ``(out, in)`` matrix lies inside the parameter.
        uses: how many sites share the weight.
        both_ways: whether some uses are of the matrix and some of its transpose.
        rows: rows of all uses as read from the traced graph; a text where the size is symbolic.
    """

    name: str
    param: str
    out: int
    in_: int
    path: Path
    uses: int
    both_ways: bool
    rows: str = field(compare=False)
    kind: str = "linear"


@dataclass(frozen=True)
class Coverage:
    """Every parameter, in exactly one place.

    Attributes:
        layers: what is preconditioned with a Kronecker pair, by layer name.
        norms: scales and shifts of normalisation layers: the elementwise rule.
        fallback: everything else and why: the first-order rule.
        terms: where the number of loss terms ``n`` is read: a layer name, or None without layers.
        unused: parameters that the loss does not depend on; they are never touched.
        frozen: parameters that are not trained.
    """

    layers: Mapping[str, Layer]
    norms: tuple[str, ...]
    fallback: Mapping[str, str]
    terms: str | None = None
    unused: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()

    @property
    def trained(self) -> frozenset[str]:
        """The parameters that a step updates."""
        return frozenset(layer.param for layer in self.layers.values()) | {*self.norms, *self.fallback}

    def restrict(self, names: frozenset[str]) -> "Coverage":
        """The part of the coverage that speaks of these parameters."""
        return Coverage(
            {key: layer for key, layer in self.layers.items() if layer.param in names},
            tuple(name for name in self.norms if name in names),
            {name: reason for name, reason in self.fallback.items() if name in names},
            self.terms,
            tuple(name for name in self.unused if name in names),
            tuple(name for name in self.frozen if name in names),
        )

    def merge(self, other: "Coverage") -> "Coverage":
        """The coverage of two graphs of one model; a weight with a site anywhere is preconditioned."""
        layers = {**self.layers, **other.layers}
        norms = tuple(dict.fromkeys((*self.norms, *other.norms)))
        covered = {*norms, *(layer.param for layer in layers.values())}
        fallback = {n: why for n, why in {**self.fallback, **other.fallback}.items() if n not in covered}
        used = covered | set(fallback)
        unused = tuple(n for n in dict.fromkeys((*self.unused, *other.unused)) if n not in used)
        return Coverage(layers, norms, fallback, other.terms or self.terms, unused, self.frozen)


def coverage(report: SiteReport, frozen: tuple[str, ...] = ()) -> Coverage:
    """The coverage that a walk over a step graph found."""
    layers = {}
    for name, sites in report.layers.items():
        (out, in_), first = sites[0].dims, sites[0]
        rows = " + ".join(str(site.activation.rows) for site in sites)
        both_ways = any(site.flipped for site in sites)
        layers[name] = Layer(name, first.param, out, in_, first.path, len(sites), both_ways, rows)
    terms = None if report.nearest is None else report.nearest.layer
    fallback = {name: reason for name, reason in report.reasons.items() if reason != UNUSED}
    unused = tuple(name for name, reason in report.reasons.items() if reason == UNUSED)
    return Coverage(layers, report.norms, fallback, terms, unused, frozen)
