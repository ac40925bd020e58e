"""Models drawn from a grammar of layers, and what they compute by hooks.

A model is written down as a tuple of layers, each a tuple of a name and what its builder takes, so that a
failure prints as something that can be put into a test:

>>> model = build_drawn(Drawn("flat", (4,), (("linear", 4, 3, True, "einsum"), ("act", "tanh")), 3))

Activations are *flat* (batch, d), a *sequence* (batch, length, d) or, with the batch as the second axis, a
sequence all the same, or an *image* (batch, channels, height, width). Every model ends in a head, whose rows
are the terms of the loss.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Layer = tuple[Any, ...]
Shape = tuple[int, ...]
ROWS, VOCABULARY = 5, 7


class Drawn(NamedTuple):
    """A model on paper.

    Attributes:
        start: "flat", "sequence", "tokens" or "image".
        shape: of one example (of tokens: their number, and the width of the table).
        layers: as in :data:`LAYERS`.
        classes: outputs of the head.
        loss: one of :data:`LOSSES`.
        reduction: "mean" or "sum", of the loss over its terms.
        extra: whether a second loss, of the features, is added.
        head: how the head is spelled.
    """

    start: str
    shape: Shape
    layers: tuple[Layer, ...]
    classes: int
    loss: str = "cross_entropy"
    reduction: str = "mean"
    extra: bool = False
    head: str = "linear"


# --- layers ----------------------------------------------------------------------------------------------


def _per_row(x: Tensor, w: Tensor) -> Tensor:
    return torch.stack([F.linear(row, w) for row in x])


def _in_halves(x: Tensor, w: Tensor) -> Tensor:
    return torch.cat([F.linear(part, w) for part in x.chunk(2)])


def _by_batches(x: Tensor, w: Tensor) -> Tensor:
    rows = x if x.dim() == 3 else x[:, None]
    return torch.bmm(rows, w.T.expand(len(x), -1, -1)).reshape(*x.shape[:-1], len(w))


SPELLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": F.linear,
    "matmul": lambda x, w: x @ w.T,
    "turned": lambda x, w: (w @ x.mT).mT,
    "einsum": lambda x, w: torch.einsum("...i,oi->...o", x, w),
    "flattened": lambda x, w: F.linear(x.flatten(0, -2), w).reshape(*x.shape[:-1], len(w)),
    "tensordot": lambda x, w: torch.tensordot(x, w, dims=([-1], [1])),
    "per row": _per_row,
    "in halves": _in_halves,
    "by batches": _by_batches,
    "broadcast": lambda x, w: (x[..., None, :] @ w.T)[..., 0, :],
}


class Spelled(nn.Linear):
    """A linear layer in other words."""

    def __init__(self, in_: int, out: int, bias: bool, spelling: str) -> None:
        super().__init__(in_, out, bias)
        self.spelling = spelling

    def forward(self, x: Tensor) -> Tensor:
        s = SPELLINGS[self.spelling](x, self.weight)
        return s if self.bias is None else s + self.bias


class Conv1D(nn.Module):
    """A linear layer whose weight is stored as (in, out); hooks know it by this name."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "sin": torch.sin,
    "gelu": F.gelu,
    "silu": F.silu,
    "softplus": F.softplus,
    "square": lambda x: 0.5 * x * x,
    "scaled": lambda x: 0.7 * x + 0.1,
    "relu": F.relu,
    "softmax": lambda x: x.softmax(-1),
}
DRAWN_ACTIVATIONS = sorted(ACTIVATIONS.keys() - {"softplus"})
"""Without the one whose strides torch does not foresee: test_drawn_graphs.py."""


class Act(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.name](x)


