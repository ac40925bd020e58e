"""Imports go one way, torch <- passes <- thor_fx <- examples, benchmarks; private torch names stay put."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RANK = {"passes": 0, "thor_fx": 1, "examples": 2, "benchmarks": 2, "tests": 3}
PACKAGE = {"passes": "thor_fx.passes", "thor_fx": "thor_fx"}
ADAPTERS = {
    "thor_fx/capture.py",  # Dynamo, and the export of joint graphs
    "thor_fx/inductor.py",
    "thor_fx/inductor_kernels.py",  # what Inductor generates, and what a profiler sees of it
    "thor_fx/joint_graphs.py",  # AOTAutograd's descriptors
    "thor_fx/partitioner.py",  # AOTAutograd's min-cut
    "thor_fx/trace_log.py",  # torch's structured log
    "thor_fx/recurrent.py",  # decompositions of recurrent layers
    "thor_fx/distributed/dtensors.py",
}
# Not meant: operators, _foreach_* functions, and _pytree, which torch's own examples import.
PRIVATE = re.compile(r"torch\.(?!ops\.|_foreach_|utils\._pytree\b)(\w+\.)*_(?!_)")
SOURCES = [path for folder in RANK for path in sorted((ROOT / folder).rglob("*.py"))]


def dotted_names(source: str, package: str = "") -> Iterator[tuple[int, str]]:
    """Yield the line and full name of every import, and of every attribute chain that starts at one."""
    imported: dict[str, str] = {}
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                imported[alias.asname or top] = alias.name if alias.asname else top
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*parents, *filter(None, [node.module])])
            for alias in node.names:
                imported[alias.asname or alias.name] = f"{module}.{alias.name}"
                yield node.lineno, f"{module}.{alias.name}"
    for node in ast.walk(tree):
        chain: list[str] = []
        target: ast.AST = node
        while isinstance(target, ast.Attribute):
            chain.insert(0, target.attr)
            target = target.value
        if chain and isinstance(target, ast.Name) and target.id in imported:
            yield node.lineno, ".".join([imported[target.id], *chain])


def layer_of(name: str) -> str | None:
    """Return the layer that a full name belongs to; ``None`` if it is not ours."""
    if re.match(r"thor_fx\.passes\b", name):
        return "passes"
    top = name.partition(".")[0]
    return top if top in RANK else None


def package_of(path: Path) -> str:
    """The package that relative imports of a source start from."""
    top, *folders = path.relative_to(ROOT).parts[:-1]
    return ".".join([PACKAGE.get(top, ""), *folders])


def upward_imports(source: str, layer: str, package: str | None = None) -> list[str]:
    """Names from a layer above ``layer``, or under ``passes``, a name that no install provides."""
    return [
        f"line {line}: {name}"
        for line, name in dotted_names(source, PACKAGE.get(layer, "") if package is None else package)
        if (found := layer_of(name)) is not None
        and (RANK[found] > RANK[layer] or name.partition(".")[0] == "passes")
    ]


def private_torch_names(source: str) -> list[str]:
    """Names that torch may change without notice."""
    return [f"line {line}: {name}" for line, name in dotted_names(source) if PRIVATE.match(name)]


def test_sources_are_found():
    found = {path.relative_to(ROOT).parts[0] for path in SOURCES}
    assert {"passes", "thor_fx", "tests"} <= found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_go_one_way(path: Path):
    layer = path.relative_to(ROOT).parts[0]
    assert upward_imports(path.read_text(), layer, package_of(path)) == []


@pytest.mark.parametrize(
    "path",
    [path for path in SOURCES if path.relative_to(ROOT).parts[0] in PACKAGE],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_private_torch_names_stay_in_the_adapters(path: Path):
    source = path.read_text()
    if path.relative_to(ROOT).as_posix() not in ADAPTERS:
        assert private_torch_names(source) == []
    else:
        assert "torch 2." in ast.get_docstring(ast.parse(source)), "state the torch versions"


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("passes", "import thor_fx"),
        ("passes", "from thor_fx.layers import Layer"),
        ("passes", "from ..layers import Layer"),
        ("passes", "from .. import layers"),
        ("passes", "def f():\n    import benchmarks.speed"),
        ("thor_fx", "from examples import mlp"),
        ("thor_fx", "from tests.oracle import factors"),
        ("thor_fx", "from passes.sites import Site"),
        ("examples", "import passes"),
        ("benchmarks", "import tests.oracle as oracle"),
    ],
)
def test_an_upward_import_is_found(layer: str, source: str):
    assert len(upward_imports(source, layer)) == 1


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("passes", "import torch\nfrom . import outputs\nfrom .sites import Site"),
        ("passes", "import thor_fx.passes.spec\nfrom torch.fx import passes"),
        ("thor_fx", "from . import layers, passes\nfrom .passes import run"),
        ("examples", "import thor_fx\nfrom thor_fx.passes import run\nprint(thor_fx.passes.sites)"),
        ("tests", "import thor_fx\nfrom benchmarks import speed"),
    ],
)
def test_a_downward_import_is_fine(layer: str, source: str):
    assert upward_imports(source, layer) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch._dynamo",
        "import torch._inductor.config as config",
        "from torch import _guards",
        "from torch._functorch.aot_autograd import aot_export_joint_with_descriptors",
        "from torch.fx._utils import lazy_format_graph_code",
        "import torch\ntorch._C",
        "import torch as t\ndef f():\n    return t._subclasses.FakeTensorMode",
        "from torch import fx\nfx._symbolic_trace",
        "from torch.fx import passes\npasses._tools",
    ],
)
def test_a_private_torch_name_is_found(source: str):
    assert private_torch_names(source)


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.ops.aten._to_copy.default",
        "import torch\ntorch._foreach_mul_",
        "from torch.utils import _pytree",
        "import torch\ntorch.fx.Graph.__init__",
        "from . import _dynamo",
        "'torch._inductor is mentioned only'",
    ],
)
def test_other_names_are_fine(source: str):
    assert private_torch_names(source) == []
