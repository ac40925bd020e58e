"""Find what a layer computes, in forward: the value that its cotangent is the cotangent of."""

import torch
from torch import fx

from .nodes import CASTS, RESHAPES, downstream, shape, target
from .outputs import Param, input_nodes
from .sites import seeds
from .walk import Site

aten = torch.ops.aten

PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.convolution.default}


def preactivation(gm: fx.GraphModule, site: Site) -> tuple[fx.Node, fx.Node] | None:
    """The output of a layer, bias included, and its cotangent; None where it is not clear.

    Args:
        gm: the graph.
        site: the only use of the layer.
    """
    cotangent = site.cotangent.node
    weight = input_nodes(gm)[Param(site.param)]
    backward = downstream(seeds(gm))
    products = [n for n in _near(weight, backward) if target(n) in PRODUCTS]
    if len(products) != 1:
        return None
    node: fx.Node | None = products[0]
    found = None
    while node is not None:
        found = node if shape(node) == shape(cotangent) else found
        node = _next(node, backward)
    return None if found is None else (found, cotangent)


def _near(weight: fx.Node, backward: set[fx.Node]) -> list[fx.Node]:
    """What reads the weight in forward, through views and casts."""
    near: list[fx.Node] = []
    todo = [weight]
    while todo:
        for user in todo.pop().users:
            if user in backward:
                continue
            near.append(user)
            if target(user) not in PRODUCTS and len(user.all_input_nodes) == 1:
                todo.append(user)
    return near


def _next(node: fx.Node, backward: set[fx.Node]) -> fx.Node | None:
    """The value with its bias, or in another shape."""
    users = [user for user in node.users if user not in backward]
    if len(users) != 1:
        return None
    (user,) = users
    if target(user) in RESHAPES | CASTS:
        return user
    others = [arg for arg in user.all_input_nodes if arg is not node]
    bias = target(user) is aten.add.Tensor and len(others) == 1 and len(shape(others[0])) == 1
    return user if bias else None
