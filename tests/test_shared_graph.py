"""``shared_graph=True``: plain steps run the graph of factor steps, and leave out its products."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import thor_fx
from thor_fx import factor_graphs
from thor_fx.compile import collector_of
from thor_fx.passes import Factor, emit_factors, outputs
from thor_fx.passes.gates import COPIES, GATED, PRODUCTS, gate, gated
from thor_fx.passes.outputs import Statistic
from thor_fx.passes.splice import splice
from thor_fx.passes.symmetric import KERNEL
from training import (
    MODELS,
    Parameters,
    assert_moved,
    batches,
    build,
    classifier_loss,
    identical,
    snapshot,
    train,
)

aten, ours = torch.ops.aten, torch.ops.thor_fx
THOR: dict[str, Any] = {"lr": 0.02, "damping": 0.1, "momentum": 0.9, "frequency": 3}
STEPS = 7


class Mixed(nn.Module):
    """A convolution, a lookup and a norm: factors that are more than products."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.convolution = nn.Embedding(4, 5), nn.Conv1d(1, 2, 3)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.table((x.sum(1) > 0).long())
        return self.head(self.norm(self.convolution(x[:, None]).flatten(1).tanh()))


class Images(nn.Module):
    """A convolution with two axes, whose ``A`` is one operator."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.head = nn.Conv2d(1, 3, 2), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.convolution(x[:, None, None].tile(2, 1)).tanh().flatten(1))


class Wide(nn.Module):
    """A side of so many features that its product is made by panels; many rows from few."""

    def __init__(self) -> None:
        super().__init__()
        self.spread, self.head = nn.Linear(5, 256), nn.Linear(256, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.spread(x)[:, None] * torch.linspace(0.5, 1.0, 150, dtype=x.dtype)[:, None]
        return self.head(rows.tanh()).mean(1)


MADE_BY = {**MODELS, "mixed": Mixed, "images": Images}


class Gates:
    """What gated products are asked; where they are not wanted they spoil whatever reads them."""

    def __init__(self, library: torch.library.Library) -> None:
        self.asked: list[bool] = []
        for operator in GATED:
            library.impl(gated(operator)._opname, partial(self._made, operator), "CPU")

    def _made(self, operator: Any, wanted: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if operator in PRODUCTS:
            self.asked.append(bool(wanted))
        if wanted:
            return operator(*args, **kwargs)
        return GATED[operator](*args, **kwargs).fill_(torch.nan)

    def take(self) -> list[bool]:
        taken, self.asked = self.asked, []
        return taken


@pytest.fixture
def library():
    """Where operators get other kernels for the time of a test."""
    library = torch.library.Library("thor_fx", "IMPL")
    yield library
    library._destroy()


@pytest.fixture
def asked(library):
    return Gates(library)


def trained(
    make: Any = MODELS["mlp"],
    backend: str = "aot_eager",
    shared: bool = True,
    **settings: Any,
) -> list[Parameters]:
    model = thor_fx.compile(build(make), backend=backend, shared_graph=shared)
    return train(model, thor_fx.Thor(model, **THOR | settings), batches(STEPS))


@pytest.mark.parametrize("make", MADE_BY.values(), ids=MADE_BY)
def test_steps_are_those_of_two_graphs_bit_by_bit(make, asked):
    together = trained(make)
    assert {True, False} == set(asked.take())
    assert all(map(identical, together, trained(make, shared=False)))
    assert asked.take() == []
    assert_moved(together, snapshot(dict(build(make).named_parameters())))


@pytest.mark.parametrize(
    "settings",
    [
        {"factor_decay": 0.9},
        {"block_size": 2},
        {"bias": "joint"},
        {"rows": 0.5},
        {"inverse": "eva"},
        {"refresh": thor_fx.Staggered(parts=2)},
        {"factor_dtype": torch.bfloat16},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_options_are_those_of_two_graphs_bit_by_bit(settings, asked):
    assert all(map(identical, trained(**settings), trained(shared=False, **settings)))


def test_plain_steps_leave_products_out(asked):
    model = thor_fx.compile(build(MODELS["mlp"]), backend="aot_eager", shared_graph=True)
    optimizer = thor_fx.Thor(model, **THOR)
    kinds = []
    for batch in batches(STEPS):
        train(model, optimizer, [batch])
        kinds.append(asked.take())
    assert {len(kind) for kind in kinds} == {4}  # A and G of two layers
    assert [all(kind) for kind in kinds] == [step % 3 == 0 for step in range(STEPS)]
    assert not any(any(kind) for kind in kinds if not all(kind))


@pytest.mark.parametrize(
    ("make", "product"),
    [(Images, ours.patch_gram.default), (Wide, ours.gram_by_panels.default)],
    ids=["patches", "panels"],
)
def test_operators_of_our_own_are_left_out(make, product, library):
    """By counting what is computed, not what is asked."""
    computed: list[Tensor] = []

    def counted(*operands: Any) -> Tensor:
        computed.append(PRODUCTS[product](*operands).fill_(1.0))
        return computed[-1]

    library.impl(product._opname, counted, "CPU")
    model = thor_fx.compile(build(make), backend="aot_eager", shared_graph=True)
    optimizer, counts = thor_fx.Thor(model, **THOR | {"block_size": None}), []
    for batch in batches(STEPS):
        train(model, optimizer, [batch])
        counts.append(len(computed))
        computed.clear()
    assert counts == [1, 0, 0, 1, 0, 0, 1]


def test_one_graph_is_compiled(monkeypatch):
    made: list[str] = []
    for name in ("compile_differentiable", "compile_as_torch_does"):
        function = getattr(factor_graphs, name)

        def counted(*args: Any, name: str = name, function: Any = function, **kwargs: Any) -> Any:
            made.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(factor_graphs, name, counted)
    model = thor_fx.compile(build(MODELS["mlp"]), backend="aot_eager", shared_graph=True)

    def never(*_: Any, **__: Any) -> Any:
        pytest.fail("the graph of torch.compile runs")

    monkeypatch.setattr(model._compiled_call_impl, "_plain", never)
    train(model, thor_fx.Thor(model, **THOR), batches(STEPS))
    assert made == ["compile_differentiable"]


def test_evaluation_runs_what_torch_compiles(asked):
    model = thor_fx.compile(build(MODELS["mlp"]), backend="aot_eager", shared_graph=True)
    (x, _), *_ = batches(1)
    expected = build(MODELS["mlp"])(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model.eval()(x), expected)
    assert asked.take() == []


def test_what_is_wanted_is_decided_in_the_forward_pass(asked):
    """Two runs, one with and one without factors, whose backward passes come together."""
    model = thor_fx.compile(build(MODELS["mlp"]), backend="aot_eager", shared_graph=True)
    (x, y), (other, labels) = batches(2)
    measured = F.cross_entropy(model(x), y)
    collector = collector_of(model)
    collector.wanted = False
    (measured + F.cross_entropy(model(other), labels)).backward()
    assert sorted(asked.take()) == 4 * [False] + 4 * [True]
    (graph,) = collector.graphs
    augmented = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    sums = graph.take()[Factor("0.weight", "A")]
    assert any(torch.allclose(sums, a.T @ a) for a in (x, augmented))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_graph_break_makes_two_graphs_of_each_kind(asked):
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.last(x.tanh())

    assert all(map(identical, trained(Broken), trained(Broken, shared=False)))


def test_statistics_are_those_of_factor_steps():
    def norms(gm: Any) -> None:
        gradient = outputs.output_nodes(gm)[outputs.Grad("0.weight")]
        norm = splice(gradient, torch.linalg.vector_norm, gradient)
        outputs.append(gm, [(Statistic("norm", "0.weight"), norm)])

    model = thor_fx.compile(build(MODELS["mlp"]), backend="aot_eager", shared_graph=True, passes=[norms])
    optimizer = thor_fx.Thor(model, **THOR)
    found = []
    for x, y in batches(4):
        F.cross_entropy(model(x), y).backward()
        found.append(bool(thor_fx.statistics(model)))
        optimizer.step()
        optimizer.zero_grad()
    assert found == [True, False, False, True]


def test_compiled_steps_are_the_same():
    for one, other in zip(trained(backend="inductor"), trained(shared=False), strict=True):
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-11, atol=1e-12)


# --- the pass ----------------------------------------------------------------------------------------


def test_products_of_the_gradient_stay_as_they_are():
    model = build(MODELS["mlp"])
    params = {name: p.detach() for name, p in model.named_parameters()}
    gm = thor_fx.trace_step(classifier_loss(model), params, *batches(1)[0])
    plain = _products(gm)
    emit_factors(gm)
    with_factors = _products(gm)
    last = gm.graph.find_nodes(op="placeholder")[-1]
    with gm.graph.inserting_after(last):
        wanted = gm.graph.placeholder("wanted")
    factors = [descriptor for descriptor in outputs.output_nodes(gm) if isinstance(descriptor, Factor)]
    assert gate(gm, wanted, factors) == len(factors) == with_factors - plain
    assert _products(gm) == plain
    asking = gm.graph.find_nodes(op="call_function", target=gated(aten.mm.default))
    assert len(asking) == len(factors)
    assert all(node.args[0] is wanted for node in asking)


def _products(gm: Any) -> int:
    return sum(node.target in PRODUCTS for node in gm.graph.nodes)


ROWS = torch.linspace(-1, 1, 1200).view(1, 3, 400)
CONVOLUTION = 1, [2, 2], [1, 1], [0, 0], [1, 1], [0, 0], False, 1
OPERATORS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "mm": (aten.mm.default, (ROWS[0], ROWS[0].T)),
    "bmm": (aten.bmm.default, (ROWS, ROWS.mT)),
    "panels": (ours.gram_by_panels.default, (ROWS.view(4, 300),)),
    "patches": (ours.patch_gram.default, (ROWS.view(1, 3, 20, 20), *CONVOLUTION)),
    "clone": (aten.clone.default, (ROWS,)),
    "pad": (aten.constant_pad_nd.default, (ROWS, [1, 2])),
    "pad, two axes": (aten.constant_pad_nd.default, (ROWS, [0, 5, 2, -1], 3.0)),
}


@pytest.mark.parametrize(("operator", "given"), OPERATORS.values(), ids=OPERATORS)
def test_the_operators_are_sound(operator: Any, given: tuple[Any, ...]):
    for wanted in (torch.tensor(True), torch.tensor(False)):
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(gated(operator), (wanted, *given), test_utils=tests)
    made, left_out = (gated(operator)(torch.tensor(wanted), *given) for wanted in (True, False))
    assert torch.equal(made, operator(*given))
    assert (left_out.shape, left_out.stride(), left_out.dtype) == (made.shape, made.stride(), made.dtype)


def copied(function: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """How many copies of a function's the pass gates."""
    gm, factor = make_fx(lambda x: (function(x),))(x), Factor("weight", "A")
    outputs.describe(gm, [outputs.Input(0)], [factor])
    with gm.graph.inserting_before(gm.graph.find_nodes(op="placeholder")[0]):
        wanted = gm.graph.placeholder("wanted")
    gate(gm, wanted, [factor])
    return sum(node.target in map(gated, COPIES) for node in gm.graph.nodes)


