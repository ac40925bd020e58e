"""Operators that a trace could get wrong: they train as in eager mode, fall back by name, or are refused."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.utils import parametrizations, parametrize
from torch.utils import _pytree as pytree

import oracle
import thor_fx
from models import Case, dense, labels, params_of, random
from thor_fx.passes.outputs import Grad, Mutation, output_nodes
from thor_fx.schedule import Schedule
from thor_fx.transform import add_decayed_weights, heavy_ball, scale_by_learning_rate
from training import assert_moved, assert_same, by_both_doors, by_drop_in_door, by_functional_door, snapshot

ROWS, IN, HIDDEN, CLASSES, WORDS, STEPS = 7, 5, 6, 3, 9, 5
SETTINGS: dict[str, Any] = {"lr": 0.05, "damping": 0.1, "momentum": 0.9, "frequency": 2}
LATER = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)


def build(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return make().double()


def numbers() -> list[tuple[Tensor, Tensor]]:
    return [(random(10 + i, torch.float64, ROWS, IN), labels(20 + i, CLASSES, ROWS)) for i in range(STEPS)]


def words() -> list[tuple[Tensor, Tensor]]:
    return [(labels(10 + i, WORDS, ROWS, 4), labels(20 + i, CLASSES, ROWS)) for i in range(STEPS)]


def loss_of(model: nn.Module) -> Callable[..., Tensor]:
    def loss_fn(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, dict(p), (x,)), y)

    return loss_fn


def assert_gradients_are_those_of_eager(make: Callable[[], nn.Module], x: Tensor, y: Tensor) -> None:
    eager = build(make)
    F.cross_entropy(eager(x), y).backward()
    model = build(make)
    params = snapshot(dict(model.named_parameters()))
    step = thor_fx.trace_step(loss_of(model), params, x, y)
    with torch.no_grad():
        values = dict(zip(output_nodes(step), step(*params.values(), x, y), strict=True))
    for name, parameter in eager.named_parameters():
        torch.testing.assert_close(values[Grad(name)], parameter.grad, rtol=1e-12, atol=1e-14)


def train_by_both_doors(make: Callable[[], nn.Module], data: list[tuple[Tensor, Tensor]]) -> None:
    trajectory = by_both_doors(lambda: build(make), data, 1e-9, **SETTINGS)
    assert_moved(trajectory, snapshot(dict(build(make).named_parameters())))


def reasons_of(make: Callable[[], nn.Module], x: Tensor, y: Tensor) -> dict[str, str]:
    model = build(make)
    return dict(thor_fx.explain(loss_of(model), dict(model.named_parameters()), x, y).coverage.fallback)


# --- control flow ------------------------------------------------------------------------------------


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.other = nn.Linear(IN, IN), nn.Linear(IN, IN)
        self.head = nn.Linear(IN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cond(x.sum() > 0, lambda x: self.inner(x).tanh(), lambda x: self.other(x).sin(), (x,))
        return self.head(h)


class Looped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(IN, IN), nn.Linear(IN, CLASSES)


class Scan(Looped):
    def forward(self, x: Tensor) -> Tensor:
        def body(carry: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
            carry = self.inner(carry + row).tanh()
            return carry, carry.clone()

        return self.head(torch._higher_order_ops.scan(body, torch.zeros_like(x[0]), x)[1])


class While(Looped):
    def forward(self, x: Tensor) -> Tensor:
        def body(i: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            return i + 1, self.inner(x).tanh()

        start = torch.zeros((), dtype=torch.int64)
        return self.head(torch._higher_order_ops.while_loop(lambda i, _: i < 3, body, (start, x))[1])


class Mapped(Looped):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch._higher_order_ops.map(lambda row: self.inner(row).tanh(), x))


class PythonLoop(Looped):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.inner(x).tanh()
        return self.head(x)


CONTROL_FLOW = {
    "cond": Branches,
    "scan": pytest.param(Scan, marks=pytest.mark.skipif(not LATER, reason="torch 2.11 has no gradient")),
    "while_loop": While,
    "map": Mapped,
}
EVERY_CONTROL_FLOW = pytest.mark.parametrize(
    ("name", "make"),
    [
        pytest.param(name, *getattr(make, "values", (make,)), marks=getattr(make, "marks", ()), id=name)
        for name, make in CONTROL_FLOW.items()
    ],
)


@EVERY_CONTROL_FLOW
def test_a_weight_inside_control_flow_falls_back_by_name(name, make):
    reasons = reasons_of(make, *numbers()[0])
    assert name in reasons["inner.weight"]
    assert "head.weight" not in reasons


@EVERY_CONTROL_FLOW
@pytest.mark.filterwarnings("ignore:Error detected in .*Backward:UserWarning")  # torch's, 2.11
def test_control_flow_trains(name, make):
    data = numbers()
    functional = by_functional_door(build(make), data, **SETTINGS)
    model = thor_fx.compile(build(make), backend="aot_eager", fullgraph=True)  # while_loop needs one graph
    optimizer = thor_fx.Thor(model, **SETTINGS)
    for expected, (x, y) in zip(functional, data, strict=True):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_same([snapshot(dict(model.named_parameters()))], [expected], rtol=1e-9)
    assert name in optimizer.coverage.fallback["inner.weight"]


@EVERY_CONTROL_FLOW
def test_gradients_through_control_flow(name, make):
    assert_gradients_are_those_of_eager(make, *numbers()[0])


def test_a_loop_of_python_has_one_site_per_turn():
    model, (x, y) = build(PythonLoop), numbers()[0]
    found = thor_fx.factors(loss_of(model), dict(model.named_parameters()), x, y)
    assert found["inner.weight"].rows == 3 * ROWS
    train_by_both_doors(PythonLoop, numbers())


# --- attention ---------------------------------------------------------------------------------------

HEADS, WIDTH, TIME = 4, 2, 5  # of 8 features


class Attention(nn.Module):
    def __init__(self, attend: Callable[..., Tensor], groups: int = HEADS) -> None:
        super().__init__()
        self.q = nn.Linear(IN, HEADS * WIDTH)
        self.k = nn.Linear(IN, groups * WIDTH, bias=False)  # a bias of keys has the gradient zero
        self.v, self.o = nn.Linear(IN, groups * WIDTH), nn.Linear(HEADS * WIDTH, CLASSES)
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        heads = (f(x).unflatten(-1, (-1, WIDTH)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(self.attend(*heads).transpose(1, 2).flatten(2)).mean(1)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def flexible(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flex_attention(q, k, v, score_mod=_causal_score)


def _causal_score(score: Tensor, _b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return torch.where(i >= j, score, -float("inf"))


ATTENTION: dict[str, tuple[Callable[..., Tensor], int]] = {
    "sdpa": (F.scaled_dot_product_attention, HEADS),
    "causal": (causal, HEADS),
    "grouped": (grouped, 2),
    "flex": (flexible, HEADS),
}


def attention_case(name: str) -> Case:
    attend, groups = ATTENTION[name]
    model = Attention(attend, groups)
    params = snapshot(params_of(model, torch.float64))  # no leaves: flex_attention, on a CPU, would refuse

    def forward(tap, p, x, y):
        heads = (dense(tap, p, f, x).unflatten(-1, (-1, WIDTH)).transpose(1, 2) for f in "qkv")
        q, k, v = (h.repeat_interleave(HEADS // h.shape[1], 1) for h in heads)
        scores = q @ k.mT / WIDTH**0.5
        if name in {"causal", "flex"}:
            scores = scores.masked_fill(torch.ones(TIME, TIME, dtype=torch.bool).triu(1), -float("inf"))
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return F.cross_entropy(dense(tap, p, "o", mixed).mean(1), y)

    batch = random(1, torch.float64, 3, TIME, IN), labels(2, CLASSES, 3)
    layers = {n: tuple(p.shape) for n, p in params.items() if p.dim() == 2}
    return Case(name, loss_of(model), forward, params, batch, layers, 3 * TIME, "o.weight")


@pytest.mark.parametrize("name", ATTENTION)
def test_projections_around_attention_have_exact_factors(name):
    case = attention_case(name)
    found, expected = thor_fx.factors(case.loss_fn, case.params, *case.batch), oracle.factors(case)
    assert set(found) == set(case.layers)
    for layer, kronecker in found.items():
        assert oracle.relative_error(kronecker.A, expected[layer].A) < 1e-10
        assert oracle.relative_error(kronecker.G, expected[layer].G) < 1e-10


@pytest.mark.parametrize("name", [name for name in ATTENTION if name != "flex"])
def test_attention_trains(name):
    data = [(random(i, torch.float64, 3, TIME, IN), labels(9 + i, CLASSES, 3)) for i in range(STEPS)]
    train_by_both_doors(lambda: Attention(*ATTENTION[name]), data)


def test_flex_attention_has_no_backward_on_a_cpu_outside_a_compiled_step():
    """torch's own refusal; the functional door differentiates the graph, and trains."""
    data = [attention_case("flex").batch] * STEPS
    flex, same = partial(Attention, *ATTENTION["flex"]), partial(Attention, *ATTENTION["causal"])
    model = thor_fx.compile(build(flex), backend="aot_eager", fullgraph=True)
    thor_fx.Thor(model, **SETTINGS)
    with pytest.raises(RuntimeError, match="FlexAttention does not support backward on CPU"):
        model(data[0][0])
    trajectory = by_functional_door(build(flex), data, **SETTINGS)
    assert_same(trajectory, by_functional_door(build(same), data, **SETTINGS), rtol=1e-9)