class Again(nn.Module):
    """A module that has been used before; it is registered there only."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._call = [module]

    def forward(self, x: Tensor) -> Tensor:
        return self._call[0](x).tanh()


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Gate(nn.Module):
    """Two layers that read the same rows."""

    def __init__(self, d: int, out: int) -> None:
        super().__init__()
        self.gate, self.rise = nn.Linear(d, out, bias=False), nn.Linear(d, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x).sigmoid() * self.rise(x)


class Recomputed(nn.Module):
    """A checkpointed segment; hooks run it plainly."""

    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant, self.plainly = inner, reentrant, False

    def forward(self, x: Tensor) -> Tensor:
        if self.plainly:
            return self.inner(x)
        # torch's own: eager reentrant segments of an input without a gradient leave their weights without one
        return checkpoint(self.inner, x, use_reentrant=self.reentrant and x.requires_grad)


class Branch(nn.Module):
    """One of two layers, by a flag that no datum changes."""

    def __init__(self, inner: nn.Module, other: nn.Module, flag: bool) -> None:
        super().__init__()
        self.flag, self.taken, self.idle = flag, inner, other

    def forward(self, x: Tensor) -> Tensor:
        return self.taken(x) if self.flag else self.taken(-x)


class Part(nn.Module):
    """A layer of some of the features, or of some of the rows."""

    def __init__(self, d: int, axis: int) -> None:
        super().__init__()
        self.axis, self.at = axis, 1 if axis == 0 else d - d // 2
        self.inner = nn.Linear(d, d) if axis == 0 else nn.Linear(d // 2, d // 2)

    def forward(self, x: Tensor) -> Tensor:
        kept, rest = x.tensor_split([self.at], self.axis)
        return torch.cat([kept, self.inner(rest)], self.axis)


class Attention(nn.Module):
    """Queries, keys and values from one layer."""

    def __init__(self, d: int, heads: int, causal: bool, fused: bool) -> None:
        super().__init__()
        self.mix, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d, bias=causal)
        self.heads, self.causal, self.fused = heads, causal, fused

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.mix(x).chunk(3, -1))
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        else:
            scores = q @ k.mT
            if self.causal:
                above = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
                scores = scores.masked_fill(above, -torch.inf)
            mixed = scores.softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).flatten(-2))


class Recurrent(nn.Module):
    """A loop over positions, whose layers are used once in each."""

    def __init__(self, d: int, hidden: int, gated: bool) -> None:
        super().__init__()
        self.inp, self.rec = nn.Linear(d, hidden), nn.Linear(hidden, hidden, bias=False)
        self.keep = nn.Linear(hidden, hidden) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], self.rec.in_features)
        found = []
        for at in x.unbind(1):
            new = (self.inp(at) + self.rec(h)).tanh()
            h = new if self.keep is None else h + self.keep(h).sigmoid() * (new - h)
            found.append(h)
        return torch.stack(found, 1)


class Moved(nn.Module):
    """A module between two transpositions."""

    def __init__(self, inner: nn.Module, one: int, other: int) -> None:
        super().__init__()
        self.inner, self.axes = inner, (one, other)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(*self.axes)).transpose(*self.axes)


class Reshape(nn.Module):
    """What changes the kind of an activation and has no weight."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return RESHAPES[self.how](x)


RESHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "swap": lambda x: x.transpose(0, 1),
    "rows": lambda x: x.flatten(0, 1),
    "mean": lambda x: x.mean(1),
    "last": lambda x: x[:, -1],
    "join": lambda x: x.flatten(1),
    "patches": lambda x: x.flatten(2).transpose(1, 2),
    "channels": lambda x: x.mean((2, 3)),
    "pool": lambda x: F.avg_pool2d(x, 2),
    "largest": lambda x: F.max_pool2d(x, 2),
    "pair": lambda x: torch.stack([x, x.flip(-1)], 1),
}


class Image(nn.Module):
    """A convolution over positions, (batch, length, d)."""

    def __init__(self, conv: nn.Conv1d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.mT).mT


