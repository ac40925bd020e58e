"""What Inductor makes of a graph: fused kernels and calls of libraries, and which part of a step they are."""

from dataclasses import dataclass

from .passes.phases import Phase


@dataclass(frozen=True)
class Kernel:
    """One kernel that Inductor has generated, or one call of a library.

    Attributes:
        name: as Inductor calls it.
        extern: whether it is a call of a library (a product of matrices, a convolution, ...).
        nodes: the names of the nodes that it computes, in their order.
        phases: of those nodes, each once, in the order of a step.
        flops: floating-point operations of products, convolutions and attentions.
        bytes: read and written.
        start: when it ran in the measured step, in seconds from the start of the step; None: not measured.
        seconds: how long it ran there; None: not measured.
    """

    name: str
    extern: bool
    nodes: tuple[str, ...]
    phases: tuple[Phase, ...]
    flops: int = 0
    bytes: int = 0
    start: float | None = None
    seconds: float | None = None
