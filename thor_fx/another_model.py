"""Whether a saved state is that of another model: the difference is named before anything is changed."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .distributed.dtensors import here
from .optimizer_state import layers_of

ANOTHER = "the saved state is that of another model"


def check_same_model(
    saved: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], names: Mapping[Tensor, str], *, alone: bool
) -> None:
    """Refuse a state dict of another model, or of a part of this one.

    Args:
        saved: the state dict, of an optimizer.
        groups: of parameters, as the optimizer has them.
        names: of all parameters of the model.
        alone: whether there are no other ranks, which may have the state of some layers.

    Raises:
        ValueError: naming the first difference.
    """
    sizes = [[len(group["params"]) for group in side] for side in (saved["param_groups"], groups)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"{ANOTHER}: its groups have {sizes[0]} parameters, those of this one {sizes[1]}")
    places = [place for group in saved["param_groups"] for place in group["params"]]
    params = [param for group in groups for param in group["params"]]
    entries = {names[p]: saved["state"].get(place, {}) for p, place in zip(params, places, strict=True)}
    for param in params:
        _check_entry(param, names[param], entries[names[param]])
    readiness = saved["param_groups"][0].get("readiness")
    if readiness is None:
        return
    for name in readiness["used"]:
        if name.partition("[")[0] not in names.values():
            raise ValueError(f"{ANOTHER}: it speaks of {name!r}, and this one has no parameter of that name")
    ready = {*readiness["ready"]}
    lost = ready - layers_of(entries.values())
    if alone and lost and lost != ready:  # all of them may have been taken out, to start anew
        raise ValueError(f"the saved state has lost the inverses of {sorted(lost)}: take the one before")


def _check_entry(param: Tensor, name: str, entry: Mapping[str, Any]) -> None:
    for key, value in entry.items():
        of_all = isinstance(value, Tensor) and value.dim() > 0  # no counter
        if of_all and value.shape not in {param.shape, here(param).shape}:
            raise ValueError(
                f"{ANOTHER}: {key} of {name!r} has shape {tuple(value.shape)}, and the parameter "
                f"{tuple(param.shape)}"
            )
    for layer in layers_of([entry]):
        if layer.partition("[")[0] != name:
            raise ValueError(f"{ANOTHER}: where it has {layer!r}, this one has {name!r}")
