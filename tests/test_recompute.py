"""``recompute``: the same numbers from fewer activations that are kept for backward."""

import copy
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._inductor.decomposition import select_decomp_table
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import thor_fx
import thor_fx.partitioner
from thor_fx.inductor import compile_graph
from thor_fx.passes import canonicalize, emit_factors, outputs, run
from thor_fx.passes.layout import Rules
from thor_fx.passes.nodes import is_random
from thor_fx.passes.outputs import Loss, Tangent
from thor_fx.passes.stitch import BACKWARD, FORWARD, SIDE
from thor_fx.recompute import recompute

ROWS, CLASSES = 7, 4
AS_INDUCTOR = partial(recompute, decompositions=select_decomp_table())


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 16), nn.GELU(), nn.Dropout(0.3), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, CLASSES)
    )


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    )


def transformer() -> nn.Module:
    block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.2, activation="gelu", batch_first=True)
    return nn.Sequential(block, nn.Flatten(), nn.Linear(5 * 16, CLASSES))


class Checkpointed(nn.Module):
    """A block with dropout that the user wants computed again."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Dropout(0.5), nn.Linear(32, 6), nn.Tanh())
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.block, x, use_reentrant=False))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (6,)),
    "convolutions": (convolutions, (3, 8, 8)),
    "transformer": (transformer, (5, 16)),
    "checkpointed": (Checkpointed, (6,)),
}
RULES = {
    "plain": None,
    "empirical": Rules(),
    "sampled": Rules(fisher="sampled"),
    "exact": Rules(fisher="exact"),
}


def traced(name: str, rules: Rules | None = None) -> tuple[fx.GraphModule, list[Tensor]]:
    """The step graph of a model, with factors where there are rules; and its arguments."""
    make, shape = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().double()
        x, y = torch.randn(ROWS, *shape, dtype=torch.float64), torch.randint(CLASSES, (ROWS,))
    params = dict(model.named_parameters())

    def loss_fn(params: Mapping[str, Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Any]:
        logits = functional_call(model, dict(params), (x,))
        return F.cross_entropy(logits, y), {"hits": (logits.argmax(1) == y).sum()}

    graph = thor_fx.trace_step(loss_fn, params, x, y)
    factors = [] if rules is None else [partial(emit_factors, rules=rules)]
    return run(graph, [canonicalize, *factors]), [p.detach() for p in params.values()] + [x, y]


def results(gm: fx.GraphModule, arguments: list[Tensor]) -> dict[Any, Tensor]:
    gm = copy.deepcopy(gm)  # running statistics are buffers of the graph
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        return dict(zip(outputs.output_nodes(gm), gm(*(a.clone() for a in arguments)), strict=True))


def kept(gm: fx.GraphModule) -> int:
    """Bytes that are computed before backward starts and read after."""
    order = {node: position for position, node in enumerate(gm.graph.nodes)}
    start = min(order[user] for user in outputs.input_nodes(gm)[Tangent(0)].users)
    computed = [node for node in gm.graph.nodes if node.op == "call_function" and order[node] < start]
    later = [n for n in computed if any(order[user] >= start and user.op != "output" for user in n.users)]
    values = [node.meta["val"] for node in later if isinstance(node.meta.get("val"), Tensor)]
    return sum(value.numel() * value.element_size() for value in values if value.dim())


def assert_identical(found: Mapping[Any, Tensor], expected: Mapping[Any, Tensor]) -> None:
    assert list(found) == list(expected)
    for descriptor, value in expected.items():
        assert torch.equal(found[descriptor], value), descriptor


# --- the numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("name", MODELS)
def test_nothing_changes_bit_for_bit(name: str, rules: Rules | None):
    whole, arguments = traced(name, rules)
    cut = run(whole, [recompute])
    assert {node.meta.get(SIDE) for node in cut.graph.nodes} >= {FORWARD, BACKWARD}  # it has been cut
    assert_identical(results(cut, arguments), results(whole, arguments))
    given = [
        [node.meta[outputs.KEY] for node in gm.graph.find_nodes(op="placeholder")] for gm in (cut, whole)
    ]
    assert given[0] == given[1]


@pytest.mark.parametrize("rules", [None, Rules()], ids=["plain", "factors"])
def test_operators_that_are_taken_apart(rules: Rules | None):
    whole, arguments = traced("convolutions", rules)
    found, expected = results(run(whole, [AS_INDUCTOR]), arguments), results(whole, arguments)
    assert list(found) == list(expected)
    for descriptor, value in expected.items():
        torch.testing.assert_close(found[descriptor], value, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("decompositions", [None, select_decomp_table()], ids=["whole", "taken apart"])
@pytest.mark.parametrize("name", ["mlp", "transformer", "checkpointed"])
def test_random_numbers_are_drawn_once(name: str, decompositions: Any):
    whole, _ = traced(name, Rules(fisher="sampled"))
    cut = run(whole, [partial(recompute, decompositions=decompositions)])
    drawn = [[node for node in gm.graph.nodes if is_random(node)] for gm in (cut, whole)]
    assert len(drawn[0]) == len(drawn[1]) > 1


# --- the memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "share"), [("mlp", 0.7), ("transformer", 0.9), ("convolutions", 0.9), ("checkpointed", 0.7)]
)
@pytest.mark.parametrize("rules", [None, Rules()], ids=["plain", "factors"])
def test_less_is_kept_for_backward(name: str, share: float, rules: Rules | None):
    """If this fails, recomputation is lost: forward and backward are joined by values that are cheap."""
    whole, _ = traced(name, rules)
    assert kept(run(whole, [AS_INDUCTOR])) < share * kept(whole)


# --- what cannot be cut -------------------------------------------------------------------------------


def linear_step(loss: Callable[[Tensor], Tensor]) -> fx.GraphModule:
    def loss_fn(params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return loss(x @ params["w"])

    params = {"w": torch.eye(3, dtype=torch.float64) + 0.1}
    return run(thor_fx.trace_step(loss_fn, params, torch.eye(3, dtype=torch.float64)), [canonicalize])


def test_side_effects_stay_in_their_order():
    """The checks of ``torch.linalg`` hang on such tokens in some versions of torch."""
    graph = linear_step(lambda z: z.tanh().sum())
    with graph.graph.inserting_before(outputs.output_node(graph.graph)):
        token = graph.graph.call_function(torch.ops.prims._make_token.default)
    token.meta["val"] = None
    cut = run(graph, [recompute])
    assert [node.name for node in cut.graph.nodes] == [node.name for node in graph.graph.nodes]


def test_a_graph_whose_backward_starts_nowhere_stays_as_it_is():
    graph = linear_step(lambda z: z.tanh().sum())
    del outputs.input_nodes(graph)[Tangent(0)].meta[outputs.KEY]
    cut = run(graph, [recompute])
    assert [node.name for node in cut.graph.nodes] == [node.name for node in graph.graph.nodes]


def test_a_write_stays_where_it_is():
    graph = linear_step(lambda z: z.tanh().sum())
    first = graph.graph.find_nodes(op="placeholder")[-1]
    out = outputs.output_node(graph.graph)
    with graph.graph.inserting_before(out):
        write = graph.graph.call_function(torch.ops.aten.copy_.default, (first, first))
    write.meta["val"] = first.meta["val"]
    cut = run(graph, [recompute])
    assert [node.name for node in cut.graph.nodes] == [node.name for node in graph.graph.nodes]


def test_torch_may_fail_to_cut(monkeypatch: pytest.MonkeyPatch):
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no cut")

    monkeypatch.setattr(thor_fx.partitioner, "min_cut_rematerialization_partition", fails)
    graph, arguments = traced("mlp")
    with pytest.warns(UserWarning, match="keeps all activations, for no cut: please report"):
        cut = run(graph, [recompute])
    assert_identical(results(cut, arguments), results(graph, arguments))


def test_draws_never_change_places(monkeypatch: pytest.MonkeyPatch):
    def elsewhere(*args: Any) -> Any:
        halves = thor_fx.partitioner.split(*args)
        return halves._replace(drawn=halves.drawn[::-1])

    monkeypatch.setattr("thor_fx.recompute.split", elsewhere)
    graph, _ = traced("transformer")
    cut = run(graph, [recompute])
    assert [node.name for node in cut.graph.nodes] == [node.name for node in graph.graph.nodes]


# --- whole steps --------------------------------------------------------------------------------------


@pytest.fixture
def recomputing(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Let interpreted steps recompute, or not, as a compiled one does."""

    def cut(gm: fx.GraphModule) -> None:
        recompute(gm)
        assert BACKWARD in {node.meta.get(SIDE) for node in gm.graph.nodes}

    def choose(on: bool) -> None:
        monkeypatch.setattr("thor_fx.step._Compiler.recomputes", [cut] if on else [])

    return choose


