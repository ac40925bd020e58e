"""The kernel of symmetric products beside one product of matrices, on a GPU.

    python benchmarks/symmetric.py

Both multiply the same rows and return float32. Times are those of CUDA graphs, without what a call costs on
the host. Errors are the largest against float64, of the largest number of the result. What the rule of
``passes/symmetric.py`` says of a size stands beside it: where it is wrong, its limits are to be changed.
"""

import argparse
import os
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from step_time import machine
from tables import Report, save, sentence, table
from torch import Tensor

from thor_fx.passes.symmetric import gram_by_kernel, symmetric, worth_it

HERE = Path(__file__).parent
FEATURES = (512, 1024, 2048, 4096)
ROWS = (2048, 8192, 32768)
DTYPES = {"bfloat16": torch.bfloat16, "tf32": torch.float32}
HEAD = ["arithmetic", "features", "rows", "kernel ms", "matmul ms", "matmul / kernel", "kernel TFLOP/s"]
HEAD += ["kernel error", "matmul error", "used"]


def one_product(x: Tensor) -> Tensor:
    """What the kernel stands for."""
    return x.mT @ x if x.dtype == torch.float32 else torch.mm(x.mT, x, out_dtype=torch.float32)


def measure(features: int, rows: int, dtype: torch.dtype) -> dict[str, Any]:
    """One line of the table."""
    x = torch.randn(rows, features, device="cuda").to(dtype)
    exact = x.double().mT @ x.double()
    numbers: dict[str, Any] = {"used": worth_it(rows, features, dtype, tf32=True)}
    for name, function in (("kernel", gram_by_kernel), ("matmul", one_product)):
        numbers[f"{name} ms"] = milliseconds(function, x)
        numbers[f"{name} error"] = float((function(x) - exact).abs().max() / exact.abs().max())
    return numbers


def milliseconds(function: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """The median of many calls in one CUDA graph."""
    from triton.testing import do_bench_cudagraph

    return do_bench_cudagraph(lambda: function(x), rep=20, return_mode="median")


def markdown(report: Report) -> str:
    """The report as a table."""
    lines = [_line(row) for row in report["rows"]]
    return f"**{report['title']}**\n\n{sentence(report)}\n\n{table(HEAD, lines)}\n"


def _line(row: dict[str, Any]) -> list[str]:
    kernel, matmul = row["kernel ms"], row["matmul ms"]
    speed = row["rows"] * row["features"] * (row["features"] + 1) / kernel / 1e9  # half of 2 R F^2
    return [
        *(str(row[key]) for key in HEAD[:3]),
        *(f"{number:.3f}" for number in (kernel, matmul)),
        *(f"{matmul / kernel:.2f}", f"{speed:.0f}"),
        *(f"{row[key]:.1e}" for key in HEAD[7:9]),
        "yes" if row["used"] else "no",
    ]


def lines(budget: float) -> list[dict[str, Any]]:
    """What there is time for, small sizes first."""
    start, found = time.monotonic(), []
    for rows, features, (name, dtype) in product(ROWS, FEATURES, DTYPES.items()):
        if time.monotonic() - start < budget:
            size = {"arithmetic": name, "features": features, "rows": rows}
            found.append(size | measure(features, rows, dtype))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--budget", type=float, default=60, help="seconds after which no size is begun")
    parser.add_argument("--results", type=Path, default=HERE / "results", metavar="FOLDER")
    settings = parser.parse_args(arguments)
    if not torch.cuda.is_available() or symmetric is None:
        parser.exit(1, "needs a CUDA device and Triton: there is nothing to time here\n")
    torch.set_float32_matmul_precision("high")
    load = os.getloadavg()[0]
    report = {
        "title": "Half of a symmetric product: the kernel beside one product of matrices",
        "rows": lines(settings.budget),
        "machine": machine(torch.device("cuda"), load),
        "settings": {"device": "cuda"},
    }
    print(markdown(report))
    save({"symmetric": report}, settings.results, markdown)


if __name__ == "__main__":
    main()
