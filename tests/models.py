"""Tiny models and loss functions, one for every way in which a weight is used.

A :class:`Case` is built by a function of the dtype, with fixed seeds: ``linear(torch.float32)``.
``BUILDERS`` lists all of them. Sizes within a case differ, so that a swapped axis cannot go unnoticed.

``forward`` spells a case out by hand and shows every use of a weight to ``tap``; ``loss_fn`` is the
same computation as users write it, with modules where they would. :mod:`oracle` reads the taps.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

Params = Mapping[str, Tensor]
Tap = Callable[[str, Tensor, Tensor], Tensor]
"""``tap(layer, activation, preactivation)``, (..., in) and (..., out); returns the pre-activation.

Uses of the transpose of a layer's matrix, beside others of the matrix itself, are taps of ``layer.T``.
"""


@dataclass(frozen=True)
class Case:
    """A loss function with arguments, and what the passes have to find in it.

    Attributes:
        name: that of the function that builds it.
        loss_fn: ``loss_fn(params, *batch)``, as users write it.
        forward: ``forward(tap, params, *batch)``, the same loss, written out.
        params: by name.
        batch: further arguments.
        layers: ``(out, in)`` by name of layer.
        terms: ``n``, the terms that the loss averages over.
        nearest: the layer nearest the loss.
        kinds: the kind of operation of every layer that is no plain product.
        groups: how many matrices a layer consists of, where that is more than one.
        norms: scales and shifts of normalisation layers.
        reasons: a pattern of the reason for every parameter that has no site.
        random: whether the loss draws random numbers.
    """

    name: str
    loss_fn: Callable[..., Any]
    forward: Callable[..., Tensor]
    params: dict[str, Tensor]
    batch: tuple[Tensor, ...]
    layers: dict[str, tuple[int, int]]
    terms: int
    nearest: str | None
    kinds: dict[str, str] = field(default_factory=dict)
    groups: dict[str, int] = field(default_factory=dict)
    norms: tuple[str, ...] = ()
    reasons: dict[str, str] = field(default_factory=dict)
    random: bool = False


Build = Callable[..., Case]
BIAS = r"its gradient is (view <- |_to_copy <- )*sum <- "
DOUBLE = torch.float64


def no_tap(_layer: str, _activation: Tensor, preactivation: Tensor) -> Tensor:
    return preactivation


def untapped(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The loss function of a case that users, too, write by hand."""

    def loss_fn(params, *batch):
        return forward(no_tap, params, *batch)

    return loss_fn


