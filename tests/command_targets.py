"""Models that tests of the command line name as ``command_targets:build_mlp``."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


def build_mlp() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(16, 8)


def build_loss() -> tuple[Any, ...]:
    model, x = build_mlp()
    y = torch.arange(16) % 3

    def loss_fn(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(model, params, (x,)), y)

    return loss_fn, dict(model.named_parameters()), x, y


class Builders:
    @staticmethod
    def convolution() -> tuple[nn.Module, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
        return model, torch.ones(5, 2, 4, 4)


def without_inputs() -> nn.Module:
    return nn.Linear(2, 2)


def a_number() -> int:
    return 3


def without_layers() -> tuple[Any, ...]:
    return lambda params, x: (params["w"] * x).sum(), {"w": torch.ones(3)}, torch.ones(3)


NUMBER = 4
