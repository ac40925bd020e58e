"""Typed access to what ``torch.fx`` leaves untyped: arguments, values and order of nodes."""

import re
from collections.abc import Callable, Iterable
from operator import getitem
from pathlib import Path
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

CASTS = {
    aten._to_copy.default,
    torch.ops.prims.convert_element_type.default,
    aten.detach.default,
    aten.alias.default,
    aten.clone.default,
}
RESHAPES = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
}
PERMUTES = {aten.permute.default, aten.t.default, aten.transpose.int}


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """The positional arguments, as the operator's schema types them."""
    return node.args


def source(node: fx.Node) -> fx.Node:
    """The first argument of an operator on a tensor."""
    first = node.args[0]
    assert isinstance(first, fx.Node), f"{node.name} takes no tensor"
    return first


def shape(node: fx.Node) -> tuple[int, ...]:
    """The shape of a node's value; symbolic sizes stay symbolic."""
    return tuple(node.meta["val"].shape)


def target(node: fx.Node) -> Any:
    """What a node computes: an operator, for all but inputs and outputs."""
    return node.target if node.op == "call_function" else None


def permutation(node: fx.Node) -> tuple[int, ...]:
    """The order of axes that a permutation, in whatever spelling, makes."""
    dims = len(shape(node))
    if target(node) is aten.permute.default:
        return tuple(axis % dims for axis in arguments(node)[1])
    order = list(range(dims))
    if dims > 1:
        first, second = (0, 1) if target(node) is aten.t.default else arguments(node)[1:3]
        order[first], order[second] = order[second], order[first]
    return tuple(order)


def is_random(node: fx.Node) -> bool:
    """Whether a node draws numbers from the global generator."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def is_pointwise(node: fx.Node) -> bool:
    """Whether torch says of an operator that it works element by element."""
    return torch.Tag.pointwise in getattr(target(node), "tags", ())


def is_write(node: fx.Node) -> bool:
    """Whether a node writes to one of its arguments."""
    return bool(getattr(getattr(target(node), "_schema", None), "is_mutable", False))


def is_view(node: fx.Node) -> bool:
    """Whether a node's value, or what it is one of, lies in the memory of its first argument."""
    if target(node) is getitem:
        return is_view(source(node))
    if target(node) in RESHAPES or target(node) in (aten.detach.default, aten.alias.default):
        return True
    returned = getattr(getattr(target(node), "_schema", None), "returns", ())
    return not is_write(node) and any(one.alias_info is not None for one in returned)


def use_of(node: fx.Node) -> str:
    """The line of Python that a node comes from: ``model.py:12 in forward: y = self.fc(x)``; or ""."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    outside = [frame for frame in frames if not frame[0].startswith(_LIBRARIES)]
    if not outside:
        return ""
    path, line, function, code = outside[-1]
    return f"{path.rsplit('/', 1)[-1]}:{line} in {function}: {code.strip()}"


_LIBRARIES = tuple(str(Path(file).parent) + "/" for file in (str(torch.__file__), str(Path(__file__).parent)))
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)\n(.*)')


def downstream(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Everything that depends on ``nodes``, themselves included."""
    return _closure(nodes, lambda node: node.users)


def upstream(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Everything that ``nodes`` depend on, themselves included."""
    return _closure(nodes, lambda node: node.all_input_nodes)


def chain(node: fx.Node | None, length: int = 4) -> str:
    """The operators that a value ends in, last first: ``view <- sum <- mul``."""
    names: list[str] = []
    while node is not None and len(names) < length:
        if node.op != "call_function":
            names.append(node.name)
            break
        names.append(getattr(node.target, "__name__", str(node.target)).split(".")[0])
        node = next(iter(node.all_input_nodes), None)
    return " <- ".join(names)


def _closure(nodes: Iterable[fx.Node], following: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += following(node)
    return found
