"""Why a parameter falls back: the reason is one of a short list, and the line of its use is named."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import thor_fx
from models import random

D = torch.float64
X, Y, WORDS = random(1, D, 6, 4), random(2, D, 6, 5), torch.tensor([0, 2, 1, 2, 4, 0])
HEAD = random(9, D, 3, 5)
MASK = torch.tensor([True, False, True, True, False])

# Every reason that there is; the chain of operators that a gradient ends in stands for ``...``.
REASONS = {
    "no product": r"its gradient is \S+( <- \S+)*, no product of matrices",
    "vector": r"a vector: its gradient is \S+( <- \S+)*( by a function of itself)?, no product of matrices",
    "both": r"its gradient is \S+( <- \S+)* with both or none of its operands from backward, no product .*",
    "stride": r"its gradient is \S+( <- \S+)* with a stride, no product of matrices",
    "itself": r"its gradient is \S+( <- \S+)* by a function of itself, no product of matrices",
    "mask": r"its gradient is \S+( <- \S+)* with a mask, no product of matrices",
    "maximum": r"its gradient is \S+( <- \S+)* \(the maximum of a bag\), no product of matrices",
    "frequency": r"its gradient is \S+( <- \S+)* \(scaled by frequency\), no product of matrices",
    "overlap": r"its uses are of parts that overlap, so no part has one factor pair",
    "zero": r"its gradient is zero",
}
OFFSETS = torch.tensor([0, 2, 5])


def bag(w: Tensor, **settings: Any) -> Tensor:
    return F.embedding_bag(WORDS, w, OFFSETS, **settings)


# the kind of reason, the shape of the parameter, and its use: one line of code
USES: dict[str, tuple[str, tuple[int, ...], Callable[[Tensor, Tensor], Tensor]]] = {
    "a bias": ("vector", (5,), lambda w, x: Y + w),
    "a table that is added": ("no product", (3, 5), lambda w, x: (Y.unflatten(0, (2, 3)) + w).flatten(0, 1)),
    "a layer scale": ("no product", (1, 5), lambda w, x: Y * w),
    "a logit scale": ("vector", (1,), lambda w, x: Y * w.exp()),
    "prelu": ("vector", (5,), lambda w, x: F.prelu(Y, w)),
    "a function of the weight": ("no product", (5, 4), lambda w, x: x @ w.tanh().T),
    "a weight times itself": ("itself", (5, 4), lambda w, x: x @ (w * w.detach().norm()).T),
    "weight norm": ("itself", (5, 4), lambda w, x: x @ (w / w.norm(dim=1, keepdim=True)).T),
    "every second row": ("stride", (10, 4), lambda w, x: x @ w[::2].T),
    "rows by a mask": ("mask", (5, 4), lambda w, x: F.pad((x @ w[MASK].T).sum(-1, keepdim=True), (0, 4))),
    "the maximum of a bag": ("maximum", (5, 5), lambda w, x: bag(w, mode="max")),
    "a bag by frequency": ("frequency", (5, 5), lambda w, x: bag(w, mode="sum", scale_grad_by_freq=True)),
    "overlapping parts": ("overlap", (6, 4), lambda w, x: x @ w[:5].T + (x @ w[1:].T).sin()),
    "a gradient of zeros": ("zero", (5, 4), lambda w, x: x @ w.floor().T),
}


def explained(name: str) -> tuple[thor_fx.Report, str]:
    _, shape, use = USES[name]

    def loss_fn(p: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return (use(p["w"], x) @ p["head"].T).sin().sum(-1).mean()

    report = thor_fx.explain(loss_fn, {"w": random(3, D, *shape).abs(), "head": HEAD}, X)
    return report, report.coverage.fallback["w"]


@pytest.mark.parametrize("name", USES)
def test_the_reason_is_one_of_the_list_and_the_line_is_named(name):
    report, reason = explained(name)
    matching = [kind for kind, pattern in REASONS.items() if re.fullmatch(pattern, reason)]
    assert matching == [USES[name][0]], reason
    first, used = report.why("w").split("\n")
    assert first == f"first-order rule: {reason}"
    file, number = re.match(r"  used at (\S+):(\d+) in ", used).groups()
    assert file == Path(__file__).name
    line = Path(__file__).read_text().split("\n")[int(number) - 1]
    assert used.endswith(line.strip())


def test_every_reason_has_a_use():
    assert {kind for kind, _, _ in USES.values()} | {"both"} == set(REASONS)
