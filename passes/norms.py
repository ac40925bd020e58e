"""Recognise the scale and shift of a normalisation layer from their gradients.

LayerNorm, RMSNorm, GroupNorm, BatchNorm and InstanceNorm, as operators of their own, as Inductor's
decompositions of those, and written by hand (``x * rsqrt(...)``, ``x / sqrt(...)``).
"""

import operator
from typing import Any

import torch
from torch import fx

from .nodes import CASTS, RESHAPES, arguments, shape, source, target

aten = torch.ops.aten


def _operators(*names: str) -> set[Any]:
    """Overloads called ``default``, of those operators that this torch has."""
    return {getattr(aten, name).default for name in names if hasattr(aten, name)}


BACKWARDS = _operators(
    "native_layer_norm_backward",
    "_fused_rms_norm_backward",
    "native_group_norm_backward",
    "native_batch_norm_backward",
    "cudnn_batch_norm_backward",
    "miopen_batch_norm_backward",
    "batch_norm_backward",
)
DIVISIONS = {aten.div.Tensor: aten.sqrt.default, aten.mul.Tensor: aten.rsqrt.default}


def is_norm(gradient: fx.Node, backward: set[fx.Node]) -> bool:
    """Whether a gradient is that of a normalisation layer's scale or shift.

    Args:
        gradient: of a parameter.
        backward: every node that depends on where backward starts.
    """
    node = _under_casts(gradient)
    if target(node) is operator.getitem:
        return target(source(node)) in BACKWARDS and arguments(node)[1] != 0  # 0: of the input
    if target(node) is aten.mul.Tensor:  # a decomposed BatchNorm: sum * invstd
        return _decomposed(node) and len(shape(node)) == 1
    if target(node) is not aten.sum.dim_IntList:
        return False
    if _decomposed(node):
        return True
    summed = _under_casts(source(node))
    if target(summed) is operator.getitem:  # InstanceNorm: one BatchNorm over (batch x channels)
        return is_norm(summed, backward)
    factors = summed.all_input_nodes if target(summed) is aten.mul.Tensor else []
    return any(_is_normalised(factor) for factor in factors if factor not in backward)


def _decomposed(node: fx.Node) -> bool:
    return node.meta.get("original_aten") in BACKWARDS


def _under_casts(node: fx.Node) -> fx.Node:
    while target(node) in CASTS | RESHAPES:
        node = source(node)
    return node


def _is_normalised(node: fx.Node) -> bool:
    """Whether a node is ``x * rsqrt(...)`` or ``x / sqrt(...)``, however cast."""
    node = _under_casts(node)
    root = DIVISIONS.get(target(node))
    return root is not None and any(target(_under_casts(factor)) is root for factor in node.all_input_nodes)