def test_copies_that_move_something_are_left_out():
    x = torch.ones(4, 6)
    assert copied(lambda x: F.pad(x, (0, 2)), x) == 1
    assert copied(lambda x: x.T.contiguous(), x) == 1
    assert copied(lambda x: F.pad(x, (0, 0)), x) == 0, "compilers drop it"
    assert copied(lambda x: x.clone(), x) == 0, "likewise"
    assert copied(lambda x: x.T.clone(), x) == 0, "its result is as it lies"
    assert copied(lambda x: x.T.contiguous(), x.long()) == 0, "an index may be read from it"


def test_results_of_a_gpu_have_the_right_form():
    """On fake tensors: products that return float32 of rounded rows, and the kernel where there is Triton."""
    with FakeTensorMode():
        rows, wanted = torch.empty(2, 2048, 512, dtype=torch.bfloat16), torch.tensor(True)
        operands: dict[Any, tuple[Any, ...]] = {
            aten.mm.dtype: (rows[0].T, rows[0], torch.float32),
            aten.bmm.dtype: (rows.mT, rows, torch.float32),
        }
        operands |= {KERNEL: (rows,)} if KERNEL is not None else {}
        assert {*(operator for operator, _ in OPERATORS.values()), *operands} == set(GATED)
        for product, given in operands.items():
            found = gated(product)(wanted, *given)
            assert found.shape == (2, 512, 512)[-given[0].dim() :]
            assert found.dtype == torch.float32


# --- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"shared_graph": 1}, TypeError, "shared_graph must be True or False"),
        ({"factor_backend": "eager"}, ValueError, "factor_backend must be None, got 'eager'"),
        ({"mode": "reduce-overhead"}, ValueError, "leave out shared_graph, or mode='reduce-overhead'"),
        ({"options": {"triton.cudagraphs": True}}, ValueError, "leave out shared_graph, or mode=None"),
    ],
)
def test_what_does_not_go_with_it_is_named(arguments, error, match):
    with pytest.raises(error, match=match):
        thor_fx.compile(nn.Linear(3, 2), **{"backend": "aot_eager", "shared_graph": True, **arguments})


def test_other_fishers_are_refused():
    model = thor_fx.compile(build(MODELS["mlp"]), backend="aot_eager", shared_graph=True)
    with pytest.raises(ValueError, match=r"fisher='sampled' .* leave one of them out"):
        thor_fx.Thor(model, **THOR, fisher="sampled")
