"""Recurrent nets: every weight is used once per time step, and its factors sum over all of them."""

from collections.abc import Mapping
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
from training import assert_moved, by_both_doors, by_drop_in_door, by_functional_door, snapshot

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
# torch warns about the tensors between two of its own graphs
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
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


def case_of(name: str) -> Case:
    return case_of_module(NETS[name])


def case_of_module(net: Net) -> Case:
    dtype = torch.float64
    model = net.module(dtype)
    params = params_of(model, dtype)
    shape = (BATCH, TIME, IN) if net.option("batch_first") else (TIME, BATCH, IN)
    batch = random(1, dtype, *shape), labels(2, CLASSES, BATCH)

    def loss_fn(p: Params, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, dict(p), (x,)), y)

    def forward(tap: Tap, p: Params, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(written_out(net, tap, p, x), y)

    layers = {name: tuple(p.shape) for name, p in params.items() if p.dim() == 2}
    return Case("recurrent", loss_fn, forward, params, batch, layers, BATCH, "head.weight")


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
    trajectory = by_both_doors(net.module, batches(net), 1e-10, **SETTINGS)
    assert_moved(trajectory, snapshot(dict(net.module().named_parameters())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["lstm", "gru", "lstm_dropout"])
def test_low_precision_trains(name, dtype):
    """On a CPU, torch takes oneDNN's fused layer for an LSTM of these types; its trace has no backward."""
    net = NETS[name]
    start = snapshot(dict(net.module(dtype).named_parameters()))
    for door in (by_functional_door, by_drop_in_door):
        (*_, last) = door(net.module(dtype), batches(net, dtype), **SETTINGS)
        assert_moved([last], start)  # a single step may be less than a rounding


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


# --- cells, and loops of one's own -------------------------------------------------------------------


class Cells(nn.Module):
    """A loop in Python over a cell of torch; its kind is that of the net it equals."""

    def __init__(self, kind: type[nn.Module], bias: bool) -> None:
        super().__init__()
        self.cell, self.head = kind(IN, HIDDEN, bias=bias), nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        state, out = None, []
        for row in x:
            state = self.cell(row, state)
            out.append(state[0] if isinstance(state, tuple) else state)
        return self.head(torch.stack(out).mean(0))


CELLS = {nn.RNNCell: nn.RNN, nn.GRUCell: nn.GRU, nn.LSTMCell: nn.LSTM}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("kind", CELLS, ids=lambda kind: kind.__name__)
def test_cells_have_the_factors_of_the_module(kind, bias):
    case = case_of_module(Net(CELLS[kind], {"bias": bias}))
    cells = Cells(kind, bias).double()
    params = {_of_cell(name): p for name, p in case.params.items()}

    def loss_fn(p: Params, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(cells, dict(p), (x,)), y)

    found, expected = thor_fx.factors(loss_fn, params, *case.batch), oracle.factors(case)
    assert set(found) == {_of_cell(name) for name in expected}
    for name, pair in expected.items():
        assert found[_of_cell(name)].rows == pair.rows
        assert oracle.relative_error(found[_of_cell(name)].A, pair.A) < 1e-10
        assert oracle.relative_error(found[_of_cell(name)].G, pair.G) < 1e-10


def _of_cell(name: str) -> str:
    return name.replace("rnn.", "cell.").removesuffix("_l0")


@pytest.mark.parametrize("kind", CELLS, ids=lambda kind: kind.__name__)
def test_cells_train(kind):
    def make() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return Cells(kind, True).double()

    data = batches(NETS["rnn"])
    trajectory = by_both_doors(make, data, 1e-10, **SETTINGS)
    assert_moved(trajectory, snapshot(dict(make().named_parameters())))


def test_a_long_sequence():
    """One summand per step: more of them than Python allows calls inside each other."""
    x, w = random(1, torch.float64, 400, 2), {"w": random(2, torch.float64, 2, 2) / 4}

    def loss_fn(p: Params, x: Tensor) -> Tensor:
        h = x[:1]
        for row in x.split(1):
            h = (h @ p["w"] + row).tanh()
        return h.sum()

    assert thor_fx.factors(loss_fn, w, x)["w"].rows == 400


# --- what is not captured ----------------------------------------------------------------------------


class Packed(nn.Module):
    """Sequences of different lengths, as torch packs them."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(IN, HIDDEN), nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, [4, 3, 2])
        _, (h, _) = self.rnn(packed)
        return self.head(h[0])


def test_packed_sequences_in_the_functional_door_are_refused():
    model, (x, y) = Packed().double(), batches(NETS["lstm"])[0]

    def loss_fn(p: Params, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, dict(p), (x,)), y)

    with pytest.raises(RuntimeError, match="pack_padded_sequence") as caught:
        thor_fx.factors(loss_fn, dict(model.named_parameters()), x, y)
    assert any("train through thor_fx.compile(model)" in note for note in caught.value.__notes__)


@pytest.mark.filterwarnings(
    "ignore:no compiled graph uses the weights 'rnn.weight_ih_l0', 'rnn.weight_hh_l0'"
)
def test_packed_sequences_in_the_drop_in_door_fall_back():
    model = thor_fx.compile(Packed().double(), backend="aot_eager")
    optimizer = thor_fx.Thor(model, **SETTINGS)
    start = snapshot(dict(model.named_parameters()))
    trajectory = []
    for x, y in batches(NETS["lstm"]):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        trajectory.append(snapshot(dict(model.named_parameters())))
    assert_moved(trajectory, start)
    assert set(optimizer.coverage.layers) == {"head.weight"}


@pytest.mark.parametrize("name", ["lstm_dropout", "gru"])
def test_the_settings_of_torch_are_left_alone(name):
    net = NETS[name]
    before = _settings()
    by_functional_door(net.module(torch.float32), batches(net, torch.float32)[:1], **SETTINGS)
    by_drop_in_door(net.module(torch.float32), batches(net, torch.float32)[:2], **SETTINGS)
    assert _settings() == before


def _settings() -> list[Any]:
    rnns = torch._decomp.decompositions
    dynamo = torch._dynamo.config
    return [dynamo.allow_rnn, dynamo.specialize_float, rnns.mkldnn_one_layer_lstm, rnns._rnn_helper]


def test_dropout_between_layers_keeps_its_rate():
    """torch's decomposition has none."""
    rnn = nn.RNN(1, 400, num_layers=2, dropout=0.25, bias=False, nonlinearity="relu").double()
    params = {name: torch.zeros_like(p) for name, p in rnn.named_parameters()}
    params["weight_ih_l0"] += 1
    params["weight_hh_l0"] += 0
    params["weight_ih_l1"] = torch.eye(400, dtype=torch.float64)
    x = torch.ones(3, 1, 1, dtype=torch.float64)

    def loss_fn(p: Params, x: Tensor) -> tuple[Tensor, Tensor]:
        out, _ = functional_call(rnn, dict(p), (x,))
        return out.mean(), out

    step = thor_fx.compile_step(loss_fn, thor_fx.thor(**SETTINGS | {"lr": 0.0}), backend="eager")
    state = step.init(params, x)
    seen = []
    for _ in range(2):
        params, state, out = step(params, state, x)
        seen.append(out.aux == 0)
        assert abs(seen[-1].double().mean() - 0.25) < 0.05
    assert not torch.equal(*seen)
