"""Factors of ordinary modules by ordinary hooks, in eager mode. Shares no code with the product.

A forward hook sees what went into a module; a hook on its result sees ``dL/ds``. Works for weights
that are used as often as they like by ``Linear``, convolutions, ``F.embedding`` and the ``Conv1D`` of
``transformers`` (a ``Linear`` whose weight is stored as (in, out)).
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oracle import Pair, Use, both_ways, pair

TURNED = ("embedding", "stored (in, out)")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Seen:
    """One use of a weight by a module.

    Attributes:
        groups: rows of activations and cotangents, one pair for every group of a convolution.
        kind: "linear", "stored (in, out)", "convolution" or "embedding".
    """

    groups: tuple[Use, ...]
    kind: str

    def gradient(self) -> Tensor:
        """``sum_r g_r a_r^T``, what this use adds to the weight's gradient, as a matrix of its layout."""
        products = [use.g.T @ use.a for use in self.groups]
        return torch.cat(products) if self.kind in {"linear", "convolution"} else products[0].T


def uses_by_hooks(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, list[Seen]]:
    """All uses of weights in modules that are known here, by name of the parameter."""
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    found: dict[str, list[Seen]] = {}
    hooks = [
        module.register_forward_hook(_recorder(found.setdefault(names[id(module.weight)], [])))
        for module in model.modules()
        if _rows_of(module) is not None and id(module.weight) in names
    ]
    try:
        with _recorded_embeddings(lambda weight: found.setdefault(names[id(weight)], [])):
            loss().backward()
    finally:
        for hook in hooks:
            hook.remove()
    return {name: seen for name, seen in found.items() if seen}


def factors_by_hooks(uses: list[Seen], n: int) -> Pair:
    """``A = (1/R) sum a a^T`` and ``G = n sum g g^T`` over all uses; stacked for a grouped convolution.

    Where a weight is used both as (out, in) and as (in, out), the pair is that of (out, in); a single number
    is used either way.
    """
    turned = [seen for seen in uses if seen.kind in TURNED]
    straight = [seen for seen in uses if seen.kind not in TURNED]
    if turned and straight and uses[0].gradient().numel() > 1:
        return both_ways(_pair(straight, n), _pair(turned, n))
    found = _pair(uses, n)
    return found._replace(A=found.A.diagonal()) if {seen.kind for seen in uses} == {"embedding"} else found


def _pair(uses: list[Seen], n: int) -> Pair:
    pairs = [pair(list(group), n) for group in zip(*(seen.groups for seen in uses), strict=True)]
    if len(pairs) == 1:
        return pairs[0]
    return Pair(torch.stack([p.A for p in pairs]), torch.stack([p.G for p in pairs]), pairs[0].rows)


def _recorder(found: list[Seen]) -> Callable[..., None]:
    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        activation, rows_of = inputs[0].detach(), _rows_of(module)
        output.register_hook(lambda gradient: found.append(rows_of(module, activation, gradient)))

    return record


@contextmanager
def _recorded_embeddings(found: Callable[[Tensor], list[Seen]]) -> Iterator[None]:
    """Record every lookup. Modules scale and shift around theirs: their hooks would see other numbers."""
    lookup = F.embedding

    def embedding(x: Tensor, weight: Tensor, padding_idx: int | None = None, *rest: Any) -> Tensor:
        output = lookup(x, weight, padding_idx, *rest)
        kept = x.flatten() != (-1 if padding_idx is None else padding_idx)
        words = F.one_hot(x.flatten()[kept], len(weight))

        def record(gradient: Tensor) -> None:
            found(weight).append(Seen((_use(words, _matrix(gradient)[kept]),), "embedding"))

        if weight.requires_grad:
            output.register_hook(record)
        return output

    with mock.patch.object(F, "embedding", embedding):
        yield


Rows = Callable[[nn.Module, Tensor, Tensor], Seen]


def _rows_of(module: nn.Module) -> Rows | None:
    """How to read rows off a module's input and gradient; None: of a module unknown here."""
    if isinstance(module, nn.Linear):
        return _linear
    if isinstance(module, CONVOLUTIONS):
        return _convolution
    return _conv1d if type(module).__name__ == "Conv1D" else None


def _linear(module: nn.Module, x: Tensor, g: Tensor) -> Seen:
    return Seen((_use(_matrix(x), _matrix(g)),), "linear")


def _conv1d(module: nn.Module, x: Tensor, g: Tensor) -> Seen:
    return Seen((_use(_matrix(x), _matrix(g)),), "stored (in, out)")


def _convolution(module: nn.Module, x: Tensor, g: Tensor) -> Seen:
    """Every output position is a row: the patch that it sees, and its gradient."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    last_axis_first = [_padding(module, axis) for axis in reversed(range(x.dim() - 2))]
    x = F.pad(x, [side for both in last_axis_first for side in both], mode=mode)
    positions = list(itertools.product(*(range(size) for size in g.shape[2:])))
    inputs = x.chunk(module.groups, dim=1)
    outputs = g.chunk(module.groups, dim=1)
    return Seen(
        tuple(
            _use(
                torch.cat([_patch(module, part, position).flatten(1) for position in positions]),
                torch.cat([rows[(..., *position)] for position in positions]),
            )
            for part, rows in zip(inputs, outputs, strict=True)
        ),
        "convolution",
    )


def _padding(module: nn.Module, axis: int) -> tuple[int, int]:
    """What a convolution adds in front of an axis and behind it."""
    if module.padding == "valid":
        return 0, 0
    if module.padding == "same":
        total = module.dilation[axis] * (module.kernel_size[axis] - 1)
        return total // 2, total - total // 2
    return module.padding[axis], module.padding[axis]


def _patch(module: nn.Module, x: Tensor, position: tuple[int, ...]) -> Tensor:
    """The receptive field of one output position, (batch, channels, *kernel)."""
    geometry = zip(position, module.stride, module.kernel_size, module.dilation, strict=True)
    windows = [slice(at * by, at * by + (width - 1) * gap + 1, gap) for at, by, width, gap in geometry]
    return x[(slice(None), slice(None), *windows)]


def _matrix(x: Tensor) -> Tensor:
    return x[None] if x.dim() == 1 else x.flatten(0, -2)


def _use(a: Tensor, g: Tensor) -> Use:
    return Use(a.detach().double(), g.detach().double())
