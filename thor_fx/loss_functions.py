"""A model or a loss function, and example arguments, as one function of parameters that can be traced."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree


class LossFunction(NamedTuple):
    """A loss as a function of parameters, and arguments to call it with.

    Attributes:
        loss_fn: ``loss_fn(params, *batch)``.
        params: by name.
        batch: the other arguments.
        of_module: whether it was made of a module, whose loss may be outside of it.
    """

    loss_fn: Callable[..., Any]
    params: Any
    batch: Sequence[Any]
    of_module: bool


def loss_function(target: nn.Module | Callable[..., Any], *example: Any, **kwargs: Any) -> LossFunction:
    """What to trace of a target.

    The loss of a module is an output called ``loss``, or a first output without axes, else the sum of its
    outputs.

    Args:
        target: a module, called with ``*example`` and ``**kwargs``; or a loss function, with
            ``params, *batch``.
        *example: the arguments.
        **kwargs: keyword arguments of a module.

    Raises:
        TypeError: ``target`` is neither, or ``params`` are missing.
    """
    if isinstance(target, nn.Module):
        return LossFunction(_loss_of_outputs(target, kwargs), dict(target.named_parameters()), example, True)
    if not callable(target):
        raise TypeError(f"explain takes a module or a loss function, got {type(target).__name__}")
    if not example:
        raise TypeError("explain(loss_fn, params, *batch) needs params")
    return LossFunction(target, example[0], example[1:], False)


def _loss_of_outputs(model: nn.Module, kwargs: Mapping[str, Any]) -> Callable[..., Any]:
    def loss_fn(params: Mapping[str, Tensor], *args: Any) -> Tensor:
        out = functional_call(model, dict(params), args, dict(kwargs))
        loss = out.get("loss") if isinstance(out, Mapping) else None
        if isinstance(loss, Tensor):
            return loss
        leaves = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
        if leaves and leaves[0].dim() == 0:
            return leaves[0]
        return torch.stack([leaf.sum() for leaf in leaves if leaf.is_floating_point()]).sum()

    return loss_fn
