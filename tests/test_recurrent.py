"""Recurrent nets: every weight is used once per time step, and its factors sum over all of them."""

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence

import oracle
import thor_fx
from models import Case, Params, Tap, dense, labels, no_tap, params_of, random
from training import assert_moved, assert_same, by_drop_in_door, by_functional_door, snapshot

BATCH, TIME, IN, HIDDEN, PROJ, CLASSES = 3, 4, 5, 6, 2, 7
SETTINGS: dict[str, Any] = {"lr": 0.05, "damping": 0.1, "momentum": 0.9, "frequency": 3}
STEPS = 5


@dataclass(frozen=True)
class Net:
    """A recurrent module of torch under a linear head, and the arguments it is made with."""

    kind: type[nn.RNNBase]
    settings: Mapping[str, Any]

    def module(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return Headed(self.kind(IN, HIDDEN, **self.settings), self.option("batch_first")).to(dtype)

    def option(self, name: str, default: Any = False) -> Any:
        return self.settings.get(name, default)

    @property
    def width(self) -> int:
        return (self.option("proj_size") or HIDDEN) * (1 + self.option("bidirectional"))


class Headed(nn.Module):
    """The mean over time of what a recurrent module says, classified."""

    def __init__(self, rnn: nn.RNNBase, batch_first: bool) -> None:
        super().__init__()
        width = (rnn.proj_size or rnn.hidden_size) * (1 + rnn.bidirectional)
        self.rnn, self.head, self.time = rnn, nn.Linear(width, CLASSES), int(batch_first)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.rnn(x)
        return self.head(out.mean(self.time))


NETS = {
    "rnn": Net(nn.RNN, {}),
    "rnn_relu": Net(nn.RNN, {"nonlinearity": "relu", "bias": False, "batch_first": True}),
    "rnn_bidirectional": Net(nn.RNN, {"bidirectional": True, "num_layers": 2}),
    "gru": Net(nn.GRU, {}),
    "gru_stacked": Net(nn.GRU, {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False}),
    "gru_dropout": Net(nn.GRU, {"num_layers": 2, "dropout": 0.5}),
    "lstm": Net(nn.LSTM, {}),
    "lstm_stacked": Net(nn.LSTM, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    "lstm_no_bias": Net(nn.LSTM, {"bias": False}),
    "lstm_projection": Net(nn.LSTM, {"proj_size": PROJ, "num_layers": 2, "bidirectional": True}),
    "lstm_dropout": Net(nn.LSTM, {"num_layers": 2, "dropout": 0.5, "batch_first": True}),
}
EVERY_NET = pytest.mark.parametrize("name", NETS)


# --- the same nets, written out ----------------------------------------------------------------------


def rnn_step(net: Net, tap: Tap, p: Params, at: str, x: Tensor, state: tuple[Tensor, ...]) -> tuple:
    s = gates(tap, p, at, "ih", x) + gates(tap, p, at, "hh", state[0])
    return ((s.relu() if net.option("nonlinearity") == "relu" else s.tanh()),)


def gru_step(_net: Net, tap: Tap, p: Params, at: str, x: Tensor, state: tuple[Tensor, ...]) -> tuple:
    (h,) = state
    x_r, x_z, x_n = gates(tap, p, at, "ih", x).chunk(3, -1)
    h_r, h_z, h_n = gates(tap, p, at, "hh", h).chunk(3, -1)
    r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
    n = (x_n + r * h_n).tanh()
    return ((1 - z) * n + z * h,)


def lstm_step(net: Net, tap: Tap, p: Params, at: str, x: Tensor, state: tuple[Tensor, ...]) -> tuple:
    h, c = state
    i, f, g, o = (gates(tap, p, at, "ih", x) + gates(tap, p, at, "hh", h)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return (gates(tap, p, at, "hr", h) if net.option("proj_size") else h), c


def gates(tap: Tap, p: Params, at: str, side: str, x: Tensor) -> Tensor:
    weight, bias = f"rnn.weight_{side}_{at}", f"rnn.bias_{side}_{at}"
    s = tap(weight, x, x @ p[weight].mT)
    return s + p[bias] if bias in p else s


STEP = {nn.RNN: rnn_step, nn.GRU: gru_step, nn.LSTM: lstm_step}


def one_direction(net: Net, tap: Tap, p: Params, at: str, inputs: list[Tensor]) -> list[Tensor]:
    zeros = inputs[0].new_zeros
    state = (zeros(BATCH, net.option("proj_size") or HIDDEN),)
    state += (zeros(BATCH, HIDDEN),) if net.kind is nn.LSTM else ()
    out = []
    for x in inputs:
        state = STEP[net.kind](net, tap, p, at, x, state)
        out.append(state[0])
    return out


def written_out(net: Net, tap: Tap, p: Params, x: Tensor) -> Tensor:
    """The output of :class:`Headed`."""
    sequence = list(x.unbind(1 if net.option("batch_first") else 0))
    for layer in range(net.option("num_layers", 1)):
        if layer and net.option("dropout"):
            sequence = list(F.dropout(torch.stack(sequence), net.option("dropout")))
        out = one_direction(net, tap, p, f"l{layer}", sequence)
        if net.option("bidirectional"):
            back = one_direction(net, tap, p, f"l{layer}_reverse", sequence[::-1])[::-1]
            out = [torch.cat(both, -1) for both in zip(out, back, strict=True)]
        sequence = out
    return dense(tap, p, "head", torch.stack(sequence).mean(0))


def case_of(name: str, dtype: torch.dtype = torch.float64) -> Case:
    net = NETS[name]
    model = net.module(dtype)
    params = params_of(model, dtype)
    shape = (BATCH, TIME, IN) if net.option("batch_first") else (TIME, BATCH, IN)
    batch = random(1, dtype, *shape), labels(2, CLASSES, BATCH)

    def loss_fn(p: Params, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, dict(p), (x,)), y)

    def forward(tap: Tap, p: Params, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(written_out(net, tap, p, x), y)

    layers = {name: tuple(p.shape) for name, p in params.items() if p.dim() == 2}
    return Case(name, loss_fn, forward, params, batch, layers, BATCH, "head.weight")


def assert_factors_are_exact(case: Case) -> None:
    torch.manual_seed(0)
    found = thor_fx.factors(case.loss_fn, case.params, *case.batch)
    torch.manual_seed(0)
    expected = oracle.factors(case)
    assert set(found) == set(case.layers)
    for layer, kronecker in found.items():
        assert (kronecker.rows, kronecker.n) == (expected[layer].rows, case.terms), layer
        assert oracle.relative_error(kronecker.A, expected[layer].A) < 1e-10, layer
        assert oracle.relative_error(kronecker.G, expected[layer].G) < 1e-10, layer


@EVERY_NET
def test_the_oracle_is_the_module(name):
    case = case_of(name)
    torch.manual_seed(0)
    expected = case.loss_fn(case.params, *case.batch)
    torch.manual_seed(0)
    torch.testing.assert_close(case.forward(no_tap, case.params, *case.batch), expected)


@EVERY_NET
def test_factors_equal_the_oracle(name):
    assert_factors_are_exact(case_of(name))


def test_rows_are_all_positions():
    case = case_of("lstm")
    found = thor_fx.factors(case.loss_fn, case.params, *case.batch)
    assert {name: k.rows for name, k in found.items()} == {
        "rnn.weight_ih_l0": TIME * BATCH,
        "rnn.weight_hh_l0": TIME * BATCH,
        "head.weight": BATCH,
    }


# --- training ----------------------------------------------------------------------------------------


def batches(net: Net, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    shape = (BATCH, TIME, IN) if net.option("batch_first") else (TIME, BATCH, IN)
    return [(random(10 + i, dtype, *shape), labels(20 + i, CLASSES, BATCH)) for i in range(STEPS)]


@pytest.mark.parametrize("name", [name for name in NETS if "dropout" not in name])
def test_both_doors_take_the_same_steps(name):
    net = NETS[name]
    functional = by_functional_door(net.module(), batches(net), **SETTINGS)
    drop_in = by_drop_in_door(net.module(), batches(net), **SETTINGS)
    assert_moved(functional, snapshot(dict(net.module().named_parameters())))
    assert_same(drop_in, functional, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["lstm", "gru", "lstm_dropout"])
def test_low_precision_trains(name, dtype):
    """On a CPU, torch takes oneDNN's fused layer for an LSTM of these types; its trace has no backward."""
    net = NETS[name]
    start = snapshot(dict(net.module(dtype).named_parameters()))
    for door in (by_functional_door, by_drop_in_door):
        assert_moved(door(net.module(dtype), batches(net, dtype), **SETTINGS), start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["rnn", "gru_stacked", "lstm_stacked"])
def test_losses_are_those_of_eager(name, dtype):
    net = NETS[name]
    data, eager = batches(net, dtype), net.module(dtype)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 0}

    def loss_fn(p: Params, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(eager, dict(p), (x,)), y)

    step = thor_fx.compile_step(loss_fn, thor_fx.thor(**SETTINGS), backend="eager")
    params: Mapping[str, Tensor] = snapshot(dict(eager.named_parameters()))
    state = step.init(params, *data[0])
    model = thor_fx.compile(net.module(dtype), backend="aot_eager")
    optimizer = thor_fx.Thor(model, **SETTINGS)
    for x, y in data:
        expected = loss_fn(params, x, y).detach()
        params, state, out = step(params, state, x, y)
        torch.testing.assert_close(out.loss, expected, **tolerance)
        loss = F.cross_entropy(model(x), y)
        torch.testing.assert_close(loss.detach(), expected, **tolerance)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
