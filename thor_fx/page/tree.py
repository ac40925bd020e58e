"""The modules of a model and the operators in them, as the page shows them."""

from typing import Any

import networkx as nx

from ..graphs.blocks import OUTSIDE
from ..graphs.places import places
from ..passes.outputs import Frozen, Param
from ..units import times

COLUMNS = ("name", "operator", "shape", "dtype", "phase", "flops", "bytes", "kernel")


def tree(graph: "nx.DiGraph[str]") -> dict[str, Any]:
    """Modules in modules, and operators in the modules that they come from, each with its sums."""
    root = _module("", "model")
    for node, path in places(graph).items():
        facts = graph.nodes[node]
        params = [d.name for d in facts["descriptors"] if isinstance(d, Param | Frozen)]
        if facts["op"] not in {"call_function", "placeholder"} or (
            facts["op"] == "placeholder" and not params
        ):
            continue
        module = _descend(root, path)
        module["layers"].update(dict.fromkeys((*params, *(facts["site"] or ()))))
        module["operators"].append(_operator(node, facts, params))
    return _summed(root)


def _module(path: str, name: str) -> dict[str, Any]:
    return {"path": path, "name": name, "modules": {}, "operators": [], "layers": {}}


def _descend(root: dict[str, Any], path: str | None) -> dict[str, Any]:
    names = [OUTSIDE] if path is None else path.split(".") if path else []
    module = root
    for depth, name in enumerate(names, start=1):
        module = module["modules"].setdefault(name, _module(".".join(names[:depth]), name))
    return module


def _operator(node: str, facts: dict[str, Any], params: list[str]) -> list[Any]:
    """One line, in the order of :data:`COLUMNS`."""
    shape = "" if facts["shape"] is None else times(facts["shape"])
    dtype = str(facts["dtype"] or "").removeprefix("torch.")
    what = f"parameter {params[0]}" if params else facts["operator"]
    return [
        node,
        what,
        shape,
        dtype,
        facts["phase"] or "",
        facts["flops"],
        facts["bytes"],
        facts["kernel"] or "",
    ]


def _summed(module: dict[str, Any]) -> dict[str, Any]:
    """The module with sums over all that is in it; ``phases`` counts operators."""
    inner = [_summed(child) for child in module["modules"].values()]
    own = [line for line in module["operators"] if not line[1].startswith("parameter ")]
    phases: dict[str, int] = {}
    for line in own:
        phases[line[4]] = phases.get(line[4], 0) + 1
    for child in inner:
        for phase, count in child["phases"].items():
            phases[phase] = phases.get(phase, 0) + count
    return {
        "path": module["path"],
        "name": module["name"],
        "modules": inner,
        "operators": module["operators"],
        "layers": list(module["layers"]),
        "flops": sum(line[5] for line in own) + sum(child["flops"] for child in inner),
        "phases": phases,
    }
