"""``accumulate``: a running average is the end of the product that it averages."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

import models
import thor_fx
from graphs import step_graph
from thor_fx.layers import coverage
from thor_fx.passes import Factor, accumulate, canonicalize, emit_factors, find_sites, outputs, run
from thor_fx.passes.layout import Rules
from thor_fx.precondition import precondition
from thor_fx.schedule import Schedule
from thor_fx.update import append_update
from training import batches, build, classifier_loss, mlp, snapshot

aten = torch.ops.aten
DECAY = 0.75
FOLDED = {aten.addmm.default, aten.baddbmm.default}


def with_update(make, **options: Any) -> tuple[fx.GraphModule, list[Tensor]]:
    """A factor step that returns everything and keeps averages; and its arguments."""
    rules = options.get("rules", Rules())
    graph = run(step_graph(make), [canonicalize, partial(emit_factors, rules=rules)])
    found, case = coverage(find_sites(graph), rules), make()
    tx = precondition(Schedule("damping", 0.1), factor_decay=DECAY, **options)
    params = {name: p.detach() for name, p in case.params.items()}
    append_update(graph, tx, found, [name for name in params if name in found.trained])
    generator = torch.Generator().manual_seed(7)
    state = [
        leaf + torch.rand(leaf.shape, generator=generator, dtype=torch.float64).to(leaf.dtype)
        for leaf in pytree.tree_leaves(tx.init({n: params[n] for n in params if n in found.trained}, found))
    ]
    rates = [torch.tensor(0.1, dtype=torch.float64)]
    return graph, [*params.values(), *case.batch, *state, *rates]


def results(gm: fx.GraphModule, arguments: list[Tensor]) -> tuple[dict[Any, Tensor], list[Tensor]]:
    """What a graph returns, and what it has made of its arguments."""
    torch.manual_seed(0)
    own = [argument.clone() for argument in arguments]
    with torch.no_grad():
        values = fx.Interpreter(gm).run(*own)
    return dict(zip(outputs.output_nodes(gm), values, strict=True)), own


def folded(gm: fx.GraphModule, before: fx.GraphModule) -> list[fx.Node]:
    old = {node.name for node in before.graph.nodes}
    return [node for node in gm.graph.nodes if node.target in FOLDED and node.name not in old]


CASES = {  # how many factors end in a product, of how many
    models.f_linear: (2, 2),
    models.x_at_w: (2, 2),
    models.one_datum: (2, 2),
    models.twice: (4, 4),
    models.fused_qkv: (4, 4),
    models.slices: (4, 4),
    models.experts: (4, 4),
    models.embedding: (3, 4),  # a diagonal is no product
    models.convolution: (2, 4),  # nor are sums over images, one after the other
    models.both_ways: (2, 6),  # two of the layers are a sum of two, by their traces
    models.no_layer: (0, 0),
}


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_loss_and_gradients_are_bitwise_the_same_and_the_state_up_to_rounding(make):
    before, arguments = with_update(make)
    after = copy.deepcopy(before)
    accumulate(after)
    after.graph.lint()
    factors = [d for d in outputs.output_nodes(before) if isinstance(d, Factor)]
    assert (len(folded(after, before)), len(factors)) == CASES[make]
    (old, old_state), (new, new_state) = results(before, arguments), results(after, arguments)
    assert list(old) == list(new)
    assert all(torch.equal(value, new[descriptor]) for descriptor, value in old.items())
    for one, other in zip(new_state, old_state, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_what_becomes_of_a_linear_layer():
    """``A = (1/R) x^T x`` and ``G = n g^T g`` with ``R = n = 6``."""
    before, _ = with_update(models.f_linear)
    after = copy.deepcopy(before)
    accumulate(after)
    g, a = folded(after, before)
    assert [node.target for node in (g, a)] == [aten.addmm.default] * 2
    assert g.kwargs == {"beta": DECAY, "alpha": (1 - DECAY) * 6}
    assert a.kwargs == {"beta": DECAY, "alpha": pytest.approx((1 - DECAY) / 6, rel=1e-15)}
    assert all(node.args[0].op == "placeholder" for node in (g, a))
    scales = {aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor}
    gone = {n.name for n in before.graph.nodes} - {n.name for n in after.graph.nodes}
    assert sum(node.target in scales for node in before.graph.nodes if node.name in gone) == 9


def test_the_loss_scale_and_the_given_batch_size_are_in_alpha():
    before, _ = with_update(models.f_linear, batch_size=3, loss_scale=4.0)
    after = copy.deepcopy(before)
    accumulate(after)
    assert folded(after, before)[0].kwargs["alpha"] == (1 - DECAY) * 3 / 4**2


def test_a_stack_of_products_is_one_baddbmm():
    """The blocks of a long side."""
    before, arguments = with_update(models.f_linear, rules=Rules(max_dim=2, block_size=2), block_size=2)
    after = copy.deepcopy(before)
    accumulate(after)
    assert [node.target for node in folded(after, before)] == [aten.baddbmm.default] * 2
    for one, other in zip(results(after, arguments)[1], results(before, arguments)[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", ["data", "shared", "two averages"])
def test_other_sums_are_left_alone(scale):
    def step(x: Tensor, s: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        product = x.mT @ x
        if scale == "data":
            return product, 0.5 * s + c * product
        if scale == "two averages":
            return product, 0.5 * s + 0.25 * s.mT.contiguous() + 0.5 * product
        return product.exp(), 0.5 * s + 0.5 * product

    gm = torch.fx.experimental.proxy_tensor.make_fx(step, tracing_mode="fake")(
        torch.ones(4, 3), torch.ones(3, 3), torch.ones(())
    )
    inputs = [outputs.Input(i) for i in range(3)]
    outputs.describe(gm, inputs, [outputs.Opaque("first"), outputs.Opaque("second")])
    product = next(node for node in gm.graph.nodes if node.target is aten.mm.default)
    outputs.append(gm, [(Factor("x", "A"), product)])
    text = str(gm.graph)
    accumulate(gm)
    assert str(gm.graph) == text


# --- in the compiled step --------------------------------------------------------------------------------


def compiled_graphs(monkeypatch: pytest.MonkeyPatch, rows: int = 7, **options: Any) -> list[fx.GraphModule]:
    """Every graph that is compiled for a step of the multilayer perceptron, plain ones first."""
    seen: list[fx.GraphModule] = []
    compile_graph = thor_fx.step.compile_graph

    def spy(gm: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        seen.append(gm)
        return compile_graph(gm, *args, **kwargs)

    monkeypatch.setattr("thor_fx.step.compile_graph", spy)
    dynamic = options.pop("dynamic", None)
    tx = thor_fx.thor(0.05, 0.1, 0.9, frequency=2, **options)
    model, (x, y) = build(mlp), batches(1, rows=rows)[0]
    step = thor_fx.compile_step(classifier_loss(model), tx, backend="eager", dynamic=dynamic)
    step.init(snapshot(dict(model.named_parameters())), x, y)
    return seen


def count(gm: fx.GraphModule, *targets: Any) -> int:
    return sum(node.target in targets for node in gm.graph.nodes)


def averaged_products(gm: fx.GraphModule) -> int:
    return sum(node.target in FOLDED and node.kwargs.get("beta") == 0.9 for node in gm.graph.nodes)


def test_the_factor_step_has_no_further_product(monkeypatch):
    plain, factor = compiled_graphs(monkeypatch, factor_decay=0.9)
    assert (averaged_products(plain), averaged_products(factor)) == (0, 4)
    _, single = compiled_graphs(monkeypatch)
    products = aten.mm.default, aten.addmm.default
    assert count(factor, *products) == count(single, *products)
    assert count(factor, aten.mm.default) == count(single, aten.mm.default) - 4


def test_a_symbolic_number_of_rows_is_no_constant(monkeypatch):
    _, factor = compiled_graphs(monkeypatch, factor_decay=0.9, dynamic=True)
    assert averaged_products(factor) == 0
