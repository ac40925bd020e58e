"""Networks of step graphs, and what their analyses say of graphs that can be counted by hand."""

import networkx as nx
import pytest
import torch
from functorch import make_fx
from torch import nn

import thor_fx
from graph_networks import LAYERS, WIDTH, WORDS, by_hand, network
from graphs import tiny
from thor_fx.graphs import (
    Region,
    critical_path,
    dependencies,
    factor_dependencies,
    floor,
    forward_backward_cut,
    fusible_regions,
    live_ranges,
    to_networkx,
)
from thor_fx.graphs.modules import parts
from thor_fx.kernels import Kernel
from thor_fx.passes import Factor, Grad, Input, Loss, Param, Rows

# --- what is on the nodes ----------------------------------------------------------------------------


def test_facts_of_a_small_graph():
    gm = tiny()
    graph = to_networkx(gm, kernels=[Kernel("extern_mm", True, ("mm",), ("forward",))])
    assert list(graph) == [node.name for node in gm.graph.nodes]
    mm = graph.nodes["mm"]
    assert (mm["operator"], mm["shape"], mm["dtype"]) == ("aten.mm.default", (6, 3), torch.float32)
    assert (mm["flops"], mm["bytes"]) == (2 * 6 * 4 * 3, 6 * 3 * 4)
    assert (mm["kernel"], mm["phase"], mm["site"], mm["module"]) == ("extern_mm", None, None, None)
    described = {d: name for name, ds in graph.nodes(data="descriptors") for d in ds}
    assert set(described) == {Param("w"), Input(0), Loss(), Grad("w")}
    assert all(set(facts) == set(mm) for _, facts in graph.nodes(data=True))


def test_modules_are_called_as_the_model_calls_them():
    modules = {facts["module"] for _, facts in network().nodes(data=True)}
    blocks = {
        f"layers.{i}{part}" for i in range(LAYERS) for part in ("", ".norm", ".mlp.0", ".mlp.1", ".mlp.2")
    }
    assert modules == {None, "embed", "head", *blocks}


def test_backward_is_of_the_module_whose_gradient_it_computes():
    graph = network()
    node = dependencies(graph, Grad("layers.1.mlp.0.weight")).node
    assert graph.nodes[node]["module"] == "layers.1.mlp.0"
    assert graph.nodes[node]["phase"] == "backward"


def test_sites_are_on_contractions_and_on_what_only_factors_need():
    graph = network()
    for layer in ("head.weight", "layers.1.mlp.0.weight"):
        gradient, factor = dependencies(graph, Grad(layer)), dependencies(graph, Factor(layer, "G"))
        assert graph.nodes[gradient.node]["site"] == (layer,)
        assert all(layer in graph.nodes[name]["site"] for name in factor.own)
        assert {graph.nodes[name]["phase"] for name in factor.own} == {"factors"}
    assert all(f["site"] is None for _, f in graph.nodes(data=True) if f["phase"] == "forward")


def test_a_report_has_sites_on_its_graph():
    graph = thor_fx.explain(nn.Linear(3, 2, bias=False), torch.ones(5, 3)).graph
    assert {facts["site"] for _, facts in graph.nodes(data=True)} == {None, ("weight",)}


def test_a_graph_that_nobody_has_described_has_a_network():
    class Twice(nn.Module):
        def forward(self, x):
            return x + x

    graph = to_networkx(torch.fx.symbolic_trace(Twice()))
    assert [graph.nodes[name]["bytes"] for name in graph] == [0, 0, 0]
    assert list(graph.edges) == [("x", "add"), ("add", "output")]


def test_symbolic_sizes_are_those_of_the_traced_batch():
    gm = make_fx(lambda x, w: (x @ w).relu(), tracing_mode="symbolic")(torch.ones(5, 4), torch.ones(4, 3))
    graph = to_networkx(gm)
    assert graph.nodes["relu"]["shape"] == (5, 3)
    assert graph.nodes["mm"]["flops"] == 2 * 5 * 4 * 3
    assert graph.nodes["relu"]["bytes"] == 60


