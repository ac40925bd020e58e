"""Two operators on many small tensors of one shape: their stack, and the way back into them.

Compilers take a stack apart into a loop for each of its tensors. These stay one call.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("thor_fx", "FRAGMENT")
_LIBRARY.define("stacked(Tensor[] tensors) -> Tensor")
_LIBRARY.define("unstack_(Tensor(a!)[] targets, Tensor stack) -> ()")


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors))


def _unstack(targets: Sequence[Tensor], stack: Tensor) -> None:
    torch._foreach_copy_(list(targets), list(stack.unbind()))


def _nothing(targets: Sequence[Tensor], stack: Tensor) -> None:
    """What there is to know of the second before it runs: it returns nothing."""


for name, function in (("stacked", _stacked), ("unstack_", _unstack)):
    torch.library.impl(_LIBRARY, name, "CompositeExplicitAutograd")(function)
torch.library.register_fake("thor_fx::stacked", _stacked, lib=_LIBRARY)
torch.library.register_fake("thor_fx::unstack_", _nothing, lib=_LIBRARY)

stacked = torch.ops.thor_fx.stacked.default
"""``stacked(tensors)``: n tensors of one shape (...) become one, (n, ...)."""

unstack_ = torch.ops.thor_fx.unstack_.default
"""``unstack_(targets, stack)``: writes a stack (n, ...) into n tensors (...)."""
