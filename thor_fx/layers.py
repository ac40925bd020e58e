"""What outlives the graph about every parameter: its layer, or why it has none."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from .passes.layout import Layout, Rules, Use, arrange, layer_of, transposed
from .passes.reindex import Path, Permute
from .passes.sides import Side, join
from .passes.sites import UNUSED, VECTORS, SiteReport
from .passes.survey import FILTERED


@dataclass(frozen=True)
class Sums:
    """What a factor step returns for the uses of ``W``, or for those of ``W.T``, of one layer.

    Attributes:
        name: in the descriptors.
        input: what is kept of ``sum_r a_r a_r^T``.
        output: what is kept of ``sum_r g_r g_r^T``.
        rows: the shape of ``R``: (), or (E,) where every group has its own.
        count: ``R`` of one group as traced; 0 where it is symbolic.
        flipped: whether these are the uses of the transpose.
    """

    name: str
    input: Side
    output: Side
    rows: tuple[int, ...]
    flipped: bool
    count: int = field(default=0, compare=False)


def turned_name(use: str) -> str:
    """What sums are called when matrix and transpose change their roles."""
    layer = layer_of(use)
    return transposed(layer) if use == layer else layer


@dataclass(frozen=True)
class Layer:
    """One preconditioned weight, or a part of one.

    Attributes:
        name: the parameter's name, with ``[start:stop]`` where the layer is a part of it.
        param: the parameter's name.
        input: the side of ``A``.
        output: the side of ``G``.
        path: where the ``(out, in)`` matrix, or the ``(E, out, in)`` matrices, lie in the parameter.
        sums: what is measured of it.
        uses: how many sites share the weight.
        rows: rows of all uses as read from the traced graph; a text where the size is symbolic.
        kind: the kind of operation that uses the weight.
        bias: the parameter that is the last column of the matrix, or None.
        bias_path: where that column lies in it.
        sharing: ``"expand"`` or ``"reduce"``.
        notes: why the layer is not treated better.
        line: the line of Python that uses the weight.
    """

    name: str
    param: str
    input: Side
    output: Side
    path: Path
    sums: tuple[Sums, ...]
    uses: int = field(compare=False)
    rows: str = field(compare=False)
    kind: str = "linear"
    bias: str | None = None
    bias_path: Path = ()
    sharing: str = "expand"
    notes: tuple[str, ...] = ()
    line: str = field(default="", compare=False)

    @property
    def out(self) -> int:
        """The length of the output side; of every group."""
        return self.output.dim

    @property
    def in_(self) -> int:
        """The length of the input side; of every group."""
        return self.input.dim

    @property
    def groups(self) -> int:
        """E, the number of factor pairs."""
        return self.input.groups

    @property
    def measured(self) -> list[Side]:
        """The sides of the factors that a factor step returns."""
        return [side for sums in self.sums for side in (sums.input, sums.output)]

    @property
    def both_ways(self) -> bool:
        """Whether some uses are of the matrix and some of its transpose."""
        return len(self.sums) > 1

    @property
    def params(self) -> tuple[str, ...]:
        """The parameters that the layer preconditions."""
        return (self.param,) if self.bias is None else (self.param, self.bias)

    def without_bias(self) -> "Layer":
        """The layer of the weight alone."""
        if self.bias is None:
            return self
        input_ = replace(self.input, dim=self.input.dim - 1, joint=False)
        return replace(self, input=input_, bias=None, bias_path=())

    def turned(self) -> "Layer":
        """The same layer as one of the transposed matrix; its uses are of the other kind then."""
        plain = self.without_bias()
        path = (*self.path, Permute((0, 2, 1) if self.groups > 1 else (1, 0)))
        sums = tuple(replace(s, name=turned_name(s.name), flipped=not s.flipped) for s in self.sums)
        return replace(plain, input=plain.output, output=plain.input, path=path, sums=sums)

    def merge(self, other: "Layer") -> "Layer":
        """The layer with the uses of the same matrix in another graph."""
        one, two = (self, other) if self.bias == other.bias else (self.without_bias(), other.without_bias())
        sums = {s.name: s for layer in (one, two) for s in layer.sums}
        flipped = len({s.flipped for s in sums.values()}) > 1
        one, two = (one.without_bias(), two.without_bias()) if flipped else (one, two)
        return replace(
            one,
            input=join([one.input, two.input]),
            output=join([one.output, two.output]),
            sums=tuple(sums.values()),
            uses=max(one.uses, len(sums)),
        )


class CoverageError(ValueError):
    """A weight has no Kronecker pair although all must have one."""


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
        return self.preconditioned | {*self.norms, *self.fallback}

    @property
    def preconditioned(self) -> frozenset[str]:
        """The parameters that belong to a layer."""
        return frozenset(name for layer in self.layers.values() for name in layer.params)

    @property
    def plain_sums(self) -> frozenset[str]:
        """The names of sums whose cotangents are not squared."""
        every = (sums for layer in self.layers.values() for sums in layer.sums)
        return frozenset(sums.name for sums in every if sums.output.kind == "mean")

    def check(self, dims: Mapping[str, int]) -> None:
        """Refuse a coverage in which a weight takes the first-order rule and nobody asked for that.

        Args:
            dims: the number of axes of every parameter; vectors are no weights.

        Raises:
            CoverageError: naming every such weight, and why.
        """
        weights = {n: why for n, why in self.fallback.items() if dims[n] >= 2}
        missing = {n: why for n, why in weights.items() if why != FILTERED and not why.startswith(VECTORS)}
        if missing:
            reasons = "\n".join(f"  {name}: {why}" for name, why in missing.items())
            raise CoverageError(
                f"strict=True, but {len(missing)} weights have no Kronecker pair; leave strict out to train "
                f"them with the first-order rule:\n{reasons}"
            )

    def restrict(self, names: frozenset[str]) -> "Coverage":
        """The part of the coverage that speaks of these parameters."""
        parted = {
            layer.bias: "its weight is in another group of parameters"
            for layer in self.layers.values()
            if layer.bias in names and layer.param not in names
        }
        return Coverage(
            {
                key: layer if layer.bias in names else layer.without_bias()
                for key, layer in self.layers.items()
                if layer.param in names
            },
            tuple(name for name in self.norms if name in names),
            {**{name: reason for name, reason in self.fallback.items() if name in names}, **parted},
            self.terms,
            tuple(name for name in self.unused if name in names),
            tuple(name for name in self.frozen if name in names),
        )

    def merge(self, other: "Coverage") -> "Coverage":
        """The coverage of two graphs of one model; a weight with a site anywhere is preconditioned.

        Of two reasons for a fallback the first stays: graphs that differ in no more are no news to an update.
        """
        layers = dict(self.layers)
        for name, layer in other.layers.items():
            layers[name] = layers[name].merge(layer) if name in layers else layer
        norms = tuple(dict.fromkeys((*self.norms, *other.norms)))
        covered = {*norms, *(name for layer in layers.values() for name in layer.params)}
        first = {**self.fallback, **{n: why for n, why in other.fallback.items() if n not in self.fallback}}
        fallback = {n: why for n, why in first.items() if n not in covered}
        used = covered | set(fallback)
        unused = tuple(n for n in dict.fromkeys((*self.unused, *other.unused)) if n not in used)
        return Coverage(layers, norms, fallback, other.terms or self.terms, unused, self.frozen)


def coverage(
    report: SiteReport,
    rules: Rules = Rules(),  # noqa: B008 - frozen
    frozen: tuple[str, ...] = (),
) -> Coverage:
    """The coverage that a walk over a step graph found."""
    layers = {name: _layer(layout) for name, layout in arrange(report, rules).items()}
    joint = {layer.bias for layer in layers.values()}
    fallback = {n: why for n, why in report.reasons.items() if why != UNUSED and n not in joint}
    unused = tuple(name for name, reason in report.reasons.items() if reason == UNUSED)
    terms = None if report.nearest is None else report.nearest.layer
    return Coverage(layers, report.norms, fallback, terms, unused, frozen)


def _layer(layout: Layout) -> Layer:
    sites = [site for use in layout.uses for site in use.sites]
    return Layer(
        name=layout.layer,
        param=layout.param,
        input=layout.input,
        output=layout.output,
        path=layout.path,
        sums=tuple(_sums(use, use.name != layout.layer) for use in layout.uses),
        uses=len(sites),
        rows=" + ".join(str(operand.rows) for use in layout.uses for operand in use.activations),
        kind=layout.kind,
        bias=None if layout.bias is None else layout.bias.param,
        bias_path=() if layout.bias is None else layout.bias.path,
        sharing=layout.sharing,
        notes=layout.notes,
        line=layout.line,
    )


def _sums(use: Use, flipped: bool) -> Sums:
    counts = [operand.rows for operand in use.activations]
    count = sum(counts) if all(isinstance(c, int) for c in counts) else 0
    rows = (use.input.groups,) if use.ragged else ()
    return Sums(use.name, use.input, use.output, rows, flipped, count)
