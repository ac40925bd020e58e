"""The page: what is in it, that nothing gets out of its place, and that a browser shows it."""

import json
import re

import networkx as nx
import pytest

from browser import CHROMIUM, run_in
from graph_networks import LAYERS, by_hand, network
from thor_fx.graphs import picture
from thor_fx.kernels import Kernel
from thor_fx.page import Page, write_page
from thor_fx.page.diffs import stage_facts
from thor_fx.page.page import as_script, content, html
from thor_fx.page.timeline import timeline
from thor_fx.page.tree import tree
from thor_fx.passes.stages import Stage
from thor_fx.step_cost import PhaseCost, StepCost

EVIL = "</script><script>window.evil = 1</script><img src=x onerror='window.evil = 1'>&amp;"
LAYER = "layers.1.mlp.0.weight"

STAGE = Stage(
    "emit_factors", 0.25, "a = f(x)\nb = g(a)\n", "a = f(x)\nc = h(a)\n", {"h": 2}, {"g": 1}, moved=3
)
STEP = StepCost(
    "factor",
    {"backward": PhaseCost(10, 20, 2e-6, 3e-6), "forward": PhaseCost(1, 2, 1e-6)},
    peak=5000,
    saved=300,
)
KERNELS = [
    Kernel("fused_add", False, ("add", "mul"), ("forward",), 0, 100, start=2.0, seconds=1.0),
    Kernel("extern_mm", True, ("mm",), ("backward", "factors"), 50, 300, start=4.0, seconds=2.0),
]


def whole() -> Page:
    graph = network()
    params = [d.name for _, ds in graph.nodes(data="descriptors") for d in ds if type(d).__name__ == "Param"]
    treatments = ["preconditioned: linear" if name.endswith("weight") else "frozen" for name in params]
    rows = [(name, "2x3", "24 B", "1.5", how) for name, how in zip(params, treatments, strict=True)]
    kernels = {"plain": KERNELS, "factor": [Kernel("a", False, (), ("forward",), bytes=5)]}
    plots = {"the step": picture(graph)}
    return Page("A report", rows, "two\nlines", graph, [STAGE], [STEP], kernels, plots)


def evil() -> Page:
    graph = by_hand(x=("", {}), a=("x", {"operator": EVIL, "module": f"m.{EVIL.replace('.', '')}"}))
    stage = Stage(EVIL, 0.1, EVIL, EVIL + EVIL, {EVIL: 1}, {})
    kernels = {EVIL: [Kernel(EVIL, False, (EVIL,), ("forward",), bytes=1)]}
    return Page(EVIL, [(EVIL,) * 5], EVIL, graph, [stage], [], kernels, {EVIL: f"<svg>{EVIL}</svg>"})


# --- what is in it -----------------------------------------------------------------------------------


def test_the_tree_has_every_operator_once_and_sums_them():
    graph = network()
    found = tree(graph)
    layers = next(child for child in found["modules"] if child["name"] == "layers")
    assert [child["name"] for child in layers["modules"]] == [str(i) for i in range(LAYERS)]
    operators = [name for name, op in graph.nodes(data="op") if op == "call_function"]
    assert sum(found["phases"].values()) == len(operators)
    assert found["flops"] == sum(flops for _, flops in graph.nodes(data="flops"))
    mlp = next(child for child in layers["modules"][1]["modules"] if child["name"] == "mlp")
    assert LAYER in mlp["modules"][0]["layers"]


def test_a_diff_has_the_lines_around_and_their_numbers():
    found = stage_facts(STAGE)
    assert found["pieces"] == [
        [(" ", 1, 1, "a = f(x)"), ("-", 2, None, "b = g(a)"), ("+", None, 2, "c = h(a)")],
    ]
    assert (found["difference"], found["added"], found["removed"], found["moved"]) == (
        1,
        [("h", 2)],
        [("g", 1)],
        3,
    )


def test_equal_texts_have_no_diff():
    assert stage_facts(Stage("canonicalize", 0.0, "a\n", "a\n", {}, {}))["pieces"] == []


