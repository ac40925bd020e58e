"""Models of images: residual networks and a vision transformer, of plain modules."""

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from from_study import Block
from torch import Tensor, nn


def convolution(before: int, after: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """A convolution that keeps the size (over the stride), and its norm."""
    return nn.Sequential(
        nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, bias=False), nn.BatchNorm2d(after)
    )


class Residual(nn.Module):
    """Two convolutions, or three with a bottleneck of ``width`` between, beside an identity.

    ``after`` is the number of channels it makes.
    """

    def __init__(self, before: int, width: int, stride: int, *, bottleneck: bool) -> None:
        super().__init__()
        self.after = 4 * width if bottleneck else width
        widths = (before, width, width, self.after) if bottleneck else (before, width, self.after)
        kernels = ((1, 1), (3, stride), (1, 1)) if bottleneck else ((3, stride), (3, 1))
        self.parts = nn.ModuleList(
            convolution(*pair, *kernel) for pair, kernel in zip(pairwise(widths), kernels, strict=True)
        )
        same = before == self.after and stride == 1
        self.short = nn.Identity() if same else convolution(before, self.after, 1, stride)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        y_NCHW = x_NCHW
        for part in self.parts[:-1]:
            y_NCHW = F.relu(part(y_NCHW))
        return F.relu(self.parts[-1](y_NCHW) + self.short(x_NCHW))


class ResNet(nn.Module):
    """Stages of residual blocks; every stage but the first halves the image.

    Args:
        stem: what comes first; makes ``channels``.
        widths: of the blocks of every stage.
        counts: of blocks in every stage.
    """

    def __init__(
        self,
        stem: nn.Module,
        channels: int,
        widths: Sequence[int],
        counts: Sequence[int],
        classes: int,
        *,
        bottleneck: bool,
    ) -> None:
        super().__init__()
        blocks: list[Residual] = []
        for stage, (width, count) in enumerate(zip(widths, counts, strict=True)):
            for number in range(count):
                stride = 2 if stage > 0 and number == 0 else 1
                blocks.append(Residual(channels, width, stride, bottleneck=bottleneck))
                channels = blocks[-1].after
        self.stem, self.blocks, self.head = stem, nn.Sequential(*blocks), nn.Linear(channels, classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x_NCHW)).mean((2, 3)))


def small_resnet(widths: Sequence[int], count: int, classes: int) -> ResNet:
    """For images of 32 x 32, as in the CIFAR part of He et al. (2016)."""
    stem = nn.Sequential(convolution(3, widths[0], 3), nn.ReLU())
    return ResNet(stem, widths[0], widths, [count] * len(widths), classes, bottleneck=False)


def resnet50(classes: int = 1000) -> ResNet:
    stem = nn.Sequential(convolution(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1))
    return ResNet(stem, 64, (64, 128, 256, 512), (3, 4, 6, 3), classes, bottleneck=True)


class VisionTransformer(nn.Module):
    """Patches, learned positions, blocks, and the mean of all positions before the head."""

    def __init__(self, side: int, patch: int, width: int, layers: int, heads: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.positions = nn.Embedding((side // patch) ** 2, width)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x_NTD = self.patches(x_NCHW).flatten(2).transpose(1, 2) + self.positions.weight
        return self.head(self.norm(self.blocks(x_NTD)).mean(1))
