"""One spelling for later passes.

Afterwards: every transposition of axes is an ``aten.permute``, every reshape without a copy an
``aten.view``, and no node inside the graph is a mere alias. The values are the same bit for bit.
"""

import torch
from torch import fx

from .nodes import PERMUTES, permutation, source, target

aten = torch.ops.aten

ALIASES = {aten.detach.default, aten.alias.default, aten.lift_fresh.default}
VIEWS = {aten._unsafe_view.default}  # not reshape, which may have to copy


def canonicalize(gm: fx.GraphModule) -> None:
    """Rewrite ``gm`` in place: transpositions are permutes, reshapes views, and nothing is a mere alias."""
    for node in list(gm.graph.nodes):
        if target(node) in ALIASES:
            _forward_alias(node)
        elif target(node) in PERMUTES:
            node.args = (source(node), list(permutation(node)))
            node.target = aten.permute.default
        elif target(node) in VIEWS:
            node.target = aten.view.default
    gm.graph.eliminate_dead_code()


def _forward_alias(node: fx.Node) -> None:
    """Let users read the aliased node. An output keeps its alias: two outputs must not become one."""
    node.replace_all_uses_with(source(node), delete_user_cb=lambda user: user.op != "output")
