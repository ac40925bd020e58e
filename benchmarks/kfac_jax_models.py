"""The models of ``workloads.py`` in plain JAX, for kfac-jax; images have their channels last.

Layers are written in the forms that kfac-jax recognises. Batch norm keeps no running averages: no step of
training reads them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Params = Any
Batch = tuple[jax.Array, jax.Array]
EPSILON = 1e-5


@dataclass(frozen=True)
class Model:
    """Initial parameters, ``logits(params, x)`` of shape (..., classes), and a batch with ``y`` of (...)."""

    params: Params
    logits: Callable[[Params, jax.Array], jax.Array]
    batch: Batch


# --- layers ------------------------------------------------------------------------------------------


def dense(random: np.random.Generator, before: int, after: int, *, bias: bool = True) -> Params:
    weight = random.standard_normal((before, after), np.float32) / np.sqrt(before, dtype=np.float32)
    return {"w": weight, "b": np.zeros(after, np.float32)} if bias else {"w": weight}


def apply_dense(p: Params, x: jax.Array) -> jax.Array:
    y = jnp.tensordot(x, p["w"], axes=1)
    return y + p["b"] if "b" in p else y


def norm(size: int) -> Params:
    return {"scale": np.ones(size, np.float32), "shift": np.zeros(size, np.float32)}


def apply_norm(p: Params, x: jax.Array, axes: Sequence[int]) -> jax.Array:
    centred = x - x.mean(axes, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(centred).mean(axes, keepdims=True) + EPSILON)
    return centred * inverse * p["scale"] + p["shift"]


def convolution(random: np.random.Generator, before: int, after: int, kernel: int) -> Params:
    """Without a bias, and the batch norm behind it."""
    shape, fan = (kernel, kernel, before, after), np.float32(kernel * kernel * before)
    return {"w": random.standard_normal(shape, np.float32) / np.sqrt(fan), "norm": norm(after)}


def apply_convolution(p: Params, x_NHWC: jax.Array, stride: int = 1) -> jax.Array:
    pad = len(p["w"]) // 2
    y_NHWC = jax.lax.conv_general_dilated(
        x_NHWC, p["w"], (stride, stride), ((pad, pad),) * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return apply_norm(p["norm"], y_NHWC, (0, 1, 2))


# --- models ------------------------------------------------------------------------------------------


def mlp(*sizes: int, count: int) -> Model:
    random = np.random.default_rng(0)
    params = [dense(random, *pair) for pair in pairwise(sizes)]

    def logits(params: Params, x: jax.Array) -> jax.Array:
        for p in params[:-1]:
            x = jax.nn.relu(apply_dense(p, x))
        return apply_dense(params[-1], x)

    return Model(params, logits, vectors(random, (count, sizes[0]), sizes[-1]))


def cnn(channels: Sequence[int], strides: Sequence[int], classes: int, *, side: int, count: int) -> Model:
    random = np.random.default_rng(0)
    params = {
        "features": [convolution(random, *pair, 3) for pair in pairwise(channels)],
        "head": dense(random, channels[-1], classes),
    }

    def logits(params: Params, x: jax.Array) -> jax.Array:
        for p, stride in zip(params["features"], strides, strict=True):
            x = jax.nn.relu(apply_convolution(p, x, stride))
        return apply_dense(params["head"], x.mean((1, 2)))

    return Model(params, logits, vectors(random, (count, side, side, channels[0]), classes))


def gpt(symbols: int, length: int, *, width: int, layers: int, heads: int, count: int) -> Model:
    random = np.random.default_rng(0)
    small = np.float32(0.02)
    params = {
        "tokens": small * random.standard_normal((symbols, width), np.float32),
        "positions": small * random.standard_normal((length, width), np.float32),
        "blocks": [block(random, width) for _ in range(layers)],
        "norm": norm(width),
        "head": dense(random, width, symbols, bias=False),
    }

    def logits(params: Params, tokens_NT: jax.Array) -> jax.Array:
        x_NTD = params["tokens"][tokens_NT] + params["positions"]
        for p in params["blocks"]:
            x_NTD = apply_block(p, x_NTD, heads)
        return apply_dense(params["head"], apply_norm(params["norm"], x_NTD, (-1,)))

    stream = random.integers(symbols, size=(count, length + 1), dtype=np.int32)
    return Model(params, logits, (jnp.asarray(stream[:, :-1]), jnp.asarray(stream[:, 1:])))


def block(random: np.random.Generator, width: int) -> Params:
    return {
        "norm1": norm(width),
        "norm2": norm(width),
        "qkv": dense(random, width, 3 * width),
        "out": dense(random, width, width),
        "up": dense(random, width, 4 * width),
        "down": dense(random, 4 * width, width),
    }


def apply_block(p: Params, x_NTD: jax.Array, heads: int) -> jax.Array:
    split = apply_dense(p["qkv"], apply_norm(p["norm1"], x_NTD, (-1,)))
    q, k, v = jnp.moveaxis(split.reshape(*x_NTD.shape[:2], 3, heads, -1), 2, 0)
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x_NTD = x_NTD + apply_dense(p["out"], mixed.reshape(x_NTD.shape))
    hidden = jax.nn.gelu(apply_dense(p["up"], apply_norm(p["norm2"], x_NTD, (-1,))), approximate=False)
    return x_NTD + apply_dense(p["down"], hidden)


def vectors(random: np.random.Generator, shape: Sequence[int], classes: int) -> Batch:
    x = jnp.asarray(random.standard_normal(shape, np.float32))
    return x, jnp.asarray(random.integers(classes, size=shape[:1], dtype=np.int32))


MODELS: dict[str, Callable[[], Model]] = {
    "mlp": lambda: mlp(784, 256, 256, 10, count=128),
    "cnn": lambda: cnn((3, 16, 32, 32, 64, 64), (1, 2, 1, 2, 1), 10, side=32, count=64),
    "transformer": lambda: gpt(512, 64, width=128, layers=4, heads=4, count=16),
    "gpt": lambda: gpt(512, 128, width=384, layers=6, heads=6, count=4),
    "tiny": lambda: gpt(11, 5, width=8, layers=1, heads=2, count=3),
}
"""By the names of ``workloads.WORKLOADS``, with the same numbers."""
