"""Adapter to Inductor: graphs become callables.

The only module that knows ``torch._inductor``. Written for torch 2.11, 2.13 and 2.15.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from functorch import make_fx
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx

Compiled = Callable[..., Sequence[Any]]

BACKENDS = ("inductor", "aot_eager", "eager")


def check_backend(backend: str) -> None:
    """Refuse a backend that step graphs cannot be given to.

    Raises:
        ValueError: naming the ones that exist.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {list(BACKENDS)}, got {backend!r}")


def compile_graph(
    gm: fx.GraphModule,
    fakes: Sequence[Any],
    *,
    backend: str = "inductor",
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """Compile a flat graph that is not differentiated any further.

    Args:
        gm: takes flat arguments, returns a flat tuple; it may write to its arguments with ``copy_``.
        fakes: the fake values of its arguments, symbolic sizes among them.
        backend: ``"inductor"``, or one of the others to interpret the graph as it is.
        mode: as in ``torch.compile``.
        options: Inductor settings, as in ``torch.compile``.
    """
    if backend != "inductor":
        return gm
    patches = {**(list_mode_options(mode) if mode else {}), **(options or {})}
    mode_of_fakes = next(f.fake_mode for f in fakes if isinstance(f, Tensor))
    with tracing(TracingContext(mode_of_fakes)), torch.no_grad(), inductor_config.patch(patches):
        return compile_fx(gm, list(fakes))