class _Builder:
    """Builds layers in order, so that later ones can use what earlier ones have."""

    def __init__(self) -> None:
        self.linears: list[nn.Linear] = []

    def all(self, layers: tuple[Layer, ...]) -> nn.Module:
        return nn.Sequential(*(self.one(*layer) for layer in layers))

    def one(self, name: str, *arguments: Any) -> nn.Module:
        return getattr(self, name)(*arguments)

    def linear(self, in_: int, out: int, bias: bool, spelling: str) -> nn.Module:
        plain = spelling == "linear"
        self.linears.append(nn.Linear(in_, out, bias) if plain else Spelled(in_, out, bias, spelling))
        return self.linears[-1]

    def frozen(self, in_: int, out: int, part: str) -> nn.Module:
        layer = nn.Linear(in_, out)
        for name, p in layer.named_parameters():
            p.requires_grad_(part not in {name, "both"})
        return layer

    def again(self, which: int) -> nn.Module:
        return Again(self.linears[which])

    def tied(self, which: int, spelling: str) -> nn.Module:
        first = self.linears[which]
        layer = Spelled(first.in_features, first.out_features, True, spelling)
        layer.weight = first.weight
        return layer

    def turned(self, which: int) -> nn.Module:
        return Conv1D(self.linears[which].weight)

    act, gate, part, attention, recurrent, reshape = Act, Gate, Part, Attention, Recurrent, Reshape

    def residual(self, layers: tuple[Layer, ...]) -> nn.Module:
        return Residual(self.all(layers))

    def recomputed(self, layers: tuple[Layer, ...], reentrant: bool) -> nn.Module:
        return Recomputed(self.all(layers), reentrant)

    def branch(self, layers: tuple[Layer, ...], flag: bool) -> nn.Module:
        return Branch(self.all(layers), nn.Linear(2, 2), flag)

    def moved(self, layers: tuple[Layer, ...], one: int, other: int) -> nn.Module:
        return Moved(self.all(layers), one, other)

    def norm(self, kind: str, d: int, affine: bool) -> nn.Module:
        return {
            "layer": lambda: nn.LayerNorm(d, elementwise_affine=affine),
            "rms": lambda: nn.RMSNorm(d, elementwise_affine=affine),
            "group": lambda: nn.GroupNorm(1, d, affine=affine),
            "batch": lambda: nn.BatchNorm2d(d, affine=affine, track_running_stats=False),
        }[kind]()

    def conv(self, in_: int, out: int, kernel: tuple[int, ...], how: tuple[Any, ...]) -> nn.Module:
        """``how``: stride, padding, dilation, groups, bias, padding mode."""
        stride, padding, dilation, groups, bias, mode = how
        kinds = {1: nn.Conv1d, 2: nn.Conv2d}
        conv = kinds[len(kernel)](in_, out, kernel, stride, padding, dilation, groups, bias, mode)
        return Image(conv) if len(kernel) == 1 else conv


LOSSES = ("cross_entropy", "mse", "bce")


class Whole(nn.Module):
    """A drawn model; ``forward`` returns scores (terms, classes) and features."""

    def __init__(self, drawn: Drawn, width: int) -> None:
        super().__init__()
        builder = _Builder()
        tokens = drawn.start == "tokens"
        self.table = nn.Embedding(VOCABULARY, drawn.shape[-1]) if tokens else None
        self.body = builder.all(drawn.layers)
        self.head = builder.linear(width, drawn.classes, True, drawn.head)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x if self.table is None else self.table(x))
        return self.head(h).flatten(0, -2), h


def build_drawn(drawn: Drawn, plainly: bool = False) -> Whole:
    """The model, the same one in every call; ``plainly``: nothing is checkpointed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = Whole(drawn, _walk(drawn)[-1]).double()
    for part in model.modules():
        if isinstance(part, Recomputed):
            part.plainly = plainly
    return model


def inputs_of(drawn: Drawn, seed: int = 0, rows: int = ROWS) -> Tensor:
    """A batch."""
    generator = torch.Generator().manual_seed(seed)
    if drawn.start == "tokens":
        return torch.randint(VOCABULARY, (rows, drawn.shape[0]), generator=generator)
    return torch.randn(rows, *drawn.shape, generator=generator, dtype=torch.float64)


def loss_of(drawn: Drawn, scores: Tensor, features: Tensor) -> Tensor:
    """A loss whose terms are the rows of the scores; their labels depend on nothing."""
    terms, classes = scores.shape
    if drawn.loss == "cross_entropy":
        loss = F.cross_entropy(scores, torch.arange(terms) % classes, reduction=drawn.reduction)
    elif drawn.loss == "mse":
        loss = (scores - 0.3).square().sum(-1)
        loss = loss.mean() if drawn.reduction == "mean" else loss.sum()
    else:
        target = (torch.arange(terms * classes) % 2).view(terms, classes).double()
        loss = F.binary_cross_entropy_with_logits(scores, target, reduction="none").sum(-1)
        loss = loss.mean() if drawn.reduction == "mean" else loss.sum()
    return loss + 0.1 * features.square().mean() if drawn.extra else loss


def told(drawn: Drawn, terms: int) -> dict[str, Any]:
    """What has to be said of a loss that cannot be read off the graph.

    A sum over terms is so many times their mean; where a second loss is added, or rows of the head are apart,
    the rows of the site nearest the loss are not the terms.
    """
    if drawn.reduction == "sum":
        return {"batch_size": terms, "loss_scale": float(terms)}
    return {"batch_size": terms} if drawn.extra or drawn.head in {"per row", "in halves"} else {}


def _walk(drawn: Drawn) -> Shape:
    """The shape of what the head sees, without running the model."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        x = inputs_of(drawn, rows=ROWS)
        if drawn.start == "tokens":
            x = torch.zeros(*x.shape, drawn.shape[-1], dtype=torch.float64)
        return tuple(_Builder().all(drawn.layers).double()(x).shape)


