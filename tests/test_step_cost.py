"""Costs of steps, counted by hand: operations, bytes, and what is kept."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.func import functional_call

import thor_fx
from thor_fx.passes import canonicalize, emit_factors, run
from thor_fx.passes.phases import mark
from thor_fx.rates import Rates, measured_rates
from thor_fx.step_cost import StepCost, step_cost

RATES = Rates(flops=1e9, bytes=1e9)
R, I, H, O = 70, 6, 5, 4  # noqa: E741 - rows, and the sides of two matrices
FLOAT = 4


def graph_of(model: nn.Module, x: Tensor, passes: Any = ()) -> fx.GraphModule:
    """The step graph of a model whose outputs are fitted to others."""
    y = torch.randn_like(model(x))

    def loss_fn(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(functional_call(model, params, (x,)), y, reduction="sum")

    step = thor_fx.trace_step(loss_fn, dict(model.named_parameters()), x, y)
    return run(step, [canonicalize, *passes, mark])


def cost_of(model: nn.Module, x: Tensor, passes: Any = ()) -> StepCost:
    return step_cost(graph_of(model, x, passes), "plain", RATES)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(I, H), nn.GELU(), nn.Linear(H, O))


def product(rows: int, inner: int, columns: int) -> int:
    """The numbers that a product of two matrices reads and writes."""
    return rows * inner + inner * columns + rows * columns


def test_operations_and_bytes_of_two_layers():
    cost = cost_of(mlp(), torch.randn(R, I))
    forward, backward = cost.phases["forward"], cost.phases["backward"]
    assert set(cost.phases) == {"forward", "backward"}
    assert forward.flops == 2 * R * (I * H + H * O)
    assert backward.flops == 2 * R * (I * H + 2 * H * O)
    products = product(R, I, H) + H + product(R, H, O) + O
    assert forward.bytes == FLOAT * (products + 2 * R * H + (2 * R * O + 1))
    pointwise = (3 * R * O + O) + (3 * R * H + H)  # each with the sum that is the gradient of a bias
    assert backward.bytes == FLOAT * (2 * product(R, H, O) + product(R, I, H) + pointwise)
    assert forward.floor == pytest.approx(max(forward.flops, forward.bytes) / 1e9)


def test_what_forward_keeps():
    cost = cost_of(mlp(), torch.randn(R, I))
    assert cost.saved == FLOAT * (2 * R * H + R * O), "on both sides of GELU, and the result"
    assert cost_of(nn.Linear(I, O), torch.randn(R, I)).saved == FLOAT * R * O


def test_what_lives_at_once():
    cost = cost_of(nn.Linear(I, O), torch.randn(R, I))
    arguments = I * O + O + R * I + R * O
    assert cost.peak == FLOAT * (arguments + 2 * R * O + 1 + 0), "the result, its gradient, and the loss"


def test_factors_cost_a_product_each():
    plain = cost_of(mlp(), torch.randn(R, I))
    cost = cost_of(mlp(), torch.randn(R, I), [emit_factors])
    factors = cost.phases["factors"]
    assert factors.flops == 2 * R * (I**2 + 2 * H**2 + O**2)
    counts = 3  # of rows, of both layers, and terms
    assert factors.bytes == FLOAT * (R * (I + 2 * H + O) + I**2 + 2 * H**2 + O**2 + counts)
    assert {phase: cost.phases[phase] for phase in plain.phases} == plain.phases
    assert cost.saved == plain.saved


def test_a_convolution():
    batch, channels, out, size = 2, 3, 8, 6
    cost = cost_of(nn.Conv2d(channels, out, 3, padding=1), torch.randn(batch, channels, size, size))
    weight, pixels = out * channels * 9, batch * size * size
    assert cost.phases["forward"].flops == 2 * pixels * weight
    assert cost.phases["backward"].flops == 2 * pixels * weight, "no gradient of the input"
    x, z = channels * pixels, out * pixels
    assert cost.phases["forward"].bytes == FLOAT * (x + weight + out + z + (2 * z + 1))


class Attention(nn.Module):
    """One matrix for queries, keys and values each."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv = heads, nn.Linear(width, 3 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v)


def test_an_attention():
    batch, length, width, heads = 2, 7, 8, 2
    cost = cost_of(Attention(width, heads), torch.randn(batch, length, width))
    matrix, pairs = 2 * batch * length * width * 3 * width, 2 * batch * length**2 * width
    assert cost.phases["forward"].flops == matrix + 2 * pairs
    assert cost.phases["backward"].flops == matrix + 5 * pairs, "with the scores once more"


def test_an_embedding_reads_what_it_looks_up():
    numbers, width, rows = 1000, 4, 5
    table = nn.Embedding(numbers, width)
    graph = graph_of(table, torch.randint(numbers, (rows,)))
    assert step_cost(graph, "plain", RATES).phases["forward"].bytes < FLOAT * numbers


def test_rates_of_this_machine():
    rates = measured_rates(torch.device("cpu"), scale=16)
    assert rates.seconds(10**9, 0) == pytest.approx(1e9 / rates.flops)
    assert rates.seconds(0, 10**9) == pytest.approx(1e9 / rates.bytes)
