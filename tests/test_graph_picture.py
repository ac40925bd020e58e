"""The picture of a step, and the blocks that it is made of."""

import xml.etree.ElementTree as ET

import networkx as nx
import pytest
import torch

import thor_fx
from graph_networks import LAYERS, by_hand, network
from thor_fx.graphs import draw, picture, to_networkx
from thor_fx.graphs.block_edges import block_edges
from thor_fx.graphs.blocks import OUTSIDE, blocks
from thor_fx.graphs.colors import COLORS

CROSS = "\N{MULTIPLICATION SIGN}"
SVG = "{http://www.w3.org/2000/svg}"


def drawn(graph: nx.DiGraph, **settings: str) -> ET.Element:
    return ET.fromstring(picture(graph, **settings))


def texts(image: ET.Element) -> list[str]:
    return [element.text or "" for element in image.iter(f"{SVG}text")]


def test_equal_blocks_are_one():
    found, _ = blocks(network())
    assert [block.names for block in found] == [
        ("embed",), tuple(f"layers.{i}" for i in range(LAYERS)), ("head",), (OUTSIDE,),
    ]  # fmt: skip


def test_a_block_that_differs_is_its_own():
    model = torch.nn.Sequential(*(torch.nn.Linear(n, 3) for n in (4, 3, 3, 3)), torch.nn.Linear(3, 5))
    graph = thor_fx.explain(model, torch.ones(2, 4)).graph
    found, _ = blocks(graph)
    assert [block.names for block in found[:3]] == [("0",), ("1", "2", "3"), ("4",)]


def test_rows_list_modules_parameters_and_factors():
    found, _ = blocks(network())
    rows = {row.name: row for row in found[1].rows}
    assert set(rows) == {"norm", "mlp.0", "mlp.1", "mlp.2", "own operators"}
    assert rows["mlp.0"].params == {"layers.0.mlp.0.weight": (16, 8), "layers.0.mlp.0.bias": (16,)}
    assert rows["mlp.0"].factors == (("A", (8, 8)), ("G", (16, 16)))
    assert [name for name, row in rows.items() if row.has_site] == ["mlp.0", "mlp.2"]
    assert rows["mlp.0"].cells["forward"].flops == 2 * 6 * 8 * 16


def test_every_operator_that_is_needed_is_in_one_block():
    graph = network()
    found, position = blocks(graph)
    needed = nx.ancestors(graph, "output")
    operators = [name for name, op in graph.nodes(data="op") if op == "call_function" and name in needed]
    assert position.keys() >= set(operators)
    per_box = sum(len(b.names) * c.operators for b in found for row in b.rows for c in row.cells.values())
    assert per_box == len(operators)


def test_arrows_go_forward_and_back():
    graph = network()
    _, position = blocks(graph)
    ends = {(edge.source, edge.target) for edge in block_edges(graph, position)}
    assert {((0, "forward"), (1, "forward")), ((1, "forward"), (2, "forward"))} <= ends
    assert {((2, "backward"), (1, "backward")), ((1, "forward"), (1, "factors"))} <= ends
    assert all(source != target for source, target in ends)


def test_functions_without_modules_are_in_blocks_of_their_parameters():
    def loss_fn(p, x):
        return (torch.tanh(x @ p["w1"]) @ p["w2"]).square().mean()

    params = {"w1": torch.ones(3, 4), "w2": torch.ones(4, 2)}
    graph = to_networkx(thor_fx.trace_step(loss_fn, params, torch.ones(5, 3)))
    assert [block.names for block in blocks(graph)[0]][:2] == [("w1",), ("w2",)]


def test_the_picture_names_blocks_phases_and_factors():
    found = texts(drawn(network(), title="a <b> & c"))
    for text in (
        "a <b> & c",
        "embed",
        f"layers.0 … {LAYERS - 1}",
        f"{CROSS}{LAYERS}",
        "mlp.2",
        f"A 8{CROSS}8, G 16{CROSS}16",
    ):
        assert text in found
    assert [text for text in found if text in COLORS] == ["forward", "backward", "factors"]


def test_layers_with_factors_are_highlighted():
    image = drawn(network())
    highlighted = [r for r in image.iter(f"{SVG}rect") if r.get("class") == "site"]
    assert len(highlighted) == 4  # embed, two in the blocks, head


def test_nothing_lies_outside_of_the_picture_and_no_boxes_on_each_other():
    image = drawn(network())
    boxes = [[float(r.get(key)) for key in ("x", "y", "width", "height")] for r in image.iter(f"{SVG}rect")
             if r.get("class") == "box"]  # fmt: skip
    for x, y, width, height in boxes:
        assert x + width <= float(image.get("width"))
        assert y + height <= float(image.get("height"))
    for i, (x, y, width, height) in enumerate(boxes):
        for u, v, other_width, other_height in boxes[:i]:
            apart = x + width <= u or u + other_width <= x or y + height <= v or v + other_height <= y
            assert apart


def test_a_graph_without_phases_has_one_column():
    found = texts(drawn(to_networkx(thor_fx.explain(torch.nn.Linear(3, 2), torch.ones(5, 3)).step)))
    assert "phase not marked" in found


def test_all_phases_have_a_column():
    nodes = {phase: (before, {"phase": phase}) for before, phase in zip(["x", *COLORS], COLORS, strict=False)}
    found = texts(drawn(by_hand(x=("", {}), **nodes)))
    assert [text for text in found if text in COLORS] == list(COLORS)


def test_draw_writes_the_picture_of_a_graph_or_report(tmp_path):
    report = thor_fx.explain(torch.nn.Linear(3, 2), torch.ones(5, 3))
    draw(report, tmp_path / "report.svg")
    draw(report.graph, str(tmp_path / "graph.SVG"))
    text = (tmp_path / "report.svg").read_text(encoding="utf-8")
    assert text == (tmp_path / "graph.SVG").read_text(encoding="utf-8") == picture(report.graph)


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match=r"path must end in \.svg, got 'step\.png'"):
        draw(network(), "step.png")
    with pytest.raises(ValueError, match="graph has no operator to draw"):
        draw(by_hand(x=("", {})), tmp_path / "empty.svg")
