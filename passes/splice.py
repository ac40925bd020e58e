"""Write inserted computation as Python; trace it; insert its nodes."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from functorch import make_fx
from torch import fx
from torch.utils import _pytree as pytree

Decompositions = Mapping[Any, Callable[..., Any]]


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
    structure = None

    def flat(*values: torch.Tensor) -> list[Any]:
        nonlocal structure
        leaves, structure = pytree.tree_flatten(fn(*values))
        return leaves

    mode = operands[0].meta["val"].fake_mode
    with mode, torch.no_grad():
        values = [in_mode(mode, node.meta["val"]) for node in operands]
        try:
            traced = make_fx(flat, decomposition_table=dict(decompositions or {}))(*values)
        except AssertionError as error:
            if "convert all Tensors to FakeTensors" in str(error):
                raise ValueError("the spliced function captures a tensor: pass it as an operand") from error
            raise
    assert structure is not None
    return pytree.tree_unflatten(_insert(anchor, traced, operands), structure)


def in_mode(mode: Any, value: Any) -> torch.Tensor:
    """The value in the given fake mode; ``make_fx`` on real tensors gives every value its own."""
    if value.fake_mode is mode:
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def _insert(anchor: fx.Node, traced: fx.GraphModule, operands: tuple[fx.Node, ...]) -> list[Any]:
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
    raise AssertionError("a traced graph has an output")
