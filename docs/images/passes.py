"""The pictures of docs/pipeline.md: ``python docs/images/passes.py`` writes them beside this file.

The graphs are those of thor_fx: ``trace_step`` and the passes themselves, and for what belongs to a whole
step, the stages and graphs of ``explain(...).steps``.
"""

import re
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

import networkx as nx
import torch
from node_graph import Panel, part_of, picture
from torch import Tensor, fx, nn

import thor_fx
from thor_fx.graphs import to_networkx
from thor_fx.passes import (
    Factor,
    Grad,
    Input,
    Loss,
    Param,
    Rows,
    Terms,
    canonicalize,
    emit_factors,
    mark,
    run,
)
from thor_fx.passes.layout import Rules
from thor_fx.passes.stages import Stage

HERE = Path(__file__).parent
LINE = re.compile(r"^ *(\w+) = torch\.ops\.aten\.(\w+)\.\w+\((.*)\)$", re.MULTILINE)
KEYWORD = re.compile(r"\w+ = \S+")
READ = re.compile(r"\b[a-z]\w*")
NAMES: dict[type, Callable[..., str]] = {
    Loss: lambda _: "loss",
    Grad: lambda d: f"gradient of {d.param}",
    Factor: lambda d: f"{d.side} of {d.layer}",
    Rows: lambda d: f"R of {d.layer}",
    Terms: lambda _: "n",
    Param: lambda d: d.name,
    Input: lambda _: "x",
}


def one_layer(params: dict[str, Tensor], x: Tensor) -> Tensor:
    """A layer and a loss."""
    return torch.tanh(x @ params["W"].T).square().mean()


def attention_inputs(params: dict[str, Tensor], x: Tensor) -> Tensor:
    """Three layers that read the same rows."""
    q, k, v = (x @ params[name].T for name in "qkv")
    return (q * k * v).mean()


def nodes_of(gm: fx.GraphModule) -> nx.DiGraph:
    """A graph in the words of a picture."""
    network = to_networkx(gm)
    found = nx.DiGraph()
    for name, facts in network.nodes(data=True):
        if facts["op"] == "output":
            continue
        inputs = [d for d in facts["descriptors"] if type(d) in {Param, Input}]
        results = [d for d in facts["descriptors"] if d not in inputs and type(d) in NAMES]
        shape = "" if facts["shape"] is None else " x ".join(map(str, facts["shape"])) or "number"
        found.add_node(
            name,
            label=named(inputs[0]) if inputs else facts["operator"].removeprefix("aten.").partition(".")[0],
            shape=shape,
            phase=facts["phase"],
            results=", ".join(map(named, results)),
            input=bool(inputs),
        )
    found.add_edges_from(edge for edge in network.edges if edge[1] in found)
    return found


def named(descriptor: object) -> str:
    """What an input or an output is."""
    return NAMES[type(descriptor)](descriptor)


def change(name: str, before: fx.GraphModule, after: fx.GraphModule, titles: tuple[str, str]) -> None:
    """Draw two graphs; boxes that only one of them has are marked."""
    old, new = nodes_of(before), nodes_of(after)
    panels = [
        Panel(titles[0], old, only_in(old, new), "gone"),
        Panel(titles[1], new, only_in(new, old), "new"),
    ]
    (HERE / f"{name}.svg").write_text(picture(panels))


def only_in(one: nx.DiGraph, other: nx.DiGraph) -> set[str]:
    """The nodes that have another operator in the other graph, or are not there."""
    operators = dict(other.nodes(data="label"))
    return {name for name, label in one.nodes(data="label") if operators.get(name) != label}


def parsed(code: str) -> nx.DiGraph:
    """The code of a stage, one line for every node."""
    found = nx.DiGraph()
    operators = {name: operator for name, operator, _ in LINE.findall(code)}
    for name, _, arguments in LINE.findall(code):
        found.add_edges_from((source, name) for source in READ.findall(KEYWORD.sub("", arguments)))
    for name in found:
        facts = {"shape": "", "phase": None, "results": "", "input": name not in operators}
        nx.set_node_attributes(found, {name: {"label": operators.get(name, name), **facts}})
    return found


def made_from(graph: nx.DiGraph, node: str, computed: Collection[str]) -> nx.DiGraph:
    """What a node is made from, by edges into nodes of ``computed``."""
    read = graph.edge_subgraph([edge for edge in graph.edges if edge[1] in computed])
    return part_of(graph, {node} | nx.ancestors(read, node))


def main() -> None:
    """Write all pictures."""
    torch.manual_seed(0)
    x = torch.randn(8, 4)
    traced = thor_fx.trace_step(one_layer, {"W": torch.randn(3, 4)}, x)
    plain = run(traced, [canonicalize])
    change("pass_canonicalize", traced, plain, ("as it was traced", "after canonicalize"))
    marked = run(plain, [mark])
    with_factors = run(plain, [emit_factors, mark])
    change("pass_emit_factors", marked, with_factors, ("a plain step", "after emit_factors"))

    weights = {name: torch.randn(3, 4) for name in "qkv"}
    step = run(thor_fx.trace_step(attention_inputs, weights, x), [canonicalize])
    apart = run(step, [partial(emit_factors, rules=Rules(disabled=("shared_inputs",))), mark])
    together = run(step, [emit_factors, mark])
    panels = [Panel("without shared_inputs", factors_of(apart)), Panel("with it", factors_of(together))]
    (HERE / "pass_shared_inputs.svg").write_text(picture(panels, stacked=True))
    whole_steps()


def factors_of(gm: fx.GraphModule) -> nx.DiGraph:
    """The factors of a graph, with what they are made of; without ``R`` and ``n``, constants here."""
    found = nodes_of(gm)
    constants = {name for name, label in found.nodes(data="label") if label == "full"}
    own = {name for name, phase in found.nodes(data="phase") if phase == "factors"} - constants
    read = {source for name in own for source in found.predecessors(name)}
    return part_of(found, own | read)


def whole_steps() -> None:
    """The stages of a whole step, and its two kinds in boxes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    tx = thor_fx.thor(lr=0.1, damping=0.1, momentum=0.9, factor_decay=0.9, block_size=None)
    report = thor_fx.explain(model, torch.randn(8, 4), tx=tx)
    stage = next(stage for stage in report.steps.stages["factor"] if stage.name == "accumulate")
    (HERE / "pass_accumulate.svg").write_text(picture(folded(stage)))
    for kind in ("plain", "factor"):
        report.draw(HERE / f"step_{kind}.svg", step=kind)


def folded(stage: Stage) -> list[Panel]:
    """One of the products that became the end of an average: what it was, and what it is."""
    before, after = parsed(stage.before), parsed(stage.after)
    new, gone = set(after) - set(before), set(before) - set(after)
    average, fused = next(edge for edge in after.edges if edge[1] in new and edge[0].startswith("state"))
    product = next(name for name in before if name in gone and average in before.predecessors(name))
    (total,) = before.successors(product)
    products = {name for name, operator in before.nodes(data="label") if operator == "mm"}
    old, now = made_from(before, total, gone | products), made_from(after, fused, new)
    for graph in (old, now):
        graph.nodes[average]["label"] = "average so far"
    return [Panel("before accumulate", old, gone, "gone"), Panel("after it", now, new)]


if __name__ == "__main__":
    main()
