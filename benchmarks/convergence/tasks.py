"""What is trained: a model, its data, and the budget of one run."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import data
import torch
from networks import ConvNet, Gpt, WithLoss, autoencoder, classifier, mlp
from torch import Tensor

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Data:
    """A training set that batches are drawn from by index, and fixed batches for validation."""

    size: int
    draw: Callable[[Tensor], Batch]
    validation: list[Batch]


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        title: what a reader has to know.
        steps: of every run.
        batch: examples in a step.
        window: steps that the smoothed training loss averages over.
        build: a fresh model, from torch's random state.
        load: the data in a folder.
        first_order: names of matrices that Muon leaves to AdamW: embeddings and the last layer.
    """

    name: str
    title: str
    steps: int
    batch: int
    window: int
    build: Callable[[], WithLoss]
    load: Callable[[Path], Data]
    first_order: tuple[str, ...] = ()

    @property
    def protocol(self) -> str:
        """Runs are compared only where this is the same."""
        return f"{self.title}; {self.steps} steps of {self.batch}"

    def batches(self, source: Data, seed: int) -> list[Tensor]:
        """The indices of every step's examples: the same for all optimizers."""
        generator = torch.Generator().manual_seed(seed)
        return list(torch.randint(source.size, (self.steps, self.batch), generator=generator))


VALIDATION = 2000  # images


def digits(folder: Path) -> Data:
    train, _, test, _ = data.images(folder, "mnist.npz")

    def flat(images: Tensor) -> Batch:
        pixels = images.flatten(1).float() / 255
        return pixels, pixels

    held_out = [flat(part) for part in test[:VALIDATION].split(500)]
    return Data(len(train), lambda indices: flat(train[indices]), held_out)


def photographs(folder: Path) -> Data:
    train, labels, test, test_labels = data.images(folder, "cifar10.npz")
    mean, deviation = (train[:5000].float().mean((0, 2, 3), keepdim=True), train[:5000].float().std())

    def scaled(images: Tensor) -> Tensor:
        return (images.float() - mean) / deviation

    parts = zip(test[:VALIDATION].split(500), test_labels[:VALIDATION].split(500), strict=True)
    held_out = [(scaled(x), y) for x, y in parts]
    return Data(len(train), lambda indices: (scaled(train[indices]), labels[indices]), held_out)


LENGTH = 64  # symbols that a prediction sees
SYMBOLS = 65


def plays(folder: Path) -> Data:
    train, rest, symbols = data.text(folder)
    if symbols != SYMBOLS:
        raise ValueError(
            f"tinyshakespeare.txt has {symbols} symbols, not {SYMBOLS}: is it the original file?"
        )
    offsets = torch.arange(LENGTH + 1)

    def passages(stream: Tensor, starts: Tensor) -> Batch:
        read = stream[starts[:, None] + offsets]
        return read[:, :-1].contiguous(), read[:, 1:].flatten()

    starts = torch.arange(0, len(rest) - LENGTH - 1, LENGTH)[: 16 * 64]
    held_out = [passages(rest, part) for part in starts.split(64)]
    return Data(len(train) - LENGTH, lambda indices: passages(train, indices), held_out)


def noise(folder: Path) -> Data:
    """A learnable rule on random vectors; needs no file."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 6, generator=generator)
    y = (x @ torch.randn(6, 3, generator=generator)).argmax(1)
    return Data(192, lambda indices: (x[indices], y[indices]), [(x[192:], y[192:])])


TASKS = {
    task.name: task
    for task in (
        Task(
            name="autoencoder",
            title="MNIST auto-encoder 784-256-64-16-64-256-784, ReLU, cross-entropy summed over pixels",
            steps=1000,
            batch=500,
            window=20,
            build=lambda: autoencoder(784, 256, 64, 16),
            load=digits,
        ),
        Task(
            name="cnn",
            title="CIFAR-10, 5 convolutions 3x3 (16-32-32-64-64) with batch norm",
            steps=500,
            batch=128,
            window=20,
            build=lambda: classifier(ConvNet(3, (16, 32, 32, 64, 64), (1, 2, 1, 2, 1), 10)),
            load=photographs,
            first_order=("net.head.weight",),
        ),
        Task(
            name="gpt",
            title=f"tiny-shakespeare, character GPT, width 168, 3 layers, 6 heads, context {LENGTH}",
            steps=300,
            batch=32,
            window=20,
            build=lambda: classifier(Gpt(SYMBOLS, LENGTH, width=168, layers=3, heads=6)),
            load=plays,
            first_order=("net.tokens.weight", "net.positions.weight", "net.head.weight"),
        ),
        Task(
            name="smoke",
            title="a tiny classifier of random vectors, for tests",
            steps=12,
            batch=16,
            window=2,
            build=lambda: classifier(mlp(6, 8, 3)),
            load=noise,
        ),
    )
}