# --- drawing ---------------------------------------------------------------------------------------------

WIDTHS = st.integers(1, 6)


@st.composite
def drawn_models(draw: st.DrawFn, depth: int = 5) -> Drawn:
    """Any model of up to ``depth`` layers and a head."""
    start = draw(st.sampled_from(["flat", "sequence", "tokens", "image"]))
    if start == "flat":
        example: Shape = (draw(WIDTHS),)
    elif start == "image":
        example = (draw(st.integers(1, 4)), draw(st.integers(3, 6)), draw(st.integers(3, 6)))
    else:
        example = (draw(st.integers(1, 4)), draw(WIDTHS))
    layers, shape = draw(_several((ROWS, *example), depth, []))
    if len(shape) == 4:
        how = draw(st.sampled_from(["patches", "channels", "join"]))
        layers, shape = (*layers, ("reshape", how)), _reshaped(shape, how)
    return Drawn(
        start,
        example,
        layers,
        classes=draw(st.integers(2, 4)),
        loss=draw(st.sampled_from(LOSSES)),
        reduction=draw(st.sampled_from(["mean", "mean", "sum"])),
        extra=draw(st.integers(0, 4)) == 4,
        head=draw(_spelling(shape[-1])),
    )


def _spelling(d: int) -> st.SearchStrategy[str]:
    """Of a layer of ``d`` inputs. Of an einsum over one input, torch makes no product of matrices."""
    return st.sampled_from([name for name in SPELLINGS if d > 1 or name != "einsum"])


Known = list[tuple[int, int]]
"""The sizes (in, out) of the linear layers so far, in the order of the builder."""


@st.composite
def _several(draw: st.DrawFn, shape: Shape, depth: int, known: Known) -> tuple[tuple[Layer, ...], Shape]:
    layers: list[Layer] = []
    for _ in range(draw(st.integers(0, depth))):
        layer, shape = draw(_one(shape, known))
        layers.append(layer)
    return tuple(layers), shape


@st.composite
def _one(draw: st.DrawFn, shape: Shape, known: Known) -> tuple[Layer, Shape]:
    if len(shape) == 4:
        return draw(_of_image(shape))
    names = ["linear", "linear", "act", "norm", "gate", "frozen", "inside", "inside"]
    fits = [i for i, (in_, _) in enumerate(known) if in_ == shape[-1]]
    turns = [i for i, (_, out) in enumerate(known) if out == shape[-1]]
    names += ["again", "tied"] * bool(fits) + ["turned"] * bool(turns)
    names += ["part"] * (shape[-1] > 1 and shape[0] > 1)
    names += ["attention", "recurrent", "conv", "reshape"] if len(shape) == 3 else ["pair"]
    name, d = draw(st.sampled_from(names)), shape[-1]
    if name == "linear":
        out = draw(WIDTHS)
        known.append((d, out))
        return ("linear", d, out, draw(st.booleans()), draw(_spelling(d))), (*shape[:-1], out)
    if name == "act":
        return ("act", draw(st.sampled_from(DRAWN_ACTIVATIONS))), shape
    if name == "norm":
        return ("norm", draw(st.sampled_from(["layer", "rms"])), d, draw(st.booleans())), shape
    if name == "gate":
        out = draw(WIDTHS)
        return ("gate", d, out), (*shape[:-1], out)
    if name == "frozen":
        out = draw(WIDTHS)
        return ("frozen", d, out, draw(st.sampled_from(["weight", "bias", "both"]))), (*shape[:-1], out)
    if name == "inside":
        return draw(_inside(shape, known)), shape
    if name == "again":
        which = draw(st.sampled_from(fits))
        return ("again", which), (*shape[:-1], known[which][1])
    if name == "tied":
        which = draw(st.sampled_from(fits))
        return ("tied", which, draw(_spelling(d))), (*shape[:-1], known[which][1])
    if name == "turned":
        which = draw(st.sampled_from(turns))
        return ("turned", which), (*shape[:-1], known[which][0])
    if name == "part":
        return ("part", d, draw(st.sampled_from([0, -1]))), shape
    if name == "pair":
        return ("reshape", "pair"), (shape[0], 2, d)
    return draw(_of_sequence(name, shape))