# --- embeddings --------------------------------------------------------------------------------------


class Words(nn.Module):
    def __init__(self, table: nn.Module, weighted: bool = False) -> None:
        super().__init__()
        self.table, self.head, self.weighted = table, nn.Linear(HIDDEN, CLASSES), weighted

    def forward(self, x: Tensor) -> Tensor:
        weights = {"per_sample_weights": (x + 1.0).double().sqrt()} if self.weighted else {}
        h = self.table(x, **weights)
        return self.head(h.mean(1) if isinstance(self.table, nn.Embedding) else h)


TABLES: dict[str, Callable[[], nn.Module]] = {
    "max_norm": lambda: Words(nn.Embedding(WORDS, HIDDEN, max_norm=1.0)),
    "padding": lambda: Words(nn.Embedding(WORDS, HIDDEN, padding_idx=2, scale_grad_by_freq=True)),
    "bag_sum": lambda: Words(nn.EmbeddingBag(WORDS, HIDDEN, mode="sum")),
    "bag_mean": lambda: Words(nn.EmbeddingBag(WORDS, HIDDEN, mode="mean")),
    "bag_max": lambda: Words(nn.EmbeddingBag(WORDS, HIDDEN, mode="max")),
    "bag_weighted": lambda: Words(nn.EmbeddingBag(WORDS, HIDDEN, mode="sum"), weighted=True),
    "bag_max_norm": lambda: Words(nn.EmbeddingBag(WORDS, HIDDEN, mode="sum", max_norm=1.0)),
}
EVERY_TABLE = pytest.mark.parametrize("name", TABLES)


