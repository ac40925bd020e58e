"""The digits, and two tasks on them."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice, pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

TEST_IMAGES = 360  # a fifth


@dataclass(frozen=True)
class Digits:
    """Images of shape (N, 64) with values in [0, 1], and their labels, split into training and test."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def batches(self, size: int, count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
        """The first ``count`` batches of an endless series of shuffled epochs, incomplete ones left out."""
        generator = torch.Generator().manual_seed(seed)

        def indices():  # type: ignore[no-untyped-def]
            while True:
                order = torch.randperm(len(self.images), generator=generator).to(self.images.device)
                yield from order[: len(order) // size * size].split(size)

        return [(self.images[i], self.labels[i]) for i in islice(indices(), count)]


def load(seed: int, device: torch.device) -> Digits:
    """scikit-learn's copy of the UCI handwritten digits: 1,797 images of 8 x 8, all classes in both parts."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, labels, test_size=TEST_IMAGES, stratify=labels, random_state=seed)
    train_x, test_x, train_y, test_y = (torch.as_tensor(part, device=device) for part in parts)
    return Digits(train_x.float(), train_y.long(), test_x.float(), test_y.long())


@dataclass(frozen=True)
class Task:
    """What is trained.

    Attributes:
        name: as shown.
        widths: of the layers of a multi-layer perceptron.
        activation: between them.
        loss: ``loss(outputs, images, labels)``, a mean over images.
        metric: what ``score`` is.
        score: ``score(outputs, images, labels)``, on the test set.
    """

    name: str
    widths: tuple[int, ...]
    activation: type[nn.Module]
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    metric: str
    score: Callable[[Tensor, Tensor, Tensor], Tensor]

    def model(self, seed: int) -> nn.Sequential:
        """A new model; the same seed gives the same weights."""
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for in_, out in pairwise(self.widths):
            layers += [nn.Linear(in_, out), self.activation()]
        return nn.Sequential(*layers[:-1])


def squared_error(outputs: Tensor, images: Tensor, _labels: Tensor) -> Tensor:
    """Summed over the pixels of an image, averaged over images."""
    return (outputs - images).square().sum(1).mean()


def _cross_entropy(outputs: Tensor, _images: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(outputs, labels)


def _errors(outputs: Tensor, _images: Tensor, labels: Tensor) -> Tensor:
    return (outputs.argmax(1) != labels).float().mean() * 100


TASKS = (
    Task(
        name="Auto-encoder",
        widths=(64, 128, 64, 32, 16, 32, 64, 128, 64),
        activation=nn.Tanh,
        loss=squared_error,
        metric="test loss",
        score=squared_error,
    ),
    Task(
        name="Classifier",
        widths=(64, 256, 256, 10),
        activation=nn.ReLU,
        loss=_cross_entropy,
        metric="test errors %",
        score=_errors,
    ),
)
