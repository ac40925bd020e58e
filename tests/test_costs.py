"""The costs that ``explain`` shows are those of the graphs and states that run."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

import thor_fx
from thor_fx.costs import Cost, cost
from thor_fx.flops import count_flops
from thor_fx.layers import Layer, coverage
from thor_fx.options import Options
from thor_fx.passes import canonicalize, emit_factors, find_sites, run
from thor_fx.passes.outputs import Factor, output_nodes

SETTINGS: dict[str, Any] = {"lr": 0.1, "damping": 0.1, "momentum": 0.9}


def linear() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(10, 7), nn.Tanh(), nn.Linear(7, 5)), torch.randn(6, 10)


def pointwise() -> tuple[nn.Module, Tensor]:
    return nn.Conv2d(6, 5, 1), torch.randn(3, 6, 4, 4)


def strided() -> tuple[nn.Module, Tensor]:
    """Patches hardly overlap: they are written down."""
    return nn.Conv2d(4, 40, 3, stride=3), torch.randn(3, 4, 6, 6)


def grouped() -> tuple[nn.Module, Tensor]:
    return nn.Conv2d(8, 6, 1, groups=2), torch.randn(3, 8, 4, 4)


class Slices(nn.Module):
    """One matrix for every head."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def slices() -> tuple[nn.Module, Tensor]:
    return Slices(), torch.randn(3, 6, 5)


def embedding() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 3)), torch.arange(12).reshape(3, 4) % 11


MODELS = [linear, pointwise, strided, grouped, slices, embedding]
RULES: dict[str, dict[str, Any]] = {
    "dense": {},
    "cut": {"block_size": 3},
    "blocks": {"max_dim": 4, "block_size": 3},
    "diagonal": {"max_dim": 4, "long_side": "diagonal"},
    "identity": {"max_dim": 4, "long_side": "identity"},
    "joint": {"bias": "joint"},
    "joint, cut": {"bias": "joint", "block_size": 3},
}
CASES = [
    pytest.param(make, rules, id=f"{make.__name__}-{name}")
    for make in MODELS
    for name, rules in RULES.items()
]
UNLIKE = {"strided-blocks", "strided-cut", "strided-joint, cut"}
COUNTED = [case for case in CASES if case.id not in UNLIKE]
"""Few blocks of patches are cut from the whole; many are one grouped convolution, of which FlopCounterMode
counts all groups by all groups."""


def loss_of(model: nn.Module) -> Any:
    def loss_fn(params, x):
        return functional_call(model, dict(params), (x,)).square().mean()

    return loss_fn


def inverted(layer: Layer, block_size: int | None) -> int:
    """What the damped inverses of all blocks take: their part of ``factor_flops``, by hand."""
    total = 0
    for side in (layer.input, layer.output):
        size = side.block if side.kind == "blocks" else block_size or side.dim
        full, rest = divmod(side.dim, size)
        whole = side.kind in {"dense", "blocks"}
        total += side.groups * (full * size**3 + rest**3) * whole
    return total


def not_products(layer: Layer) -> int:
    """What is counted and no product of matrices: squares on a diagonal, the border of a bias."""
    total = 0
    for sums in layer.sums:
        for side in (sums.input, sums.output):
            if side.kind == "diagonal":
                total += 2 * sums.count * side.dim * side.groups
            elif side.joint:
                total += 2 * sums.count * (side.numel - replace(side, dim=side.dim - 1).numel)
    return total


def measured(gm: torch.fx.GraphModule, *args: Tensor) -> tuple[int, list[Tensor]]:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        values = torch.fx.Interpreter(gm).run(*args)
    return counter.get_total_flops(), list(values)


@pytest.mark.parametrize(("make", "settings"), COUNTED)
def test_costs_are_those_of_the_graph_that_runs(make, settings):
    model, x = make()
    params = dict(model.named_parameters())
    options = Options(**settings)
    step = run(thor_fx.trace_step(loss_of(model), params, x), [canonicalize])
    layers = coverage(find_sites(step), options.rules).layers
    graph = run(step, [lambda gm: emit_factors(gm, rules=options.rules)])
    args = [*(p.detach() for p in params.values()), x]
    plain, _ = measured(step, *args)
    total, values = measured(graph, *args)
    costs = {name: cost(layer, options.block_size) for name, layer in layers.items()}
    products = sum(
        costs[name].factor_flops - inverted(layer, options.block_size) - not_products(layer)
        for name, layer in layers.items()
    )
    assert layers
    assert total - plain == products
    sums = [v for d, v in zip(output_nodes(graph), values, strict=True) if isinstance(d, Factor)]
    assert sum(v.nbytes for v in sums) == sum(c.factor_bytes for c in costs.values())
    if make is not grouped:  # what torch counts there is wrong: see test_flops.py
        assert count_flops(step) == plain