def trajectory(name: str, rows: list[int], **settings: Any) -> list[Tensor]:
    """Parameters, buffers and losses after each step on batches of these many rows."""
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model = make().double()

    def loss_fn(params: Any, buffers: Any, x: Tensor, y: Tensor) -> Any:
        buffers = {name: b.clone() for name, b in buffers.items()}
        logits = functional_call(model, (params, buffers), (x,))
        return F.cross_entropy(logits, y), (buffers, logits.argmax(1))

    def batch(count: int) -> tuple[Tensor, Tensor]:
        return torch.randn(count, *shape, dtype=torch.float64), torch.randint(CLASSES, (count,))

    options = {"lr": 0.05, "damping": 0.1, "momentum": 0.9, "frequency": 2, **settings}
    step = thor_fx.compile_step(loss_fn, thor_fx.thor(**options), backend="eager")
    params: Any = {name: p.detach().clone() for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    state = step.init(params, *batch(rows[0]), buffers=buffers)
    found = []
    for count in rows:
        params, state, out = step(params, state, *batch(count))
        found += [*params.values(), *state.buffers.values(), out.loss, out.aux]
        found = [value.clone() for value in found]
    return found


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("convolutions", {}),
        ("transformer", {"fisher": "sampled"}),
        ("convolutions", {"factor_decay": 0.9, "refresh": thor_fx.Every(3)}),
        ("mlp", {"damping": thor_fx.LevenbergMarquardt(0.1, interval=2)}),
    ],
    ids=["default", "sampled", "averages", "adaptive damping"],
)
def test_steps_are_the_same_for_all_batch_sizes(
    recomputing: Callable[[bool], None], name: str, settings: dict[str, Any]
):
    """Three sizes: the second one compiles for all."""
    recomputing(False)
    expected = trajectory(name, [7, 5, 6, 5], **settings)
    recomputing(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = trajectory(name, [7, 5, 6, 5], **settings)
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.inductor
def test_no_kernel_spans_forward_and_backward():
    """Else what is computed again would be computed in forward, and kept.

    Torch itself refuses a checkpointed region with dropout in one graph with backward.
    """
    whole, arguments = traced("checkpointed", Rules())
    cut = run(whole, [AS_INDUCTOR])
    spans: list[set[str]] = []

    def look(nodes: list[Any]) -> list[Any]:
        for node in nodes:
            parts = [part.node.get_origins() for part in node.get_nodes() if part.node is not None]
            own = [{origin.meta.get(SIDE) for origin in origins} for origins in parts]
            spans.append({BACKWARD if BACKWARD in sides else FORWARD for sides in own if sides - {None}})
        return nodes

    fakes = [node.meta["val"] for node in cut.graph.find_nodes(op="placeholder")]
    options = {"_post_fusion_custom_pass": look, "force_disable_caches": True}
    compiled = compile_graph(cut, fakes, options=options)
    assert {FORWARD} in spans
    assert {BACKWARD} in spans
    assert {FORWARD, BACKWARD} not in spans
    with torch.no_grad():
        found = dict(zip(outputs.output_nodes(cut), compiled(*arguments), strict=True))
    assert found[Loss()].isfinite()
