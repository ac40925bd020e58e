"""What ``torch.amp.GradScaler`` tells an optimizer, without a synchronisation.

``scaler.step(optimizer)`` sets two attributes, 0-D tensors, on an optimizer that says it handles them:
``found_inf``, and ``grad_scale``, which is None where ``scaler.unscale_`` has divided the gradients
already. The empirical Fisher's factors come from the cotangents of the scaled loss and carry its scale in any
case; those of the other estimators never do.
"""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

SCALES = ("found_inf", "gradient_scale", "loss_scale")
"""What :class:`~thor_fx.transform.Signals` may hear of a scaler."""


@runtime_checkable
class Scaler(Protocol):
    """What is asked of a ``torch.amp.GradScaler``."""

    def scale(self, outputs: Tensor) -> Tensor:
        """``outputs`` times the scale."""
        ...


def scales_of(
    optimizer: Any,
    scaler: Scaler | None,
    device: torch.device,
    dtype: torch.dtype,
    *,
    of_factors: bool = True,
) -> dict[str, Tensor]:
    """What is known of this step, by the names in :data:`SCALES`; nothing if no scaler is in use.

    Args:
        optimizer: ``scaler.step`` has set its attributes.
        scaler: the one that scaled the loss, if the user has said so.
        device: of the results.
        dtype: of the results.
        of_factors: whether factors carry a scale, so that it has to be known.

    Raises:
        RuntimeError: the gradients have been divided, and ``scaler`` is None.
    """
    found = getattr(optimizer, "found_inf", None)
    gradient = getattr(optimizer, "grad_scale", None)
    loss = gradient if scaler is None else scaler.scale(torch.ones((), device=device, dtype=dtype))
    if found is not None and loss is None and of_factors:
        raise RuntimeError(
            "scaler.unscale_ was called before the step, so that the gradients no longer carry the scale of "
            "the loss, but the factors do: create the optimizer with Thor(..., loss_scale=scaler)"
        )
    given = {"found_inf": found, "gradient_scale": gradient, "loss_scale": loss}
    return {name: value.to(device, dtype) for name, value in given.items() if value is not None}