def test_sizes_that_the_data_decide_count_as_none():
    gm = make_fx(lambda x: x.nonzero() * 2, tracing_mode="symbolic")(torch.ones(5))
    graph = to_networkx(gm)
    assert (graph.nodes["mul"]["shape"], graph.nodes["mul"]["bytes"]) == ((0, 1), 0)


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("L['self'].fc", ("self", "fc")),
        ("getattr(getattr(L['m'].a, '0').b, '11').c", ("m", "a", "0", "b", "11", "c")),
        ("L['loss_fn'].__closure__[1].cell_contents", ("loss_fn",)),
        ("L['self']._modules['layers']._modules['0']", ("self", "layers", "0")),
        ("L['self'].layers[3].fc", ("self", "layers", "3", "fc")),
    ],
)
def test_parts_of_a_path(path, names):
    assert parts(path) == names


# --- analyses ----------------------------------------------------------------------------------------


def diamond():
    """``x -> a -> (b, c) -> d``, where c is heavier in operations, and b in bytes."""
    return by_hand(
        x=("", {"bytes": 8}),
        a=("x", {"flops": 1, "bytes": 8}),
        b=("a", {"flops": 2, "bytes": 100}),
        c=("a", {"flops": 5, "bytes": 4}),
        d=("b c", {"flops": 1, "bytes": 4}),
    )


def test_the_critical_path_is_the_heaviest_chain():
    path = critical_path(diamond(), "flops")
    assert path.nodes == ("x", "a", "c", "d")
    assert (path.weight, path.total) == (7, 9)


def test_a_path_by_bytes_counts_what_is_read_and_written():
    path = critical_path(diamond(), "bytes")
    assert path.nodes == ("x", "a", "b", "d")
    assert path.weight == (8 + 8) + (8 + 100) + (100 + 4 + 4)


def test_a_path_by_seconds_takes_the_longer_of_arithmetic_and_traffic():
    path = critical_path(diamond(), floor(flops_per_second=1, bytes_per_second=100))
    assert path.nodes == ("x", "a", "c", "d")
    assert path.weight == pytest.approx(1 + 5 + 1.08)


def test_views_are_free():
    graph = by_hand(x=("", {"bytes": 8}), view=("x", {"bytes": 8, "view": True}))
    assert critical_path(graph, "bytes").weight == 0


def test_an_empty_graph_has_an_empty_path():
    assert critical_path(by_hand()).nodes == ()
    assert live_ranges(by_hand()).peak == 0


def test_wrong_weights():
    with pytest.raises(ValueError, match="weight must be 'flops', 'bytes' or a function"):
        critical_path(diamond(), "time")
    with pytest.raises(ValueError, match="bytes_per_second must be > 0, got 0"):
        floor(1, 0)


def test_dependencies_of_factors():
    graph = by_hand(
        x=("", {"descriptors": (Input(0),)}),
        w=("", {"descriptors": (Param("w"),)}),
        mm=("x w", {"flops": 6}),
        loss=("mm", {"descriptors": (Loss(),)}),
        grad=("loss x", {"flops": 6, "descriptors": (Grad("w"),)}),
        gram=("x", {"flops": 4, "descriptors": (Factor("w", "A"),)}),
        outer=("loss", {"flops": 3, "descriptors": (Factor("w", "G"), Rows("w"))}),
    )
    found = factor_dependencies(graph)
    a, g = found[Factor("w", "A")], found[Factor("w", "G")]
    assert (a.params, a.inputs, a.nodes, a.own, a.flops) == ((), (0,), ("x", "gram"), ("gram",), 4)
    assert (g.params, g.inputs, g.own, g.flops, g.own_flops) == (("w",), (0,), ("outer",), 9, 3)
    assert dependencies(graph, "grad").own == ()


