"""One spelling for later passes.

Afterwards: every transposition of axes is an ``aten.permute``, every reshape without a copy an
``aten.view``, and no node inside the graph is a mere alias. The values are the same bit for bit.
"""

import torch
from torch import fx

aten = torch.ops.aten

ALIASES = {aten.detach.default, aten.alias.default, aten.lift_fresh.default}
VIEWS = {aten._unsafe_view.default, aten.reshape.default}


def canonicalize(gm: fx.GraphModule) -> None:
    """Rewrite ``gm`` in place to the spelling above."""
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in ALIASES:
            _forward_alias(node)
        elif node.target is aten.t.default or node.target is aten.transpose.int:
            node.args = (node.args[0], _permutation(node))
            node.target = aten.permute.default
        elif node.target in VIEWS:
            node.target = aten.view.default
    gm.graph.eliminate_dead_code()


def _forward_alias(node: fx.Node) -> None:
    """Let users read the aliased node. An output keeps its alias: two outputs must not become one."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    node.replace_all_uses_with(source, delete_user_cb=lambda user: user.op != "output")


def _permutation(node: fx.Node) -> list[int]:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    order = list(range(source.meta["val"].dim()))
    if len(order) < 2:
        return order
    first, second = (0, 1) if node.target is aten.t.default else node.args[1:3]
    order[first], order[second] = order[second], order[first]  # type: ignore[index]
    return order
