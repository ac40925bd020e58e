"""The models of the study; each computes its own loss, so that a compiler sees all of forward."""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]


class WithLoss(nn.Module):
    """``(x, y)`` to the loss, a scalar; the outputs alone come from ``net``."""

    def __init__(self, net: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.net, self.loss = net, loss

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(self.net(x), y)


def pixel_entropy(logits_NP: Tensor, pixels_NP: Tensor) -> Tensor:
    """Binary cross-entropy, summed over the pixels and averaged over the images."""
    return F.binary_cross_entropy_with_logits(logits_NP, pixels_NP, reduction="sum") / len(pixels_NP)


def mlp(*sizes: int) -> nn.Sequential:
    layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def autoencoder(*sizes: int) -> WithLoss:
    """Down through ``sizes`` and up again, with ReLU between the layers."""
    return WithLoss(mlp(*sizes, *reversed(sizes[:-1])), pixel_entropy)


class ConvNet(nn.Module):
    """3x3 convolutions with batch norm, strided ones instead of pooling, a mean and a linear head."""

    def __init__(
        self, channels: int, widths: tuple[int, ...], strides: tuple[int, ...], classes: int
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for (before, after), stride in zip(pairwise((channels, *widths)), strides, strict=True):
            layers += [
                nn.Conv2d(before, after, 3, stride, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            ]
        self.features, self.head = nn.Sequential(*layers), nn.Linear(widths[-1], classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.head(self.features(x_NCHW).mean((2, 3)))


class Block(nn.Module):
    """Self-attention and a perceptron, each behind a norm and beside an identity."""

    def __init__(self, width: int, heads: int, *, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_NTD: Tensor) -> Tensor:
        split = self.qkv(self.norm1(x_NTD)).unflatten(-1, (3, self.heads, -1))  # (N, T, 3, heads, D / heads)
        q, k, v = split.permute(2, 0, 3, 1, 4)  # each (N, heads, T, D / heads)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x_NTD = x_NTD + self.out(mixed.transpose(1, 2).flatten(2))
        return x_NTD + self.mlp(self.norm2(x_NTD))


class Gpt(nn.Module):
    """A decoder in GPT's form and with its initial values; logits of all positions, (N T, symbols).

    ``tied``: the head is the table of tokens, as in GPT-2.
    """

    def __init__(
        self, symbols: int, length: int, width: int, layers: int, heads: int, *, tied: bool = False
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(symbols, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, symbols, bias=False)
        if tied:
            self.head.weight = self.tokens.weight
        self.apply(small_normal)

    def forward(self, tokens_NT: Tensor) -> Tensor:
        x_NTD = self.tokens(tokens_NT) + self.positions.weight
        return self.head(self.norm(self.blocks(x_NTD))).flatten(0, 1)


def small_normal(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def classifier(net: nn.Module) -> WithLoss:
    return WithLoss(net, F.cross_entropy)


def outputs_and_loss(model: WithLoss, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        outputs = model.net(x)
        return outputs, model.loss(outputs, y)
