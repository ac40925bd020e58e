"""Models and batches to time steps on."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from from_study import ConvNet, Gpt, mlp
from torch import Tensor, nn
from vision import VisionTransformer, resnet50, small_resnet

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Workload:
    """A model of logits, its batch, and the number of terms that its loss averages over.

    Attributes:
        by_hand: whether the hooks of ``eager_hooks.py`` cover it.
    """

    title: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    terms: int
    by_hand: bool = True


def vectors(count: int, size: int, classes: int) -> Batch:
    return torch.randn(count, size), torch.randint(classes, (count,))


def images(count: int, side: int, classes: int) -> Batch:
    return torch.randn(count, 3, side, side), torch.randint(classes, (count,))


def text(count: int, length: int, vocabulary: int) -> Batch:
    stream = torch.randint(vocabulary, (count, length + 1))
    return stream[:, :-1].contiguous(), stream[:, 1:].flatten()


WORKLOADS = {
    "mlp": Workload(
        "MLP 784-256-256-10, batch 128",
        lambda: mlp(784, 256, 256, 10),
        lambda: vectors(128, 784, 10),
        terms=128,
    ),
    "cnn": Workload(
        "five convolutions 3x3 (16-32-32-64-64) with batch norm, images 32x32, batch 64",
        lambda: ConvNet(3, (16, 32, 32, 64, 64), (1, 2, 1, 2, 1), 10),
        lambda: images(64, 32, 10),
        terms=64,
        by_hand=False,
    ),
    "transformer": Workload(
        "decoder, width 128, 4 layers, 4 heads, vocabulary 512, 64 positions, batch 16",
        lambda: Gpt(512, 64, width=128, layers=4, heads=4),
        lambda: text(16, 64, 512),
        terms=16 * 64,
    ),
    "resnet": Workload(
        "residual network of 14 layers (16-32-64), images 32x32, batch 64",
        lambda: small_resnet((16, 32, 64), 2, 10),
        lambda: images(64, 32, 10),
        terms=64,
        by_hand=False,
    ),
    "gpt": Workload(
        "small GPT-2: width 384, 6 layers, 6 heads, vocabulary 512, 128 positions, batch 4; 11M parameters",
        lambda: Gpt(512, 128, width=384, layers=6, heads=6),
        lambda: text(4, 128, 512),
        terms=4 * 128,
    ),
    "vit": Workload(
        "ViT-S/16: width 384, 12 layers, 6 heads, images 224x224, batch 64; 22M parameters",
        lambda: VisionTransformer(224, 16, width=384, layers=12, heads=6, classes=1000),
        lambda: images(64, 224, 1000),
        terms=64,
        by_hand=False,
    ),
    "resnet50": Workload(
        "ResNet-50, images 224x224, batch 64; 26M parameters",
        resnet50,
        lambda: images(64, 224, 1000),
        terms=64,
        by_hand=False,
    ),
    "gpt2": Workload(
        "GPT-2: width 768, 12 layers, 12 heads, vocabulary 50257, 1024 positions, batch 4; 124M parameters",
        lambda: Gpt(50257, 1024, width=768, layers=12, heads=12, tied=True),
        lambda: text(4, 1024, 50257),
        terms=4 * 1024,
        by_hand=False,  # the head's weight is the table's: two modules, one matrix
    ),
    "tiny": Workload(
        "decoder, width 8, 1 layer, for tests",
        lambda: Gpt(11, 5, width=8, layers=1, heads=2),
        lambda: text(3, 5, 11),
        terms=3 * 5,
    ),
    "tiny-vision": Workload(
        "residual network of 4 layers, for tests",
        lambda: small_resnet((2,), 1, 3),
        lambda: images(4, 8, 3),
        terms=4,
        by_hand=False,
    ),
}
