"""What a checkpoint holds besides tensors, in a form that tells damage from what was saved.

The nest is bytes that ``torch.load(weights_only=True)`` reads: plain containers and values, torch's own types
and our states. Beside them is a seal: the version, a checksum of the bytes, and of every tensor its shape,
its dtype and the sum of its bits, which no single wrong bit leaves as it is.
"""

import io
import pickle
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..state_classes import STATE_CLASSES
from ..state_versions import VERSION

Seal = dict[str, Any]


def sealed(nest: Any, sums: Mapping[str, str], classes: list[type]) -> tuple[bytes, Seal]:
    """A nest as bytes, and its seal.

    Args:
        nest: can be pickled.
        sums: what is known of tensors, by name: :func:`~thor_fx.distributed.one_state.described`.
        classes: that it consists of, besides those of states.

    Raises:
        TypeError: it holds an object of a class that would not be loaded again.
    """
    file = io.BytesIO()
    torch.save(nest, file)
    content = file.getvalue()
    try:
        opened(content, classes)
    except pickle.UnpicklingError as error:
        refused = _refused(content, classes)
        raise TypeError(
            f"state: {refused} would not be loaded again: save plain values in its place, or call "
            "torch.serialization.add_safe_globals([...]) with it here and where it is loaded"
        ) from error
    return content, {"version": VERSION, "nest": zlib.crc32(content), "tensors": dict(sums)}


def _refused(content: bytes, classes: list[type]) -> str:
    with torch.serialization.safe_globals([*STATE_CLASSES, *classes]):
        names = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(content))
    return ", ".join(names) or "what it holds"


def opened(content: bytes, classes: list[type]) -> Any:
    """The nest again. What is not on the list of what may be loaded is not run.

    Raises:
        UnpicklingError: it holds something else.
    """
    with torch.serialization.safe_globals([*STATE_CLASSES, *classes]):
        return torch.load(io.BytesIO(content), weights_only=True)


def damage(content: bytes, seal: Seal, tensors: Mapping[str, Tensor]) -> str | None:
    """What is not as it was sealed, in words; None where all is."""
    if zlib.crc32(content) != seal["nest"]:
        return "the values besides tensors are not those that were saved"
    for name, expected in seal["tensors"].items():
        if name not in tensors:
            return f"tensor {name!r} is not there"
        if (found := described(tensors[name])) != expected:
            return f"tensor {name!r} is {found}, and was saved as {expected}"
    return None


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def described(tensor: Tensor) -> str | None:
    """Shape, dtype and the sum of the bits; None for a shard."""
    if type(tensor) not in {Tensor, torch.nn.Parameter}:
        return None
    integers = _INTEGERS.get(tensor.element_size(), torch.uint8)
    bits = tensor.detach().contiguous().reshape(-1).view(integers).sum(dtype=torch.int64)
    return f"{tuple(tensor.shape)} {tensor.dtype} with bits {int(bits)}"
