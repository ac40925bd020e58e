"""Models and batches to time steps on."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Workload:
    """A model, its batch, the number of terms that its loss averages over, and what it makes of one datum."""

    title: str
    build: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    terms: int
    outputs: int


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_NTD: Tensor) -> Tensor:
        split = self.qkv(x_NTD).unflatten(-1, (3, self.heads, -1))  # (N, T, 3, heads, D / heads)
        q, k, v = split.permute(2, 0, 3, 1, 4)  # each (N, heads, T, D / heads)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_NTD: Tensor) -> Tensor:
        x_NTD = x_NTD + self.attention(self.norm1(x_NTD))
        return x_NTD + self.mlp(self.norm2(x_NTD))


class Transformer(nn.Module):
    """A decoder in GPT's form; returns the logits of all positions, (N T, vocabulary)."""

    def __init__(self, vocabulary: int, length: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, tokens_NT: Tensor) -> Tensor:
        x_NTD = self.tokens(tokens_NT) + self.positions.weight
        return self.head(self.norm(self.blocks(x_NTD))).flatten(0, 1)


def mlp(*sizes: int) -> nn.Sequential:
    layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def images(count: int, pixels: int, classes: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, pixels), torch.randint(classes, (count,))


def text(count: int, length: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    stream = torch.randint(vocabulary, (count, length + 1))
    return stream[:, :-1].contiguous(), stream[:, 1:].flatten()


WORKLOADS = {
    "mlp": Workload(
        "MLP 784-256-256-10, batch 128",
        lambda: mlp(784, 256, 256, 10),
        lambda: images(128, 784, 10),
        terms=128,
        outputs=10,
    ),
    "transformer": Workload(
        "decoder, width 128, 4 layers, 4 heads, vocabulary 512, 64 positions, batch 16",
        lambda: Transformer(512, 64, width=128, layers=4, heads=4),
        lambda: text(16, 64, 512),
        terms=16 * 64,
        outputs=64 * 512,
    ),
    "tiny": Workload(
        "decoder, width 8, 1 layer, for tests",
        lambda: Transformer(11, 5, width=8, layers=1, heads=2),
        lambda: text(3, 5, 11),
        terms=3 * 5,
        outputs=5 * 11,
    ),
}