@st.composite
def _inside(draw: st.DrawFn, shape: Shape, known: Known) -> Layer:
    """Layers that keep the shape, inside something."""
    d = shape[-1]
    inner: list[Layer] = []
    for _ in range(draw(st.integers(1, 2))):
        spelling, bias = draw(_spelling(d)), draw(st.booleans())
        known.append((d, d))
        inner += [("linear", d, d, bias, spelling), ("act", draw(st.sampled_from(DRAWN_ACTIVATIONS)))]
    how = draw(st.sampled_from(["residual", "recomputed", "branch", "moved"]))
    if how == "residual":
        return "residual", tuple(inner)
    if how == "moved" and len(shape) == 3:
        return "moved", tuple(inner), 0, 1
    return ("recomputed" if how == "moved" else how), tuple(inner), draw(st.booleans())


@st.composite
def _of_sequence(draw: st.DrawFn, name: str, shape: Shape) -> tuple[Layer, Shape]:
    batch, length, d = shape
    if name == "attention":
        heads = draw(st.sampled_from([h for h in (1, 2, 3) if d % h == 0]))
        return ("attention", d, heads, draw(st.booleans()), draw(st.booleans())), shape
    if name == "recurrent":
        hidden = draw(WIDTHS)
        return ("recurrent", d, hidden, draw(st.booleans())), (batch, length, hidden)
    if name == "conv":
        return draw(_convolution(shape, (length,)))
    how = draw(st.sampled_from(["swap", "rows", "mean", "last", "join"]))
    return ("reshape", how), _reshaped(shape, how)


@st.composite
def _of_image(draw: st.DrawFn, shape: Shape) -> tuple[Layer, Shape]:
    name = draw(st.sampled_from(["conv", "conv", "act", "norm", "reshape"]))
    if name == "conv":
        return draw(_convolution(shape, shape[2:]))
    if name == "act":
        return ("act", draw(st.sampled_from(DRAWN_ACTIVATIONS))), shape
    if name == "norm":
        return ("norm", draw(st.sampled_from(["group", "batch"])), shape[1], draw(st.booleans())), shape
    pools = ["pool", "largest"] if min(shape[2:]) >= 2 else []
    how = draw(st.sampled_from(["patches", "channels", "join", *pools]))
    return ("reshape", how), _reshaped(shape, how)


@st.composite
def _convolution(draw: st.DrawFn, shape: Shape, sizes: Shape) -> tuple[Layer, Shape]:
    channels = shape[1] if len(shape) == 4 else shape[2]
    groups = draw(st.sampled_from([g for g in (1, 1, 2, channels) if channels % g == 0]))
    out = groups * draw(st.integers(1, 3))
    mode = draw(st.sampled_from(["zeros", "zeros", "zeros", "circular", "reflect", "replicate"]))
    padding = draw(st.sampled_from(["same", "valid", 0, 1])) if mode == "zeros" else min(1, min(sizes) - 1)
    kernel, dilation, stride = (tuple(draw(st.integers(1, most)) for _ in sizes) for most in (3, 2, 2))
    added = padding if isinstance(padding, int) else 0
    if padding == "same":
        stride = tuple(1 for _ in sizes)
    else:  # the window has to fit
        fits = [(k - 1) * g < s + 2 * added for s, k, g in zip(sizes, kernel, dilation, strict=True)]
        dilation = tuple(g if fit else 1 for g, fit in zip(dilation, fits, strict=True))
        kernel = tuple(min(k, s + 2 * added) for s, k in zip(sizes, kernel, strict=True))
    after = sizes
    if padding != "same":
        after = tuple(
            (s + 2 * added - (k - 1) * g - 1) // by + 1
            for s, k, g, by in zip(sizes, kernel, dilation, stride, strict=True)
        )
    layer = "conv", channels, out, kernel, (stride, padding, dilation, groups, draw(st.booleans()), mode)
    return layer, (shape[0], out, *after) if len(shape) == 4 else (shape[0], *after, out)


def _reshaped(shape: Shape, how: str) -> Shape:
    return tuple(RESHAPES[how](torch.empty(shape, device="meta")).shape)
