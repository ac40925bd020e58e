"""How many floating-point operations a graph's products, convolutions and attentions take.

Torch's formulas, and some of our own. Its formula for the backward pass of a convolution (torch 2.11, 2.13
and 2.15) counts the gradient of a grouped weight as if there were no groups, E times too much; and it has
none for the attention of a CPU.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from .passes.nodes import target
from .passes.panels import flops_of_panels

aten = torch.ops.aten


def count_flops(gm: fx.GraphModule) -> int:
    """The floating-point operations of a graph's products, convolutions and attentions."""
    return sum(flops_of(node) for node in gm.graph.nodes)


def flops_of(node: fx.Node) -> int:
    """The floating-point operations of one node; 0 where it is none of these."""
    packet = getattr(target(node), "overloadpacket", None)
    formula = _OURS.get(packet) or flop_registry.get(packet)
    if formula is None:
        return 0
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    try:
        return int(formula(*args, **kwargs, out_val=node.meta["val"]))
    except GuardOnDataDependentSymNode:  # nobody knows the size before the data are there
        return 0


def _convolution_backward(g: Tensor, x: Tensor, weight: Tensor, *settings: Any, **_result: Any) -> int:
    """Either gradient takes as much as forward: every entry of the weight once for every place of the kernel.

    The kernel of a transposed convolution has a place for every pixel of the input, not of the output.
    """
    transposed, _output_padding, _groups, wanted = settings[-4:]
    places = math.prod((x if transposed else g).shape[2:])
    forward = 2 * int(x.shape[0]) * places * weight.numel()
    return forward * sum(wanted[:2])


def _attention(q: Tensor, k: Tensor, v: Tensor, *_settings: Any, **_result: Any) -> int:
    return int(sdpa_flop_count(q.shape, k.shape, v.shape))


def _attention_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, *_settings: Any, **_result: Any) -> int:
    return int(sdpa_backward_flop_count(g.shape, q.shape, k.shape, v.shape))


_OURS: dict[Any, Callable[..., int]] = {
    aten.convolution_backward: _convolution_backward,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.thor_fx.gram_by_panels: flops_of_panels,
}
