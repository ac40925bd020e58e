"""What counts as trainable parameters."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .distributed.dtensors import is_part


def check_params(params: Any, *, name: str = "params", parts: bool = False) -> None:
    """Refuse what cannot be trained.

    Args:
        params: tensors by name.
        name: what an error calls them where none is trainable.
        parts: whether ranks may have parts of them (DTensor).

    Raises:
        TypeError: ``params`` is no mapping from names to floating-point tensors.
        ValueError: there is nothing to train.
    """
    if not isinstance(params, Mapping):
        raise TypeError(
            f"params must be a mapping from names to tensors, got {type(params).__name__}: "
            "use dict(model.named_parameters())"
        )
    for key, value in params.items():
        check_param(key, value, parts)
    if not any(trainable(value) for value in params.values()):
        raise ValueError(
            f"{name} has no trainable tensor: unfreeze a parameter with requires_grad_(), or pass one"
        )


def check_one_device(params: Mapping[str, Tensor]) -> None:
    """Refuse trainable parameters on several devices: layers of one shape are updated in one product.

    Raises:
        ValueError: naming one parameter on each device.
    """
    first: dict[str, str] = {}
    for name, value in params.items():
        if trainable(value):
            first.setdefault(str(value.device), name)
    if len(first) > 1:
        shown = ", ".join(f"{device} ({name!r})" for device, name in first.items())
        raise ValueError(
            f"trainable parameters are on several devices: {shown}; move the model to one of them"
        )


def check_param(name: Any, value: Any, parts: bool = False) -> None:
    """Refuse a parameter that has no real gradient, or keeps its values in other tensors.

    Raises:
        TypeError: it is no plain floating-point tensor and not frozen, or its name is no text.
    """
    if not isinstance(name, str):
        raise TypeError(f"params must have names as keys, got {name!r}")
    if not isinstance(value, Tensor):
        raise TypeError(f"params[{name!r}] must be a tensor, got {type(value).__name__}")
    if not trainable(value):
        return
    wraps = hasattr(value, "__tensor_flatten__")  # the protocol of wrapper subclasses: quantised, sharded
    if is_part(value) and not parts:
        raise TypeError(
            f"params[{name!r}] is dealt out over ranks, and a functional step takes plain tensors: train the "
            "model with thor_fx.compile(model) and thor_fx.Thor"
        )
    if wraps and not is_part(value):
        raise TypeError(
            f"params[{name!r}] must be a plain tensor, got {type(value).__name__}: freeze it with "
            "requires_grad_(False), or train the tensor that it was made from"
        )
    if not value.is_floating_point():
        raise TypeError(
            f"params[{name!r}] must be floating-point, got {value.dtype}: leave it out of params and "
            "close over it, or cast it"
        )


def trainable(value: Tensor) -> bool:
    """Whether an entry of ``params`` is trained: everything but a frozen ``nn.Parameter``."""
    return value.requires_grad or not isinstance(value, nn.Parameter)
