"""Run the kernel of symmetric products in Triton's interpreter, and print how far off it is, as JSON.

Started with ``TRITON_INTERPRET=1``, which has to be set before Triton is imported.
"""

import json
from collections.abc import Callable

import torch
from torch import Tensor

from thor_fx.passes.symmetric_kernel import launch, tiles_kernel


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


CASES: dict[str, Callable[[], Tensor]] = {
    "one number": lambda: rows(1, 1, 1),
    "one row, a whole tile": lambda: rows(1, 1, 128),
    "less than a tile": lambda: rows(1, 40, 33),
    "one feature over": lambda: rows(1, 70, 129),
    "ragged tiles, float16": lambda: rows(1, 300, 257, dtype=torch.float16),
    "even tiles, a batch": lambda: rows(3, 50, 256),
    "ragged, a batch, float16": lambda: rows(2, 65, 300, dtype=torch.float16),
    "rounded to bfloat16": lambda: rows(1, 200, 140).bfloat16().float(),
    "many rows": lambda: rows(1, 8_001, 130),
    "many tiles, one part": lambda: rows(1, 5, 1930),
    "features outermost": lambda: rows(2, 150, 90).mT,
    "every third row": lambda: rows(1, 100, 140)[:, ::3],
    "a slice of wider rows": lambda: rows(2, 40, 200)[..., 7:150],
    "one matrix, repeated": lambda: rows(1, 33, 40).expand(3, -1, -1),
}


def measure(x: Tensor) -> dict[str, object]:
    """The worst error, in units of what rounding may do to a sum of that many float32 numbers."""
    found, exact = launch(tiles_kernel, x), x.double().mT @ x.double()
    allowed = (x.double().abs().mT @ x.double().abs()) * x.shape[1] * 2**-24
    return {
        "error": ((found - exact).abs() / allowed).nan_to_num().max().item(),
        "symmetric": torch.equal(found, found.mT),
        "shape": list(found.shape) == [x.shape[0], x.shape[2], x.shape[2]],
        "dtype": str(found.dtype),
    }


if __name__ == "__main__":
    print(json.dumps({name: measure(make()) for name, make in CASES.items()}))