@EVERY_TABLE
def test_gradients_of_embeddings(name):
    assert_gradients_are_those_of_eager(TABLES[name], *words()[0])


@EVERY_TABLE
def test_embeddings_train(name):
    train_by_both_doors(TABLES[name], words())


SPARSE = {
    "embedding": lambda: Words(nn.Embedding(WORDS, HIDDEN, sparse=True)),
    "bag": lambda: Words(nn.EmbeddingBag(WORDS, HIDDEN, sparse=True)),
}


@pytest.mark.parametrize("make", SPARSE.values(), ids=SPARSE.keys())
@pytest.mark.parametrize("door", [by_functional_door, by_drop_in_door])
def test_sparse_gradients_are_refused_by_name(door, make):
    with pytest.raises(TypeError, match=r"the gradient of 'table\.weight' is .*sparse=False on"):
        door(build(make), words(), **SETTINGS)


def test_a_frozen_sparse_embedding_is_fine():
    model, (x, y) = build(SPARSE["embedding"]), words()[0]
    model.table.requires_grad_(False)
    assert set(thor_fx.factors(loss_of(model), dict(model.named_parameters()), x, y)) == {"head.weight"}


# --- parameters that forward changes -----------------------------------------------------------------


class Clipped(nn.Module):
    """Its weight is kept in a box by the forward pass itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(HIDDEN, IN)), nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.clamp_(-0.5, 0.5)
        return self.head(F.linear(x, self.weight).tanh())


def sgd(model: nn.Module, data: list[tuple[Tensor, Tensor]], **settings: Any) -> list[dict[str, Tensor]]:
    optimizer, trajectory = torch.optim.SGD(model.parameters(), **settings), []
    for x, y in data:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        trajectory.append(snapshot(dict(model.named_parameters())))
    return trajectory


MUTATING = {"max_norm": (TABLES["max_norm"], words), "bag": (TABLES["bag_max_norm"], words)}
MUTATING |= {"clipped": (Clipped, numbers)}


@pytest.mark.parametrize("donate", [True, False])
@pytest.mark.parametrize("name", MUTATING)
def test_the_update_starts_from_what_forward_left(name, donate):
    """As with an optimizer of torch: forward, then backward, then the update of the changed weight."""
    make, data = MUTATING[name][0], MUTATING[name][1]()
    rates = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1}
    reference = sgd(build(make), data, **rates)
    tx = thor_fx.chain(
        add_decayed_weights(Schedule("weight_decay", rates["weight_decay"]), lambda _name: True),
        heavy_ball(Schedule("momentum", rates["momentum"])),
        scale_by_learning_rate(Schedule("lr", rates["lr"])),
    )
    step = thor_fx.compile_step(loss_of(build(make)), tx, backend="eager", donate=donate)
    params: Any = snapshot(dict(build(make).named_parameters()))
    start = snapshot(params)
    state = step.init(params, *data[0])
    trajectory = []
    for x, y in data:
        before = params
        params, state, _ = step(params, state, x, y)
        trajectory.append(snapshot(params))
        assert donate or before is not params
    assert_same(trajectory, reference)
    assert_moved(trajectory, start)


def test_clipped_weights_have_factors_of_the_clipped_weight():
    train_by_both_doors(Clipped, numbers())
    model, (x, y) = build(Clipped), numbers()[0]
    report = thor_fx.explain(loss_of(model), dict(model.named_parameters()), x, y)
    assert set(report.coverage.layers) == {"weight", "head.weight"}
    params = list(dict(model.named_parameters()))
    (mutation,) = [d for d in output_nodes(report.step) if isinstance(d, Mutation)]
    assert params[mutation.index] == "weight"


# --- parametrisations --------------------------------------------------------------------------------


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).mT


def symmetric() -> nn.Module:
    layer = nn.Linear(IN, IN)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


PARAMETRIZED: dict[str, Callable[[], nn.Module]] = {
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(IN, IN)),
    "householder": lambda: parametrizations.orthogonal(nn.Linear(IN, IN - 1)),
    "matrix_exp": lambda: parametrizations.orthogonal(nn.Linear(IN, IN), orthogonal_map="matrix_exp"),
    "cayley": lambda: parametrizations.orthogonal(nn.Linear(IN, IN), orthogonal_map="cayley"),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(IN, IN)),
    "old_spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(IN, IN)),
    "symmetric": symmetric,
}
EVERY_PARAMETRIZATION = pytest.mark.parametrize("name", PARAMETRIZED)


def under_a_head(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        layer = PARAMETRIZED[name]()
        return nn.Sequential(layer, nn.Tanh(), nn.Linear(layer.out_features, CLASSES))

    return make


@EVERY_PARAMETRIZATION
def test_gradients_of_parametrised_weights(name):
    assert_gradients_are_those_of_eager(under_a_head(name), *numbers()[0])


@EVERY_PARAMETRIZATION
def test_parametrised_weights_train(name):
    trajectory = by_both_doors(lambda: build(under_a_head(name)), numbers(), 1e-9, **SETTINGS)
    start = snapshot(dict(build(under_a_head(name)).named_parameters()))
    for before, after in itertools.pairwise([start, *trajectory]):
        assert all(value.isfinite().all() for value in after.values())
        assert not torch.equal(before["2.weight"], after["2.weight"])


@EVERY_PARAMETRIZATION
def test_parametrised_weights_have_a_reason(name):
    reasons = reasons_of(under_a_head(name), *numbers()[0])
    assert any("no product of matrices" in why for n, why in reasons.items() if n.startswith("0."))
    assert "2.weight" not in reasons


# --- tensors that are more than tensors --------------------------------------------------------------


class Quantised(Tensor):
    """Bytes and a scale; every operator sees their product."""

    @staticmethod
    def __new__(cls, data: Tensor, scale: Tensor) -> "Quantised":
        return Tensor._make_wrapper_subclass(cls, data.shape, dtype=scale.dtype, device=data.device)

    def __init__(self, data: Tensor, scale: Tensor) -> None:
        self.bytes, self.scale = data, scale

    def __repr__(self) -> str:
        return "Quantised()"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["bytes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], _meta: Any, _size: Any, _stride: Any) -> "Quantised":
        return Quantised(inner["bytes"], inner["scale"])

    def dequantise(self) -> Tensor:
        return self.bytes.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in {torch.ops.aten.detach.default, torch.ops.aten.alias.default}:
            return Quantised(args[0].bytes, args[0].scale)
        args, kwargs = pytree.tree_map_only(Quantised, Quantised.dequantise, (args, kwargs or {}))
        return func(*args, **kwargs)


class Adapted(nn.Module):
    """Low-rank adapters beside a quantised weight."""

    def __init__(self, frozen: bool = True) -> None:
        super().__init__()
        w = random(4, torch.float64, HIDDEN, IN)
        scale = w.abs().amax() / 127
        data = Quantised((w / scale).round().to(torch.int8), scale)
        self.base = nn.Parameter(data, requires_grad=not frozen)
        self.down, self.up = nn.Linear(IN, 2, bias=False), nn.Linear(2, HIDDEN, bias=False)
        self.head = nn.Linear(HIDDEN, CLASSES)
        for layer in (self.down, self.up, self.head):
            layer.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head((F.linear(x, self.base) + self.up(self.down(x))).tanh())


def test_a_trained_subclass_is_refused_by_name():
    model, (x, y) = Adapted(frozen=False), numbers()[0]
    message = r"params\['base'\] must be a plain tensor, got Quantised: freeze it"
    with pytest.raises(TypeError, match=message):
        thor_fx.compile(model)
    with pytest.raises(TypeError, match=message):
        thor_fx.factors(loss_of(model), dict(model.named_parameters()), x, y)


def test_adapters_of_a_frozen_quantised_weight_train():
    model = thor_fx.compile(Adapted(), backend="aot_eager")
    optimizer, losses = thor_fx.Thor(model, **SETTINGS), []
    for x, y in numbers()[:1] * 6:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert set(optimizer.coverage.layers) == {"down.weight", "up.weight", "head.weight"}


def test_a_subclass_in_the_functional_door_is_refused():
    model, (x, y) = Adapted(), numbers()[0]
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(TypeError, match=r"loss_fn reads a Quantised; .*thor_fx\.compile\(model\)"):
        thor_fx.factors(loss_of(model), params, x, y)
