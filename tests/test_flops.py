"""Operations of convolutions, counted by hand: one multiplication and one addition each."""

import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call

import thor_fx
from thor_fx.flops import count_flops

BATCH, CHANNELS, OUT, SIZE = 2, 4, 8, 6


def products_by_hand(module: Any) -> int:
    """Pairs of a weight's entry and a pixel that it multiplies, of one example, padding included."""
    channels = CHANNELS // module.groups * OUT
    if isinstance(module, nn.ConvTranspose2d):  # every pixel is multiplied by every entry of its kernels
        return sum(channels * 3 * 3 for _ in itertools.product(range(SIZE), repeat=2))
    last = SIZE + 2 * module.padding[0] - 3
    places = len(range(0, last + 1, module.stride[0]))
    return sum(channels * 3 * 3 for _ in itertools.product(range(places), repeat=2))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("make", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("of_input", [False, True])
def test_a_convolution_takes_as_much_for_either_gradient_as_forward(make, stride, groups, of_input):
    module = make(CHANNELS, OUT, 3, stride=stride, padding=1, groups=groups)
    params = {name: p.detach() for name, p in module.named_parameters()}

    def loss_fn(p, x):
        x = x * p["scale"] if of_input else x
        return functional_call(module, {n: v for n, v in p.items() if n != "scale"}, (x,)).sin().mean()

    params["scale"] = torch.ones(1)
    step = thor_fx.trace_step(loss_fn, params, torch.randn(BATCH, CHANNELS, SIZE, SIZE))
    passes = 3 if of_input else 2  # forward, the gradient of the weight, that of the input
    assert count_flops(step) == 2 * BATCH * products_by_hand(module) * passes


def test_more_groups_are_less_work_and_the_share_of_factors_says_so():
    x = torch.randn(BATCH, CHANNELS, SIZE, SIZE)
    whole, grouped = (
        thor_fx.explain(nn.Conv2d(CHANNELS, OUT, 3, groups=groups, bias=False), x) for groups in (1, 4)
    )
    assert grouped.plain_flops * 4 == whole.plain_flops
    share = grouped.cost.factor_flops / grouped.plain_flops
    assert f"({share:+.0%})" in grouped.summary
