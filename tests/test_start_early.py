"""Sums over ranks start beside backward; :mod:`test_distributed` has their results."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from functorch import make_fx
from torch import fx, nn
from torch._inductor.utils import run_and_get_code
from torch.func import functional_call

import thor_fx
from thor_fx import step
from thor_fx.distributed.collectives import World, is_collective, is_sum, wait
from thor_fx.distributed.start_early import start_early
from thor_fx.layers import Coverage
from thor_fx.passes import outputs
from thor_fx.passes.outputs import Grad, Input, Param

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="no torch.distributed here")

aten = torch.ops.aten
WIDTHS = [5, 6, 7, 4]


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Any]:
    """A process group of two in which nothing is sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield dist.group.WORLD
    dist.destroy_process_group()


def three_layers() -> nn.Module:
    pairs = itertools.pairwise(WIDTHS)
    return nn.Sequential(*(layer for i, o in pairs for layer in (nn.Linear(i, o), nn.Tanh())))


def step_of(
    group: Any, backend: str, disabled: Sequence[str] = ()
) -> tuple[thor_fx.CompiledStep, dict[str, torch.Tensor], torch.Tensor]:
    """A step in which the factors of each layer travel alone, its parameters and a batch."""
    model = three_layers()
    params = {name: p.detach().clone() for name, p in model.named_parameters()}

    def loss_fn(params: Any, x: torch.Tensor) -> torch.Tensor:
        return functional_call(model, params, (x,)).square().mean()

    settings: dict[str, Any] = {"lr": 0.1, "damping": 0.1, "momentum": 0.9, "frequency": 2}
    tx = thor_fx.thor(**settings, split_indices=[0, 1, 2], process_group=group)
    compiled = thor_fx.compile_step(loss_fn, tx, backend=backend, disable_passes=disabled)
    return compiled, params, torch.ones(3, WIDTHS[0])


def step_graphs(
    monkeypatch: pytest.MonkeyPatch, group: Any, disabled: Sequence[str] = ()
) -> list[fx.GraphModule]:
    """The graphs of a plain step and of a factor step."""
    made: list[fx.GraphModule] = []
    monkeypatch.setattr(step, "check_ranks", lambda *_: None)
    monkeypatch.setattr(step, "compile_graph", lambda gm, *_, **__: made.append(gm) or gm)
    compiled, params, x = step_of(group, "eager", disabled)
    compiled.init(params, x)
    return sorted(made, key=lambda gm: len(gm.graph.nodes))


def positions(gm: fx.GraphModule, what: Any) -> list[int]:
    return [i for i, node in enumerate(gm.graph.nodes) if what(node)]


def is_product(node: fx.Node) -> bool:
    return node.target is aten.mm.default


def packed(side: int) -> int:
    return side * (side + 1) // 2


def test_factors_of_the_last_layers_travel_beside_the_backward_of_the_first(monkeypatch, two_ranks):
    _, factor = step_graphs(monkeypatch, two_ranks)
    sums = [node for node in factor.graph.nodes if is_sum(node)]
    *layers, gradients, first_layer, counts = (node.meta["val"].numel() for node in sums)
    assert layers == [packed(7) + packed(4), packed(6) + packed(7)]
    assert gradients == sum(i * o + o for i, o in itertools.pairwise(WIDTHS))
    assert first_layer == packed(5) + packed(6)
    assert counts == len(WIDTHS), "three numbers of rows, and the terms"
    starts, products = positions(factor, is_sum), positions(factor, is_product)
    after = [sum(product > start for product in products) for start in starts]
    # of a later layer: cotangent, gradient, A and G; of the first: no cotangent
    assert after == [4 + 3, 3, 0, 0, 0]


def test_nothing_is_waited_for_before_backward_is_over(monkeypatch, two_ranks):
    for graph in step_graphs(monkeypatch, two_ranks):
        waits = positions(graph, lambda node: is_collective(node) and not is_sum(node))
        assert min(waits) > max(positions(graph, is_product))
        assert min(waits) > max(positions(graph, is_sum))


def test_everything_else_stays_in_its_order(monkeypatch, two_ranks):
    early = step_graphs(monkeypatch, two_ranks)
    late = step_graphs(monkeypatch, two_ranks, ["start_early"])
    for one, other in zip(early, late, strict=True):
        first = _packing(one)
        names = [[n.name for n in gm.graph.nodes if n.name not in first] for gm in (one, other)]
        assert names[0] == names[1]
        assert first == _packing(other)
        assert max(positions(other, is_product)) < min(positions(other, is_sum)), "nothing was moved"


def _packing(gm: fx.GraphModule) -> set[str]:
    """What sums are made of, back to products, views of the batch and sums of cotangents, by name."""
    nodes = [node for node in gm.graph.nodes if is_sum(node)]
    kept = {aten.mm.default, aten.sum.dim_IntList, aten.ones.default}
    found = set(nodes)
    while nodes:
        for node in nodes.pop().all_input_nodes:
            if node.target not in kept and node not in found and node.op != "placeholder":
                found.add(node)
                nodes.append(node)
    return {node.name for node in found}


def test_collectives_of_the_model_are_not_passed_and_dependent_ones_stay():
    world = World("any", 2, 0, None)

    def two_gradients(x: torch.Tensor, w: torch.Tensor) -> Any:
        first = x @ w
        gathered = wait(world.sum(x + 1))  # of the model
        second = gathered @ w
        total = wait(world.sum(first * 2))  # of the update
        return first, second, wait(world.sum(second * 2)), wait(world.sum(total.sin()))

    gm = make_fx(two_gradients, tracing_mode="fake")(torch.ones(3, 3), torch.ones(3, 3))
    kinds = [Grad("w"), Grad("v"), outputs.Opaque("new"), outputs.Opaque("newer")]
    outputs.describe(gm, [Input(0), Param("w")], kinds)
    outputs.select(gm, lambda descriptor: isinstance(descriptor, Grad))
    start_early(gm, ["w", "v"], Coverage({}, (), {}))
    names = [node.name for node in gm.graph.nodes if is_collective(node) or is_product(node)]
    assert names == [
        "mm", "all_reduce", "wait_tensor", "mm_1", "all_reduce_2", "all_reduce_1", "wait_tensor_1",
        "wait_tensor_2", "all_reduce_3", "wait_tensor_3",
    ]  # fmt: skip
    gm.graph.lint()


@pytest.mark.inductor
def test_inductor_keeps_starts_early_and_waits_late(monkeypatch, two_ranks):
    monkeypatch.setattr(step, "check_ranks", lambda *_: None)
    compiled, params, x = step_of(two_ranks, "inductor")

    def run() -> None:
        compiled(params, compiled.init(params, x), x)

    with torch._inductor.config.patch(fx_graph_cache=False):
        _, sources = run_and_get_code(run)
    for source in sources:
        lines = source[source.index("def call") :].splitlines()
        starts, waits, products = (
            [i for i, line in enumerate(lines) if call in line and "#" not in line]
            for call in (".all_reduce_.default(", ".wait_tensor.default(", "extern_kernels.mm(")
        )
        assert len(starts) == len(waits) > 0
        assert min(waits) > max(products), "backward is over"
        assert min(waits) > max(starts)
    assert min(starts) < max(products), "the last source is that of the factor step"