def test_distant_changes_are_pieces_of_their_own():
    lines = [f"v{i} = f()" for i in range(40)]
    changed = ["x", *lines[1:-1], "y"]
    pieces = stage_facts(Stage("p", 0.0, "\n".join(lines), "\n".join(changed), {}, {}))["pieces"]
    assert [len(piece) for piece in pieces] == [5, 5]


def test_measured_kernels_are_where_they_ran():
    found = timeline("plain", KERNELS)
    assert (found["measured"], found["total"]) == (True, 4.0)
    assert [(bar["start"], bar["width"]) for bar in found["bars"]] == [(0.0, 0.25), (0.5, 0.5)]


def test_one_kernel_without_a_time_puts_all_in_order_by_their_bytes():
    kernels = [*KERNELS, Kernel("b", False, (), ("update",), bytes=100)]
    found = timeline("plain", kernels)
    assert (found["measured"], found["total"]) == (False, 500)
    assert [(bar["start"], bar["width"]) for bar in found["bars"]] == [(0, 0.2), (0.2, 0.6), (0.8, 0.2)]


def test_kernels_with_times_but_no_starts_follow_each_other():
    kernels = [Kernel(name, False, (), ("forward",), seconds=1.0) for name in "ab"]
    assert [bar["start"] for bar in timeline("plain", kernels)["bars"]] == [0.0, 0.5]


def test_phases_are_in_the_order_of_a_step_and_numbers_fit_into_json():
    page = whole()
    infinite = StepCost("plain", {"forward": PhaseCost(1, 1, float("inf"), float("nan"))}, 1, 1)
    found = content(Page("", [], "", page.graph, steps=[STEP, infinite]))
    assert [line["phase"] for line in found["steps"][0]["phases"]] == ["forward", "backward"]
    assert found["steps"][1]["phases"][0] | {"floor": None, "seconds": None} == found["steps"][1]["phases"][0]
    json.dumps(found, allow_nan=False)


def test_nothing_is_loaded_from_elsewhere():
    text = html(whole())
    addresses = set(re.findall(r"https?://[^\"' ]+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(link|iframe|object|embed)\b|<script[^>]+src=|@import|url\(", text)
    assert "default-src 'none'" in text


def test_what_is_shown_cannot_be_markup():
    text = html(evil())
    assert "window.evil = 1</script>" not in text
    assert text.count("</script>") == html(Page("", [], "", nx.DiGraph())).count("</script>") == 2
    assert json.loads(as_script(EVIL)) == EVIL


def test_braces_stay_what_they_are(tmp_path):
    write_page(tmp_path / "page.html", Page("{{title}}", [], "{{scripts}}", nx.DiGraph()))
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<title>{{title}}</title>" in text
    assert text.count('"use strict"') == 1


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"path must end in \.html, got 'report\.pdf'"):
        write_page("report.pdf", whole())
    with pytest.raises(ValueError, match=r"row of table_rows must be \(parameter, shape, .*got \('w',\)"):
        write_page("report.html", Page("", [("w",)], "", nx.DiGraph()))


# --- in a browser ------------------------------------------------------------------------------------

in_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no chromium on the path to open the page in"
)

LOOK = """
const all = (query) => [...document.querySelectorAll(query)];
const visible = (made) => made.checkVisibility();
const texts = (query) => all(query).filter(visible).map((made) => made.textContent);
const search = (text) => {
  const box = document.getElementById("search");
  box.value = text;
  box.dispatchEvent(new Event("input"));
};
const paths = () => all("#tree [data-path]").filter(visible).map((made) => made.dataset.path);
"""

