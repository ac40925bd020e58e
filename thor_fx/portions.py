"""Which layers of one shape are updated in one product.

On a GPU that is all of them: it is kept busy by few large calls. On a CPU it is as many as have four
megabytes. What is larger is in no cache when the next operator reads it, and an allocator returns so much
memory to the system, which has to hand it out again, page by page, in the next step.

Legend: L matrices of one shape, of one layer or of several.
"""

from collections.abc import Sequence

from torch import Tensor

from .layers import Layer

PORTION = 4_000_000  # bytes


def portions(layers: Sequence[Layer], like: Tensor) -> list[list[Layer]]:
    """Layers of one shape, in their order, cut where a portion is full; a larger one is alone.

    Args:
        layers: at least one.
        like: on their device, of their dtype.
    """
    if like.device.type != "cpu":
        return [list(layers)]
    bytes_of_matrix = layers[0].out * layers[0].in_ * like.element_size()
    found: list[list[Layer]] = [[]]
    held = 0
    for layer in layers:
        size = layer.groups * bytes_of_matrix
        if found[-1] and held + size > PORTION:
            found.append([])
            held = 0
        found[-1].append(layer)
        held += size
    return found
