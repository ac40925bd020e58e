"""Write inserted computation as Python; trace it; insert its nodes."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from functorch import make_fx
from torch import fx
from torch.utils import _pytree as pytree

Decompositions = Mapping[Any, Callable[..., Any]]

_of_host: ContextVar[Decompositions | None] = ContextVar("decompositions of the host graph", default=None)


@contextlib.contextmanager
def inside(decompositions: Decompositions) -> Iterator[None]:
    """What is spliced inside goes into graphs that were traced with this table, unless it says another."""
    token = _of_host.set(decompositions)
    try:
        yield
    finally:
        _of_host.reset(token)


class Traced(NamedTuple):
    """A traced function: its graph, and the structure of what it returns."""

    graph: fx.GraphModule
    structure: pytree.TreeSpec


def splice(
    anchor: fx.Node,
    fn: Callable[..., Any],
    *operands: fx.Node,
    decompositions: Decompositions | None = None,
) -> Any:
    """Insert the operations of ``fn(*operands)`` right behind ``anchor``.

    ``fn`` is traced on the operands' fake values, so that what is inserted is spelled as the tracer
    spells it and arrives with its shapes. (NOTE: a hand-written ``aten.t`` in a graph that has been
    decomposed already crashes Inductor: hence ``decompositions``, the table of the host graph.)

    Args:
        anchor: the node after which the new nodes go; all operands must be defined by then.
        fn: a pure function of tensors; it may return any nest of tensors.
        *operands: nodes of the same graph that have ``meta["val"]``.
        decompositions: the table that the host graph was traced with.

    Returns:
        The nodes of the results, in the structure that ``fn`` returned.

    Raises:
        ValueError: ``fn`` closes over a tensor.
        AssertionError: what ``fn`` itself asserts.
    """
    return put(anchor, trace(fn, *operands, decompositions=decompositions), *operands)


def trace(fn: Callable[..., Any], *operands: fx.Node, decompositions: Decompositions | None = None) -> Traced:
    """The operations of ``fn`` of values like those of ``operands``: the first half of :func:`splice`."""
    structure = None

    def flat(*values: torch.Tensor) -> list[Any]:
        nonlocal structure
        leaves, structure = pytree.tree_flatten(fn(*values))
        return leaves

    mode = operands[0].meta["val"].fake_mode
    # NOTE: else the tracer asks for numbers where sizes are symbolic: padding would fix the batch size
    tracing_mode = "real" if mode.shape_env is None else "symbolic"
    with mode, torch.no_grad():
        values = [in_mode(mode, node.meta["val"]) for node in operands]
        try:
            table = dict((_of_host.get() if decompositions is None else decompositions) or {})
            traced = make_fx(flat, table, tracing_mode)(*values)
        except AssertionError as error:
            if "convert all Tensors to FakeTensors" in str(error):
                raise ValueError("the spliced function captures a tensor: pass it as an operand") from error
            raise
    assert structure is not None
    return Traced(traced, structure)


def put(anchor: fx.Node, traced: Traced, *operands: fx.Node, again: bool = False) -> Any:
    """Insert a traced function right behind ``anchor``: the second half of :func:`splice`.

    Args:
        anchor: as in :func:`splice`.
        traced: the function.
        *operands: of the shapes, strides and dtypes that it was traced with.
        again: whether it has been inserted before.
    """
    nodes = _insert(anchor, traced.graph, operands, again=again)
    return pytree.tree_unflatten(nodes, traced.structure)


def in_mode(mode: Any, value: Any) -> torch.Tensor:
    """The value in the given fake mode; ``make_fx`` on real tensors gives every value its own."""
    if value.fake_mode is mode:
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def another(value: Any) -> torch.Tensor:
    """A fake tensor like ``value``."""
    with value.fake_mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def _insert(
    anchor: fx.Node, traced: fx.GraphModule, operands: tuple[fx.Node, ...], *, again: bool
) -> list[Any]:
    graph = anchor.graph
    env = dict(zip(traced.graph.find_nodes(op="placeholder"), operands, strict=True))
    for node in traced.graph.nodes:
        if node.op == "output":
            return [env[n] for n in node.args[0]]
        if node.op == "placeholder":
            continue
        if node.op == "get_attr":  # a fake tensor, or a constant made from a number
            raise ValueError(f"the spliced function captures a tensor ({node.target}): pass it as an operand")
        with graph.inserting_after(anchor):
            anchor = env[node] = graph.node_copy(node, env.__getitem__)
        # NOTE: values of their own, for tracers tell tensors apart by identity
        if again and "val" in node.meta:
            anchor.meta["val"] = pytree.tree_map_only(torch.Tensor, another, node.meta["val"])
    raise AssertionError("a traced graph has an output")