VISIT = """
const found = { sections: texts("h2").map((text) => text.split(" ")[0]), closed: paths() };
found.rows = texts("#rows tr").length;
document.getElementById("expand").click();
found.open = paths();
search("%s");
found.rowsOfLayer = texts("#rows tr code");
found.pathsOfLayer = paths();
search("LAYERS.1.MLP");
found.rowsOfModule = texts("#rows tr code").length;
found.pathsOfModule = paths();
search("no such layer");
found.nothing = [texts("#rows tr").length, paths()];
search("");
found.rowsAgain = texts("#rows tr").length;
for (const made of all("details.stage, #timelines details, [data-path='head'] > details")) {
  made.open = true;
  made.fill && made.fill();
}
document.getElementById("collapse").click();
document.querySelector("[data-path='head']").open = true;
found.operators = texts("[data-path='head'] tbody td:nth-child(2)");
found.diff = texts(".diff tr.new .code, .diff tr.gone .code");
found.changes = texts(".change");
found.costs = texts("#steps td");
found.memory = texts("#steps p");
found.bars = all(".kernel rect").length;
found.notes = texts("#timelines h3 small");
found.images = all("#figures img").map((image) => image.alt);
found.summary = document.getElementById("summary").textContent;
return found;
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    write_page(folder / "page.html", whole())
    return run_in(folder / "page.html", LOOK + VISIT % LAYER, folder)


@in_browser
def test_it_opens_without_a_complaint(seen):
    assert seen.console == []
    assert seen.result["sections"] == ["Parameters", "Graph", "Passes", "Costs", "Kernels", "Plots"]
    assert seen.result["summary"] == "two\nlines"
    assert seen.result["images"] == ["the step"]


@in_browser
def test_the_tree_opens(seen):
    assert seen.result["closed"] == ["", "embed", "layers", "head", "outside of modules"]
    assert {"layers.0.mlp.2", "layers.2.norm"} < set(seen.result["open"])
    assert "parameter head.weight" in seen.result["operators"]
    assert "aten.mm.default" in seen.result["operators"]


@in_browser
def test_search_finds_a_layer(seen):
    found = seen.result
    assert found["rowsOfLayer"] == [LAYER]
    assert found["pathsOfLayer"] == ["", "layers", "layers.1", "layers.1.mlp", "layers.1.mlp.0"]
    assert found["rowsOfModule"] == 4
    assert found["pathsOfModule"] == ["", "layers", "layers.1", "layers.1.mlp"]
    assert found["nothing"] == [0, []]
    assert found["rows"] == found["rowsAgain"] == len(whole().table_rows)


@in_browser
def test_passes_costs_and_kernels_are_shown(seen):
    found = seen.result
    assert found["diff"] == ["b = g(a)", "c = h(a)"]
    assert found["changes"] == ["+2 h", "\N{MINUS SIGN}1 g", "3 operators moved"]
    assert found["costs"][:5] == ["forward", "1 FLOP", "2 B", "1 \N{MICRO SIGN}s", ""]
    assert found["memory"] == ["at most 5 kB alive at once; forward keeps 300 B for backward"]
    assert found["bars"] == 4  # one of the kernels is of two phases
    assert found["notes"][0] == "2 kernels in 4 s, as measured"
    assert found["notes"][1].startswith(
        "1 kernel; not measured: widths are bytes read and written, 5 B in all"
    )


@in_browser
def test_markup_in_names_is_text(tmp_path):
    write_page(tmp_path / "page.html", evil())
    script = (
        LOOK
        + """
        document.getElementById("expand").click();
        for (const made of all("details")) { made.open = true; made.fill && made.fill(); }
        const images = all("img").map((image) => image.src.slice(0, 5));
        return [window.evil === undefined, images, document.getElementById("title").textContent];
    """
    )
    seen = run_in(tmp_path / "page.html", script, tmp_path)
    assert seen.console == []
    assert seen.result == [True, ["data:"], EVIL]


@in_browser
def test_an_empty_page_has_no_sections(tmp_path):
    write_page(tmp_path / "page.html", Page("Nothing", [], "", nx.DiGraph(), kernels={"plain": []}))
    seen = run_in(tmp_path / "page.html", LOOK + "return texts('h1, h2');", tmp_path)
    assert seen == (["Nothing"], [])
