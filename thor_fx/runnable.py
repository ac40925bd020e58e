"""Step graphs as Python files that run on their own.

A file has the code of the graph and builds its arguments by itself: random numbers of the right shapes,
strides, dtypes and devices; symbolic sizes are those that were traced. Whole numbers are 0 or 1, so that they
are indices of nearly everything. Small constants are written out; larger ones of the graph are random, too.
"""

import functools
import math
import re
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from .distributed.collectives import is_collective
from .passes import outputs
from .passes.stages import code_of

SMALL = 64  # elements of a constant that is written out
OF_TORCH = {"aten", "prim", "prims", "rngprims", "higher_order", "quantized", "_quantized"}

HEAD = '''"""A step graph of thor_fx that runs on its own: {title}."""

import math
import operator

import torch
from torch import device, inf, nan
{imports}

def tensor(shape, stride, dtype, device):
    """Random numbers; of whole ones, 0 and 1."""
    size = 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, stride))
    whole = not (dtype.is_floating_point or dtype.is_complex)
    values = torch.randint(0, 2, (size,)) if whole else torch.randn(size)
    return values.to(device, dtype).as_strided(shape, stride)


'''

MAIN = """

ARGUMENTS = [
{arguments}]

RESULTS = [
{results}]


if __name__ == "__main__":
    torch.manual_seed(0)
    arguments = [make() for make in ARGUMENTS]
    with torch.no_grad():
        results = Graph()(*arguments)
    for name, result in zip(RESULTS, results, strict=True):
        print(name, tuple(result.shape) if isinstance(result, torch.Tensor) else result)
"""


class NotRunnable(ValueError):
    """A graph holds something that a file cannot: the message names it."""


def write_stage(gm: fx.GraphModule, path: str | Path) -> Path:
    """Write a graph as a Python file: ``python path`` runs it and prints the shapes of its results.

    Args:
        gm: a step graph with descriptors, before or after any pass; arguments know their values
            (``meta["val"]``).
        path: of the file.

    Returns:
        The path.

    Raises:
        NotRunnable: the graph sends to other ranks, calls an operator of another library, or holds an object
            that is neither a tensor nor a graph.

    Example:
        >>> import tempfile, thor_fx
        >>> params, x = {"w": torch.ones(3, 2)}, torch.ones(5, 3)
        >>> gm = thor_fx.trace_step(lambda params, x: (x @ params["w"]).mean(), params, x)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = write_stage(gm, f"{folder}/stage.py")
        ...     "class Graph" in path.read_text()
        True
    """
    path = Path(path)
    path.write_text(source_of(gm, path.stem))
    return path


def source_of(gm: fx.GraphModule, title: str = "a stage") -> str:
    """What :func:`write_stage` writes.

    Raises:
        NotRunnable: see there.
    """
    arguments = [
        f"    {_maker(node)},  # {node.meta.get(outputs.KEY, node.name)}\n"
        for node in gm.graph.find_nodes(op="placeholder")
    ]
    descriptors = outputs.output_node(gm.graph).meta[outputs.KEY]
    results = [f"    {str(descriptor)!r},\n" for descriptor in descriptors]
    imports = "".join(f"{line}\n" for line in sorted(set(_imports(gm))))
    main = MAIN.format(arguments="".join(arguments), results="".join(results))
    return HEAD.format(title=title, imports=imports) + _class(gm, "Graph") + main


def _class(gm: fx.GraphModule, name: str) -> str:
    """A graph, and before it those that it holds, as classes."""
    inner, fields = [], []
    for target in dict.fromkeys(str(node.target) for node in gm.graph.find_nodes(op="get_attr")):
        value = functools.reduce(getattr, target.split("."), gm)
        if isinstance(value, fx.GraphModule):
            own = re.sub(r"\W", "_", f"{name}_{target}")
            inner.append(_class(value, own))
            fields.append((target, f"{own}()"))
        else:
            fields.append((target, _constant(value, target)))
    body = "".join(f"        setattr(self, {target!r}, {value})\n" for target, value in fields)
    init = f"    def __init__(self):\n        super().__init__()\n{body}\n"
    code = textwrap.indent(_flat(code_of(gm), [target for target, _ in fields]), "    ")
    return "".join(inner) + f"class {name}(torch.nn.Module):\n{init}{code}\n\n\n"


def _flat(code: str, targets: list[str]) -> str:
    """The code, where names of constants with dots in them are no modules."""
    for target in targets:
        code = re.sub(rf"\bself\.{re.escape(target)}\b", f"getattr(self, {target!r})", code)
    return code


def _constant(value: Any, target: str) -> str:
    if not isinstance(value, Tensor):
        kind = type(value).__name__
        raise NotRunnable(f"constant {target!r} is a {kind}: only tensors and graphs can be written")
    if hasattr(value, "fake_mode") or value.numel() > SMALL:
        return _random(value)
    return f"torch.tensor({value.tolist()!r}, dtype={value.dtype}, device={str(value.device)!r})"


def _maker(node: fx.Node) -> str:
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return f"lambda: {_random(value)}"
    if value is None:
        raise NotRunnable(f"argument {node.name!r} has no value in meta['val']: trace the graph on examples")
    return f"lambda: {_number(value)!r}"


def _random(value: Tensor) -> str:
    shape, stride = ([_number(n) for n in each] for each in (value.shape, value.stride()))
    return f"tensor({shape}, {stride}, {value.dtype}, {str(value.device)!r})"


def _number(value: Any) -> Any:
    """A size as a number: of a symbolic one, that which was traced."""
    return value.node.hint if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) else value


def _imports(gm: fx.GraphModule) -> Iterator[str]:
    """The lines of imports that the code of a graph, and of those that it holds, needs."""
    for node in gm.graph.nodes:
        library = getattr(node.target, "namespace", "aten")
        if is_collective(node):
            raise NotRunnable(f"node {node.name!r} sends to other ranks ({node.target}): a file has none")
        if library == "thor_fx":
            yield "import thor_fx"
        elif library not in OF_TORCH:
            raise NotRunnable(f"node {node.name!r} calls {node.target}, an operator of another library")
    for name, value in gm.graph.python_code("self").globals.items():
        yield from _import(name, value)
    for part in gm.children():
        if isinstance(part, fx.GraphModule):
            yield from _imports(part)


def _import(name: str, value: Any) -> Iterator[str]:
    if name in {"torch", "device", "inf", "nan", "math", "operator"} or name in vars(math):
        return
    if isinstance(value, types.ModuleType):
        yield f"import {value.__name__} as {name}"
    elif name == "NoneType":
        yield "NoneType = type(None)"
    elif hasattr(value, "__module__") and hasattr(value, "__qualname__") and "<" not in value.__qualname__:
        yield f"from {value.__module__} import {value.__qualname__} as {name}"
    else:
        raise NotRunnable(f"the code uses {name!r} ({type(value).__name__}), which cannot be imported")