def of_module(module: nn.Module, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``loss(module's output, *targets)``, where the batch is the module's input and the targets."""

    def loss_fn(params, x, *targets):
        return loss(functional_call(module, dict(params), (x,)), *targets)

    return loss_fn


def random(seed: int, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype)


def labels(seed: int, classes: int, *shape: int) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def weights(dtype: torch.dtype, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: random(100 + i, dtype, *shape) / 2 for i, (name, shape) in enumerate(shapes.items())}


def params_of(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The parameters of a module, with values that do not depend on torch's initialisers."""
    module.to(dtype)
    return {
        name: nn.Parameter(random(200 + i, dtype, *p.shape) / 2)
        for i, (name, p) in enumerate(module.named_parameters())
    }


def dense(tap: Tap, params: Params, name: str, x: Tensor) -> Tensor:
    """An ``nn.Linear``, written out."""
    s = tap(f"{name}.weight", x, x @ params[f"{name}.weight"].mT)
    return s + params[f"{name}.bias"] if f"{name}.bias" in params else s


# --- one weight, many spellings --------------------------------------------------------------------


def linear(dtype: torch.dtype = DOUBLE) -> Case:
    model = nn.Linear(4, 3)

    def forward(tap, p, x, y):
        return F.cross_entropy(tap("weight", x, x @ p["weight"].mT) + p["bias"], y)

    batch = random(1, dtype, 6, 4), labels(2, 3, 6)
    return Case(
        "linear",
        of_module(model, F.cross_entropy),
        forward,
        params_of(model, dtype),
        batch,
        layers={"weight": (3, 4)},
        terms=6,
        nearest="weight",
        reasons={"bias": BIAS},
    )


def f_linear(dtype: torch.dtype = DOUBLE) -> Case:
    def forward(tap, p, x, y):
        s = tap("w", x, F.linear(x, p["w"]))
        return ((s + p["b"] - y) ** 2).sum(-1).mean()

    def loss_fn(p, x, y):
        return ((F.linear(x, p["w"], p["b"]) - y) ** 2).sum(-1).mean()

    params = weights(dtype, w=(3, 4), b=(3,))
    batch = random(1, dtype, 6, 4), random(2, dtype, 6, 3)
    return Case(
        "f_linear", loss_fn, forward, params, batch, {"w": (3, 4)}, terms=6, nearest="w", reasons={"b": BIAS}
    )


def x_at_w(dtype: torch.dtype = DOUBLE) -> Case:
    def forward(tap, p, x):
        return tap("w", x, x @ p["w"]).sin().sum(-1).mean()

    return _functional(
        "x_at_w", forward, weights(dtype, w=(4, 3)), (random(1, dtype, 6, 4),), (3, 4), terms=6
    )


def w_at_x(dtype: torch.dtype = DOUBLE) -> Case:
    def forward(tap, p, x):
        return tap("w", x.mT, (p["w"] @ x).mT).sin().sum(-1).mean()

    return _functional(
        "w_at_x", forward, weights(dtype, w=(3, 4)), (random(1, dtype, 4, 6),), (3, 4), terms=6
    )


def transposed_view(dtype: torch.dtype = DOUBLE) -> Case:
    """The weight is stored as (in, out) and used through ``W.T``."""

    def forward(tap, p, x):
        return tap("w", x, F.linear(x, p["w"].T)).sin().sum(-1).mean()

    params, batch = weights(dtype, w=(4, 3)), (random(1, dtype, 6, 4),)
    return _functional("transposed_view", forward, params, batch, (3, 4), terms=6)


def transposed_storage(dtype: torch.dtype = DOUBLE) -> Case:
    """The weight has the shape (out, in) and the strides of a transposed matrix."""

    def forward(tap, p, x):
        return tap("w", x, F.linear(x, p["w"])).sin().sum(-1).mean()

    params, batch = {"w": random(100, dtype, 4, 3).T}, (random(1, dtype, 6, 4),)
    return _functional("transposed_storage", forward, params, batch, (3, 4), terms=6)


def one_datum(dtype: torch.dtype = DOUBLE) -> Case:
    """A 1-D input."""

    def forward(tap, p, x):
        return tap("w", x, F.linear(x, p["w"])).sin().sum()

    return _functional(
        "one_datum", forward, weights(dtype, w=(3, 4)), (random(1, dtype, 4),), (3, 4), terms=1
    )


def three_axes(dtype: torch.dtype = DOUBLE) -> Case:
    """A language model's head: the loss averages over batch and positions."""

    def forward(tap, p, x, y):
        return F.cross_entropy(tap("w", x, F.linear(x, p["w"])).flatten(0, 1), y.flatten())

    params, batch = weights(dtype, w=(3, 4)), (random(1, dtype, 2, 5, 4), labels(2, 3, 2, 5))
    return _functional("three_axes", forward, params, batch, (3, 4), terms=10)


def four_axes(dtype: torch.dtype = DOUBLE) -> Case:
    def forward(tap, p, x):
        return tap("w", x, F.linear(x, p["w"])).sin().sum(-1).mean()

    params, batch = weights(dtype, w=(3, 4)), (random(1, dtype, 2, 5, 2, 4),)
    return _functional("four_axes", forward, params, batch, (3, 4), terms=20)


def einsum(dtype: torch.dtype = DOUBLE) -> Case:
    def forward(tap, p, x):
        return tap("w", x, torch.einsum("bti,oi->bto", x, p["w"])).sin().sum(-1).mean()

    params, batch = weights(dtype, w=(3, 4)), (random(1, dtype, 2, 5, 4),)
    return _functional("einsum", forward, params, batch, (3, 4), terms=10)


def einsum_heads(dtype: torch.dtype = DOUBLE) -> Case:
    """A weight of three axes: (in, heads, head size)."""

    def forward(tap, p, x):
        s = torch.einsum("btd,dhk->bhtk", x, p["w"])  # (batch, heads, time, size)
        rows = tap("w", x, s.permute(0, 2, 1, 3).flatten(2))
        return rows.sin().sum(-1).mean()

    params, batch = weights(dtype, w=(4, 2, 3)), (random(1, dtype, 2, 5, 4),)
    return _functional("einsum_heads", forward, params, batch, (6, 4), terms=10)


def expand_bmm(dtype: torch.dtype = DOUBLE) -> Case:
    def forward(tap, p, x):
        w = p["w"].expand(x.shape[0], -1, -1)
        return tap("w", x, torch.bmm(x, w)).sin().sum(-1).mean()

    params, batch = weights(dtype, w=(4, 3)), (random(1, dtype, 2, 5, 4),)
    return _functional("expand_bmm", forward, params, batch, (3, 4), terms=10)


def slices(dtype: torch.dtype = DOUBLE) -> Case:
    """Two slices of one weight, each with inputs of its own."""

    def forward(tap, p, x, y):
        left = tap("w[0:2]", x, F.linear(x, p["w"][:2]))
        right = tap("w[2:5]", y, F.linear(y, p["w"][2:]))
        return left.sin().sum(-1).mean() + right.sin().sum(-1).tanh().mean()

    params = weights(dtype, w=(5, 4))
    batch = random(1, dtype, 6, 4), random(2, dtype, 7, 4)
    layers = {"w[0:2]": (2, 4), "w[2:5]": (3, 4)}
    return Case("slices", untapped(forward), forward, params, batch, layers, terms=6, nearest="w[0:2]")


def column_slices(dtype: torch.dtype = DOUBLE) -> Case:
    """Slices of the second axis of a weight that is stored as (in, out)."""

    def forward(tap, p, x, y):
        left = tap("w[:, 0:2]", x, x @ p["w"][:, :2])
        right = tap("w[:, 2:5]", y, y @ p["w"][:, 2:])
        return left.sin().sum(-1).mean() + right.sin().sum(-1).tanh().mean()

    params = weights(dtype, w=(4, 5))
    batch = random(1, dtype, 6, 4), random(2, dtype, 7, 4)
    layers = {"w[:, 0:2]": (2, 4), "w[:, 2:5]": (3, 4)}
    return Case(
        "column_slices", untapped(forward), forward, params, batch, layers, terms=6, nearest="w[:, 0:2]"
    )


def _functional(
    name: str,
    forward: Callable[..., Tensor],
    params: dict[str, Tensor],
    batch: tuple[Tensor, ...],
    dims: tuple[int, int],
    terms: int,
) -> Case:
    """A case with one weight ``w`` whose loss function is its forward."""
    return Case(name, untapped(forward), forward, params, batch, {"w": dims}, terms=terms, nearest="w")


# --- networks --------------------------------------------------------------------------------------


def mlp(dtype: torch.dtype = DOUBLE) -> Case:
    return _mlp("mlp", dtype, bias=True)


def mlp_without_bias(dtype: torch.dtype = DOUBLE) -> Case:
    return _mlp("mlp_without_bias", dtype, bias=False)


def _mlp(name: str, dtype: torch.dtype, bias: bool) -> Case:
    model = nn.Sequential(nn.Linear(5, 4, bias=bias), nn.Tanh(), nn.Linear(4, 3, bias=bias))

    def forward(tap, p, x, y):
        return F.cross_entropy(dense(tap, p, "2", dense(tap, p, "0", x).tanh()), y)

    batch = random(1, dtype, 6, 5), labels(2, 3, 6)
    return Case(
        name,
        of_module(model, F.cross_entropy),
        forward,
        params_of(model, dtype),
        batch,
        layers={"0.weight": (4, 5), "2.weight": (3, 4)},
        terms=6,
        nearest="2.weight",
        reasons={"0.bias": BIAS, "2.bias": BIAS} if bias else {},
    )


def aux(dtype: torch.dtype = DOUBLE) -> Case:
    """``(loss, aux)``, where the auxiliary result is differentiable too."""
    plain = mlp_without_bias(dtype)

    def loss_fn(p, x, y):
        scores = (x @ p["0.weight"].T).tanh() @ p["2.weight"].T
        return F.cross_entropy(scores, y), {"scores": scores, "correct": scores.argmax(-1) == y}

    return Case(
        "aux", loss_fn, plain.forward, plain.params, plain.batch, plain.layers, plain.terms, plain.nearest
    )


def pooled(dtype: torch.dtype = DOUBLE) -> Case:
    """A classifier of sequences: its layers have more rows than the loss has terms."""

    def forward(tap, p, x, y):
        h = dense(tap, p, "token", x).tanh()  # (batch, time, features)
        return F.cross_entropy(dense(tap, p, "head", h.mean(1)), y)

    model = nn.ModuleDict({"token": nn.Linear(4, 5, bias=False), "head": nn.Linear(5, 3, bias=False)})
    params = params_of(model, dtype)
    batch = random(1, dtype, 6, 2, 4), labels(2, 3, 6)
    layers = {"token.weight": (5, 4), "head.weight": (3, 5)}
    return Case("pooled", untapped(forward), forward, params, batch, layers, terms=6, nearest="head.weight")


def twice(dtype: torch.dtype = DOUBLE) -> Case:
    """One module called twice."""
    model = nn.ModuleDict({"same": nn.Linear(4, 4, bias=False), "head": nn.Linear(4, 3, bias=False)})

    def forward(tap, p, x, y):
        h = dense(tap, p, "same", dense(tap, p, "same", x).tanh()).tanh()
        return F.cross_entropy(dense(tap, p, "head", h), y)

    params, batch = params_of(model, dtype), (random(1, dtype, 6, 4), labels(2, 3, 6))
    layers = {"same.weight": (4, 4), "head.weight": (3, 4)}
    return Case("twice", untapped(forward), forward, params, batch, layers, terms=6, nearest="head.weight")


def tied(dtype: torch.dtype = DOUBLE) -> Case:
    """Two modules that share a weight and see different numbers of rows."""
    model = nn.ModuleDict({"a": nn.Linear(4, 3, bias=False), "b": nn.Linear(4, 3, bias=False)})
    model["b"].weight = model["a"].weight
    params = params_of(model, dtype)

    def forward(tap, p, x, z):
        left, right = (tap("a.weight", v, v @ p["a.weight"].T) for v in (x, z))
        return left.sin().sum(-1).mean() + right.cos().sum(-1).tanh().mean()

    def both(x, z):
        return model["a"](x).sin().sum(-1).mean() + model["b"](z).cos().sum(-1).tanh().mean()

    calls = _Calls(model, both)

    def loss_fn(p, x, z):
        return functional_call(calls, {f"module.{name}": value for name, value in p.items()}, (x, z))

    batch = random(1, dtype, 6, 4), random(2, dtype, 5, 2, 4)
    return Case("tied", loss_fn, forward, params, batch, {"a.weight": (3, 4)}, terms=6, nearest="a.weight")


class _Calls(nn.Module):
    """A module whose forward is a function that uses another module."""

    def __init__(self, module: nn.Module, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(*args)


def fused_qkv(dtype: torch.dtype = DOUBLE) -> Case:
    model = nn.ModuleDict({"qkv": nn.Linear(4, 12), "out": nn.Linear(4, 4, bias=False)})

    def forward(tap, p, x):
        q, k, v = dense(tap, p, "qkv", x).chunk(3, dim=-1)
        mixed = attention(q, k, v)
        return dense(tap, p, "out", mixed).sin().sum(-1).mean()

    params, batch = params_of(model, dtype), (random(1, dtype, 2, 3, 4),)
    return Case(
        "fused_qkv",
        untapped(forward),
        forward,
        params,
        batch,
        layers={"qkv.weight": (12, 4), "out.weight": (4, 4)},
        terms=6,
        nearest="out.weight",
        reasons={"qkv.bias": BIAS},
    )


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int = 1) -> Tensor:
    """Softmax attention of (batch, time, features)."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def self_attention(dtype: torch.dtype = DOUBLE) -> Case:
    """``nn.MultiheadAttention``: one projection for queries, keys and values."""
    return _multihead("self_attention", dtype, {"in_proj_weight": slice(0, 12)}, lambda x, _m, _z: (x, x, x))


def cross_attention(dtype: torch.dtype = DOUBLE) -> Case:
    """Keys and values see the same input: two projections inside one weight."""
    parts = {"in_proj_weight[0:4]": slice(0, 4), "in_proj_weight[4:12]": slice(4, 12)}
    return _multihead("cross_attention", dtype, parts, lambda x, m, _z: (x, m, m))


def three_inputs_attention(dtype: torch.dtype = DOUBLE) -> Case:
    """Queries, keys and values from different inputs: three projections inside one weight."""
    parts = {f"in_proj_weight[{i}:{i + 4}]": slice(i, i + 4) for i in (0, 4, 8)}
    return _multihead("three_inputs_attention", dtype, parts, lambda x, m, z: (x, m, z))


def _multihead(name: str, dtype: torch.dtype, parts: dict[str, slice], inputs: Callable[..., Any]) -> Case:
    model = nn.MultiheadAttention(4, 2, batch_first=True)

    def loss_fn(p, x, m, z):
        out, _ = functional_call(model, dict(p), inputs(x, m, z), {"need_weights": False})
        return out.sin().sum(-1).mean()

    def forward(tap, p, *batch):
        projected = []
        sources = dict(zip((0, 4, 8), inputs(*batch), strict=True))  # by first row of the weight
        for layer, part in parts.items():
            x = sources[part.start]
            s = tap(layer, x, x @ p["in_proj_weight"][part].T) + p["in_proj_bias"][part]
            projected += s.split(4, dim=-1)
        mixed = attention(*projected, heads=2)
        s = tap("out_proj.weight", mixed, mixed @ p["out_proj.weight"].T) + p["out_proj.bias"]
        return s.sin().sum(-1).mean()

    batch = random(1, dtype, 2, 3, 4), random(2, dtype, 2, 5, 4), random(3, dtype, 2, 5, 4)
    layers = {layer: (part.stop - part.start, 4) for layer, part in parts.items()}
    return Case(
        name,
        loss_fn,
        forward,
        params_of(model, dtype),
        batch,
        layers={**layers, "out_proj.weight": (4, 4)},
        terms=6,
        nearest="out_proj.weight",
        reasons={"in_proj_bias": r"its gradient is .*sum", "out_proj.bias": BIAS},
    )


def checkpointed(dtype: torch.dtype = DOUBLE) -> Case:
    """A block whose activations are computed again in backward."""

    def forward(tap, p, x, y):
        h = dense(tap, p, "up", x).tanh()
        return F.cross_entropy(dense(tap, p, "head", dense(tap, p, "down", h).tanh()), y)

    def loss_fn(p, x, y):
        def block(x):
            return ((x @ p["up.weight"].T).tanh() @ p["down.weight"].T).tanh()

        return F.cross_entropy(checkpoint(block, x, use_reentrant=False) @ p["head.weight"].T, y)

    params = {
        "up.weight": random(1, dtype, 5, 4),
        "down.weight": random(2, dtype, 2, 5),
        "head.weight": random(3, dtype, 3, 2),
    }
    batch = random(4, dtype, 6, 4), labels(5, 3, 6)
    layers = {"up.weight": (5, 4), "down.weight": (2, 5), "head.weight": (3, 2)}
    return Case("checkpointed", loss_fn, forward, params, batch, layers, terms=6, nearest="head.weight")


def dropout(dtype: torch.dtype = DOUBLE) -> Case:
    def forward(tap, p, x, y):
        h = F.dropout(dense(tap, p, "0", x).tanh(), 0.5)
        return F.cross_entropy(dense(tap, p, "2", h), y)

    plain = mlp_without_bias(dtype)
    return Case(
        "dropout",
        untapped(forward),
        forward,
        plain.params,
        plain.batch,
        plain.layers,
        plain.terms,
        plain.nearest,
        random=True,
    )


# --- parameters without a Kronecker pair -----------------------------------------------------------


def layer_norm(dtype: torch.dtype = DOUBLE) -> Case:
    return _normalised("layer_norm", nn.LayerNorm(4), dtype, ("norm.weight", "norm.bias"))


def rms_norm(dtype: torch.dtype = DOUBLE) -> Case:
    return _normalised("rms_norm", nn.RMSNorm(4, eps=1e-6), dtype, ("norm.weight",))


def batch_norm(dtype: torch.dtype = DOUBLE) -> Case:
    return _normalised("batch_norm", nn.BatchNorm1d(4), dtype, ("norm.weight", "norm.bias"))


def group_norm(dtype: torch.dtype = DOUBLE) -> Case:
    return _normalised("group_norm", nn.GroupNorm(2, 4), dtype, ("norm.weight", "norm.bias"))


def _normalised(name: str, norm: nn.Module, dtype: torch.dtype, norms: tuple[str, ...]) -> Case:
    model = nn.Sequential()
    for key, module in {
        "0": nn.Linear(5, 4),
        "norm": norm,
        "tanh": nn.Tanh(),
        "2": nn.Linear(4, 3, bias=False),
    }.items():
        model.add_module(key, module)
    params = params_of(model, dtype)

    def forward(tap, p, x, y):
        own = {key.removeprefix("norm."): p[key] for key in p if key.startswith("norm.")}
        h = functional_call(norm, own, (dense(tap, p, "0", x),)).tanh()
        return F.cross_entropy(dense(tap, p, "2", h), y)

    return Case(
        name,
        of_module(model, F.cross_entropy),
        forward,
        params,
        (random(1, dtype, 6, 5), labels(2, 3, 6)),
        layers={"0.weight": (4, 5), "2.weight": (3, 4)},
        terms=6,
        nearest="2.weight",
        norms=norms,
        reasons={"0.bias": "its gradient is"},
    )


def handwritten_rms_norm(dtype: torch.dtype = DOUBLE) -> Case:
    """As Llama-style models write it, for an input of three axes."""

    def forward(tap, p, x, y):
        h = tap("w", x, x @ p["w"].T)
        h = p["scale"] * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))
        return F.cross_entropy(tap("head", h, h @ p["head"].T).flatten(0, 1), y.flatten())

    params = weights(dtype, w=(5, 4), scale=(5,), head=(3, 5))
    return Case(
        "handwritten_rms_norm",
        untapped(forward),
        forward,
        params,
        (random(1, dtype, 2, 3, 4), labels(2, 3, 2, 3)),
        layers={"w": (5, 4), "head": (3, 5)},
        terms=6,
        nearest="head",
        norms=("scale",),
    )


def embedding(dtype: torch.dtype = DOUBLE) -> Case:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3, bias=False))

    def forward(tap, p, tokens, y):
        rows = F.one_hot(tokens, 7).to(dtype)
        return F.cross_entropy(dense(tap, p, "1", tap("0.weight", rows, rows @ p["0.weight"])), y)

    return Case(
        "embedding",
        of_module(model, F.cross_entropy),
        forward,
        params_of(model, dtype),
        (labels(1, 7, 6), labels(2, 3, 6)),
        layers={"0.weight": (4, 7), "1.weight": (3, 4)},
        terms=6,
        nearest="1.weight",
        kinds={"0.weight": "embedding"},
    )


def convolution(dtype: torch.dtype = DOUBLE) -> Case:
    model = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.Flatten(), nn.Linear(8, 3, bias=False))

    def forward(tap, p, x, y):
        patches = F.unfold(x, 3).mT  # (batch, positions, 9)
        maps = tap("0.weight", patches, patches @ p["0.weight"].flatten(1).T).mT
        return F.cross_entropy(dense(tap, p, "2", maps.flatten(1)), y)

    return Case(
        "convolution",
        of_module(model, F.cross_entropy),
        forward,
        params_of(model, dtype),
        (random(1, dtype, 5, 1, 4, 4), labels(2, 3, 5)),
        layers={"0.weight": (2, 9), "2.weight": (3, 8)},
        terms=5,
        nearest="2.weight",
        kinds={"0.weight": "convolution"},
    )


def unused(dtype: torch.dtype = DOUBLE) -> Case:
    def forward(tap, p, x):
        return tap("w", x, x @ p["w"]).sin().sum(-1).mean()

    params = weights(dtype, w=(4, 3), idle=(2, 2))
    return Case(
        "unused",
        untapped(forward),
        forward,
        params,
        (random(1, dtype, 6, 4),),
        layers={"w": (3, 4)},
        terms=6,
        nearest="w",
        reasons={"idle": "^the loss does not depend on it$"},
    )


def both_ways(dtype: torch.dtype = DOUBLE) -> Case:
    """An auto-encoder that decodes with the transpose of its encoder."""

    def forward(tap, p, x):
        h = tap("w", x, x @ p["w"].T).tanh()
        y = tap("w (transposed)", h, h @ p["w"])
        return ((tap("head", y, y @ p["head"].T)) ** 2).sum(-1).mean()

    return Case(
        "both_ways",
        untapped(forward),
        forward,
        weights(dtype, w=(3, 4), head=(5, 4)),
        (random(1, dtype, 6, 4),),
        layers={"w": (3, 4), "head": (5, 4)},
        terms=6,
        nearest="head",
    )


def masked(dtype: torch.dtype = DOUBLE) -> Case:
    """A weight that is computed from its parameter."""

    def forward(tap, p, x):
        h = F.linear(x, p["w"] * (p["w"].detach() > 0)).tanh()
        return tap("head", h, h @ p["head"].T).sin().sum(-1).mean()

    return Case(
        "masked",
        untapped(forward),
        forward,
        weights(dtype, w=(3, 4), head=(2, 3)),
        (random(1, dtype, 6, 4),),
        layers={"head": (2, 3)},
        terms=6,
        nearest="head",
        reasons={"w": r"its gradient is mul <- (t|permute|mm)"},
    )


def experts(dtype: torch.dtype = DOUBLE) -> Case:
    """One weight that holds a matrix for every expert, and every expert has rows of its own."""

    def forward(tap, p, x):
        h = tap("w", x, torch.bmm(x, p["w"])).tanh().sum(0)  # (expert, batch, features)
        return tap("head", h, h @ p["head"].T).sin().sum(-1).mean()

    return Case(
        "experts",
        untapped(forward),
        forward,
        weights(dtype, w=(3, 4, 5), head=(2, 5)),
        (random(1, dtype, 3, 6, 4),),
        layers={"w": (5, 4), "head": (2, 5)},
        terms=6,
        nearest="head",
        kinds={"w": "linear per slice"},
        groups={"w": 3},
    )


def tied_embedding(dtype: torch.dtype = DOUBLE) -> Case:
    """A language model whose head is its embedding."""

    def forward(tap, p, tokens, y):
        rows = F.one_hot(tokens, 7).to(dtype)
        h = tap("w (transposed)", rows, rows @ p["w"])
        h = tap("middle", h, h @ p["middle"].T)
        return F.cross_entropy(tap("w", h, h @ p["w"].T).flatten(0, 1), y.flatten())

    def loss_fn(p, tokens, y):
        h = F.embedding(tokens, p["w"]) @ p["middle"].T
        return F.cross_entropy((h @ p["w"].T).flatten(0, 1), y.flatten())

    return Case(
        "tied_embedding",
        loss_fn,
        forward,
        weights(dtype, w=(7, 4), middle=(4, 4)),
        (labels(1, 7, 2, 3), labels(2, 7, 2, 3)),
        layers={"w": (7, 4), "middle": (4, 4)},
        terms=6,
        nearest="w",
        kinds={"w": "linear and embedding"},
    )


def no_layer(dtype: torch.dtype = DOUBLE) -> Case:
    """Nothing in it has a Kronecker pair."""

    def forward(_tap, p, x):
        return (x * p["scale"]).sin().sum(-1).mean()

    return Case(
        "no_layer",
        untapped(forward),
        forward,
        weights(dtype, scale=(4,)),
        (random(1, dtype, 6, 4),),
        layers={},
        terms=1,
        nearest=None,
        reasons={"scale": r"its gradient is sum <- mul"},
    )


BUILDERS: tuple[Build, ...] = (
    linear,
    f_linear,
    x_at_w,
    w_at_x,
    transposed_view,
    transposed_storage,
    one_datum,
    three_axes,
    four_axes,
    einsum,
    einsum_heads,
    expand_bmm,
    slices,
    column_slices,
    mlp,
    mlp_without_bias,
    aux,
    pooled,
    twice,
    tied,
    fused_qkv,
    self_attention,
    cross_attention,
    three_inputs_attention,
    checkpointed,
    dropout,
    layer_norm,
    rms_norm,
    batch_norm,
    group_norm,
    handwritten_rms_norm,
    embedding,
    convolution,
    unused,
    both_ways,
    masked,
    experts,
    tied_embedding,
    no_layer,
)
