"""The digits, and two tasks on them."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

HELD_OUT = 300  # images, for validation and for test

Measure = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``measure(outputs, pixels, labels)``, 0-D"""


@dataclass(frozen=True)
class Images:
    """Pixels of shape (N, 64) with values in [0, 1], and labels of shape (N,)."""

    pixels: Tensor
    labels: Tensor

    def batches(self, size: int, count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
        """Cut shuffled epochs into ``count`` batches; a rest too small for a batch is left out."""
        generator = torch.Generator().manual_seed(seed)
        per_epoch = len(self.labels) // size
        found: list[tuple[Tensor, Tensor]] = []
        while len(found) < count:
            order = torch.randperm(len(self.labels), generator=generator).to(self.labels.device)
            found += [(self.pixels[i], self.labels[i]) for i in order.split(size)[:per_epoch]]
        return found[:count]


@dataclass(frozen=True)
class Digits:
    """Three sets of images."""

    training: Images
    validation: Images
    test: Images


def load(seed: int, device: torch.device) -> Digits:
    """scikit-learn's copy of the UCI handwritten digits: 1,797 images of 8 x 8; split by ``seed``."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    pixels, test_pixels, labels, test_labels = train_test_split(
        pixels / 16, labels, test_size=HELD_OUT, stratify=labels, random_state=seed
    )
    pixels, validation_pixels, labels, validation_labels = train_test_split(
        pixels, labels, test_size=HELD_OUT, stratify=labels, random_state=seed
    )

    def images(of: Any, labelled: Any) -> Images:
        return Images(torch.as_tensor(of, device=device).float(), torch.as_tensor(labelled, device=device))

    return Digits(
        images(pixels, labels),
        images(validation_pixels, validation_labels),
        images(test_pixels, test_labels),
    )


@dataclass(frozen=True)
class Task:
    """What is trained.

    Attributes:
        name: as shown.
        widths: of the layers of a multi-layer perceptron.
        activation: between them.
        loss: a mean over images.
        metric: what ``score`` measures on the test set.
        score: see ``metric``.
    """

    name: str
    widths: tuple[int, ...]
    activation: type[nn.Module]
    loss: Measure
    metric: str
    score: Measure

    def model(self, seed: int) -> nn.Sequential:
        """A new model; the same seed gives the same weights."""
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for in_, out in pairwise(self.widths):
            layers += [nn.Linear(in_, out), self.activation()]
        return nn.Sequential(*layers[:-1])


def _squared_error(outputs: Tensor, pixels: Tensor, _labels: Tensor) -> Tensor:
    return (outputs - pixels).square().sum(1).mean()


def _cross_entropy(outputs: Tensor, _pixels: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(outputs, labels)


def _errors(outputs: Tensor, _pixels: Tensor, labels: Tensor) -> Tensor:
    return (outputs.argmax(1) != labels).float().mean() * 100


TASKS = (
    Task(
        name="Auto-encoder",
        widths=(64, 128, 64, 32, 16, 32, 64, 128, 64),
        activation=nn.Tanh,
        loss=_squared_error,
        metric="test loss",
        score=_squared_error,
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