@pytest.mark.parametrize(("make", "settings"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["single", "double"])
def test_the_bytes_of_inverses_are_those_of_the_state(make, settings, dtype):
    model, x = make()
    model, x = model.to(dtype), x.to(dtype) if x.is_floating_point() else x
    tx = thor_fx.thor(**SETTINGS, **settings)
    params = {name: p.detach() for name, p in model.named_parameters()}
    report = thor_fx.explain(loss_of(model), params, x, tx=tx)
    state = tx.init(params, report.coverage)
    inverses = [leaf for leaf in pytree.tree_leaves(found_inverses(state)) if isinstance(leaf, Tensor)]
    assert sum(leaf.nbytes for leaf in inverses) == report.cost.state_bytes


def found_inverses(state: Any) -> list[Any]:
    """The ``inverses`` of a chain of states."""
    if hasattr(state, "inverses"):
        return [state.inverses]
    children = state.values() if isinstance(state, dict) else state
    return [i for s in children for i in found_inverses(s)] if isinstance(children, tuple | list) else []


def test_what_preconditioning_takes_on_every_step():
    """``G^-1 g A^-1`` by blocks: two products for every block."""
    model, x = nn.Linear(10, 7, bias=False), torch.randn(6, 10)
    for block_size, expected in ((None, 2 * 70 * (10 + 7)), (5, 2 * 70 * 5 + 2 * 10 * (25 + 4))):
        report = thor_fx.explain(model, x, tx=thor_fx.thor(**SETTINGS, block_size=block_size))
        assert report.cost.step_flops == expected


@pytest.mark.parametrize("block_size", [None, 5, 3])
def test_the_products_of_preconditioning_are_counted(block_size):
    from thor_fx import blocks
    from thor_fx.passes.sides import Side

    left, right = (blocks.zeros(1, Side(d), block_size, torch.zeros(())) for d in (7, 10))
    with FlopCounterMode(display=False) as counter:
        blocks.precondition(left, torch.ones(1, 7, 10), right)
    report = thor_fx.explain(
        nn.Linear(10, 7, bias=False), torch.ones(6, 10), tx=thor_fx.thor(**SETTINGS, block_size=block_size)
    )
    assert counter.get_total_flops() == report.cost.step_flops


def test_costs_add_up():
    one, other = Cost(1, 2, 3, 4), Cost(10, 20, 30, 40)
    assert one + other == Cost(11, 22, 33, 44)
    report = thor_fx.explain(linear()[0], torch.randn(6, 10))
    assert report.cost == sum(report.costs.values(), start=Cost())


def test_attention_is_among_the_plain_operations():
    def loss_fn(params, x):
        q = x @ params["w"]
        return F.scaled_dot_product_attention(q, x, x).square().mean()

    params, x = {"w": torch.randn(4, 4)}, torch.randn(2, 3, 5, 4)
    report = thor_fx.explain(loss_fn, params, x)
    rows, pairs = 2 * 3 * 5, 2 * 3 * 5**2  # torch counts no attention of a CPU
    assert report.plain_flops == 2 * (2 * rows * 4**2) + (2 + 5) * (2 * pairs * 4)


@pytest.mark.parametrize("max_dim", [3, 5])
def test_both_doors_train_where_nothing_is_kept_of_some_sides(max_dim):
    settings = {**SETTINGS, "max_dim": max_dim, "long_side": "identity", "frequency": 2}
    model, x = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)).double(), torch.randn(9, 8).double()
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    step = thor_fx.compile_step(loss_of(model), thor_fx.thor(**settings), backend="eager")
    state = step.init(params, x)
    optimizer = thor_fx.Thor(thor_fx.compile(model, backend="eager"), **settings)
    for _ in range(3):
        params, state, _ = step(params, state, x)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), params[name], rtol=1e-10, atol=1e-12)