def test_dependencies_in_a_model():
    found = factor_dependencies(network())
    assert found[Factor("layers.0.mlp.0.weight", "A")].params == (
        "embed.weight", "layers.0.norm.weight", "layers.0.norm.bias",
    )  # fmt: skip
    assert found[Factor("head.weight", "A")].own_flops == 2 * 6 * WIDTH**2
    assert found[Factor("head.weight", "G")].own_flops == 2 * 6 * WORDS**2


def test_unknown_values():
    with pytest.raises(KeyError, match=r"no node 'y'"):
        dependencies(diamond(), "y")
    with pytest.raises(KeyError, match=r"does not return Factor\(layer='w', side='A'\): it returns nothing"):
        dependencies(diamond(), Factor("w", "A"))


def test_live_ranges_and_their_peak():
    found = live_ranges(diamond())
    spans = {r.node: (r.start, r.end) for r in found.ranges}
    assert spans == {"x": (0, 4), "a": (1, 3), "b": (2, 4), "c": (3, 4), "d": (4, 4)}
    assert [r.node for r in found.ranges] == ["x", "b", "a", "c", "d"]
    assert [r.node for r in found.largest] == ["b", "x", "a", "c", "d"]
    assert (found.peak, found.peak_node) == (8 + 8 + 100 + 4, "c")
    assert [r.node for r in found.alive(3)] == ["b", "x", "a", "c"]


def test_a_view_keeps_alive_what_it_is_a_view_of():
    graph = by_hand(
        x=("", {}),
        a=("x", {"bytes": 8}),
        view=("a", {"bytes": 8, "view": True}),
        b=("x", {"bytes": 2}),
        c=("view", {"bytes": 2}),
    )
    assert {r.node: (r.start, r.end) for r in live_ranges(graph).ranges} == {
        "a": (1, 4),
        "b": (3, 3),
        "c": (4, 4),
    }


def test_regions_end_at_barriers():
    pointwise = {"pointwise": True, "bytes": 8}
    graph = by_hand(
        x=("", {"bytes": 8}),
        a=("x", pointwise),
        b=("a", pointwise),
        mm=("b", {"bytes": 8}),
        c=("mm b", pointwise),  # with b, it would be a kernel that waits for itself
        view=("c", {"view": True, "bytes": 8}),
        d=("view", pointwise),
        out=("d", {}),
        alone=("x", {"pointwise": True}),
    )
    assert fusible_regions(graph) == (
        Region(("a", "b"), reads=("x",), writes=("b",), saved=16),
        Region(("c", "view", "d"), reads=("mm", "b"), writes=("d",), saved=16),
    )


def test_no_region_waits_for_itself():
    graph = network()
    home = {node: region.nodes[0] for region in fusible_regions(graph) for node in region.nodes}
    merged = nx.DiGraph((home.get(u, u), home.get(v, v)) for u, v in graph.edges)
    merged.remove_edges_from(nx.selfloop_edges(merged))
    assert nx.is_directed_acyclic_graph(merged)


def test_the_cut_counts_memory_once_and_no_inputs():
    forward, backward = {"phase": "forward"}, {"phase": "backward"}
    graph = by_hand(
        x=("", {"bytes": 64, **forward}),
        a=("x", {"bytes": 8, **forward}),
        view=("a", {"bytes": 8, "view": True, **forward}),
        seen=("x", {"bytes": 64, "view": True, **forward}),
        b=("a", {"bytes": 4, **forward}),
        da=("b view", backward),
        dx=("da a x seen", backward),
        factor=("b", {"phase": "factors"}),
    )
    cut = forward_backward_cut(graph)
    assert cut.edges == (("a", "dx"), ("view", "da"), ("seen", "dx"), ("b", "da"))
    assert (cut.values, cut.bytes) == (("a", "b"), 12)
    assert ("b", "factor") in forward_backward_cut(graph, ("backward", "factors")).edges


def test_a_cut_needs_phases():
    with pytest.raises(ValueError, match="nodes of graph have no phase: mark the step"):
        forward_backward_cut(diamond())
