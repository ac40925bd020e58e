"""The least time that the extra work of a second-order step can take on this machine.

A floor is the larger of two times: the floating-point operations over the rate of one large matrix product,
and the bytes that have to be read and written once over the rate of a large copy. Both rates are measured
in the same run, with its threads: :mod:`thor_fx.rates`. What fits into a cache can be read faster than that.

==========  ==================================================  ========================================
work        operations                                          bytes
==========  ==================================================  ========================================
factors     of the products ``A`` and ``G``, as thor_fx.costs   activations and cotangents read, factors
            has them; for ``A`` of a convolution, see           written
            :func:`share_of_pairs`
refresh     of the inversions                                   factors read, inverses written
update      of preconditioning                                  parameters and momentum read and written,
                                                                gradients and inverses read; for AdamW two
                                                                moments in place of the momentum
==========  ==================================================  ========================================
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import torch
from contenders import ADAMW, DROP_IN, EVERY_STEP, FUNCTIONAL, SGD, transform
from from_study import WithLoss, classifier
from torch import Tensor, nn
from workloads import Batch, Workload

import thor_fx
from thor_fx.inverses import METHODS
from thor_fx.rates import Rates

Rows = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Work:
    """Something to compute: floating-point operations, and bytes that move."""

    flops: int
    bytes: int

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)


# --- the work --------------------------------------------------------------------------------------


def count(model: WithLoss, batch: Batch, settings: Mapping[str, Any]) -> dict[str, Work]:
    """What training with ``settings`` of :func:`thor_fx.thor` adds, by the work's name."""

    def loss_fn(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return torch.func.functional_call(model, params, (x, y))

    tx = transform(settings)
    params = dict(model.named_parameters())
    report = thor_fx.explain(loss_fn, params, *batch, tx=tx)
    layers = report.coverage.layers.values()
    inversion = sum(METHODS[tx.inverse].work(layer, tx.rules.block_size).refresh_flops for layer in layers)
    factors, inverses = report.cost.factor_bytes, report.cost.state_bytes
    size = bytes_of(params.values())
    return {
        "factors": Work(
            report.cost.factor_flops - inversion - _spared(model, report), _rows_read(report) + factors
        ),
        "refresh": Work(inversion, factors + inverses),
        "update": Work(report.cost.step_flops, 5 * size + inverses),
    }


def _spared(model: WithLoss, report: thor_fx.Report) -> int:
    """What products of patches would take beyond what ``A`` of convolutions needs."""
    convolutions = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    spared = 0.0
    for layer in report.coverage.layers.values():
        side = layer.input
        if layer.param in convolutions and side.kind in {"dense", "blocks"}:
            needed = share_of_pairs(convolutions[layer.param]) * side.dim**2 * side.groups
            spared += sum(2 * sums.count * max(0, side.numel - needed) for sums in layer.sums)
    return round(spared)


def share_of_pairs(convolution: nn.Conv2d) -> Fraction:
    """The part of all pairs of taps whose products ``A`` is made of.

    It is symmetric; and where the kernel moves by one pixel, pairs at the same distance have the same
    products but for the border.

    >>> share_of_pairs(nn.Conv2d(1, 1, 3, stride=2)), share_of_pairs(nn.Conv2d(1, 1, 3))
    (Fraction(5, 9), Fraction(13, 81))
    """
    taps = math.prod(convolution.kernel_size)
    needed = taps * (taps + 1) // 2
    if all(step == 1 for step in convolution.stride):
        needed = min(needed, (math.prod(2 * k - 1 for k in convolution.kernel_size) + 1) // 2)
    return Fraction(needed, taps**2)


def _rows_read(report: thor_fx.Report) -> int:
    """The bytes of all activations and cotangents, each read once."""
    operands = [o for site in report.sites for o in (site.activation, site.cotangent)]
    nodes = dict.fromkeys(node for operand in operands for node in operand.nodes)
    return bytes_of(node.meta["val"] for node in nodes)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# --- against what was measured -----------------------------------------------------------------------

Span = tuple[str, str]
"""A row, and one of its times."""


@dataclass(frozen=True)
class Extra:
    """Extra work that was measured: the parts of it, and the two times whose difference it took."""

    contender: str
    parts: tuple[str, ...]
    longer: Span
    shorter: Span | None


EXTRA = (
    Extra(ADAMW, ("AdamW's update",), (ADAMW, "update_plain"), None),
    Extra(SGD, ("SGD's update",), (SGD, "update_plain"), None),
    Extra(DROP_IN, ("update",), (DROP_IN, "update_plain"), None),
    Extra(DROP_IN, ("factors",), (DROP_IN, "forward_backward_factor"), (DROP_IN, "forward_backward_plain")),
    Extra(DROP_IN, ("refresh",), (DROP_IN, "update_refresh"), (DROP_IN, "update_plain")),
    Extra(DROP_IN, ("factors", "refresh"), (DROP_IN, "factor_step"), (DROP_IN, "plain_step")),
    Extra(FUNCTIONAL, ("factors", "refresh"), (FUNCTIONAL, "factor_step"), (FUNCTIONAL, "plain_step")),
    Extra(EVERY_STEP, ("factors",), (EVERY_STEP, "plain_step"), (FUNCTIONAL, "plain_step")),
    Extra(EVERY_STEP, ("refresh",), (EVERY_STEP, "factor_step"), (EVERY_STEP, "plain_step")),
)


def floors(workload: Workload, batch: Batch, rows: Rows, machine: Rates) -> list[dict[str, Any]]:
    """Every piece of extra work that was measured, beside its floor.

    Returns:
        Dictionaries of ``contender``, ``work``, ``flops``, ``bytes``, ``floor_ms``, ``ms`` and ``share``, the
        part of the floor's rate that was reached; None where the difference of the times is not above zero.
    """
    model = classifier(workload.build()).to(batch[0].device)
    size = bytes_of(model.parameters())
    works = {"AdamW's update": Work(0, 7 * size), "SGD's update": Work(0, 5 * size)}
    works |= count(model, batch, {})
    return [_line(extra, works, rows, machine) for extra in EXTRA if _measured(extra, rows)]


def _measured(extra: Extra, rows: Rows) -> bool:
    return all(_median(rows, span) is not None for span in (extra.longer, extra.shorter) if span)


def _median(rows: Rows, span: Span) -> float | None:
    label, phase = span
    time_of = rows.get(label, {}).get(phase)
    return time_of["median"] if time_of else None


def _line(extra: Extra, works: Mapping[str, Work], rows: Rows, machine: Rates) -> dict[str, Any]:
    work = sum((works[part] for part in extra.parts), start=Work(0, 0))
    ms = _median(rows, extra.longer) - (_median(rows, extra.shorter) if extra.shorter else 0.0)
    least = 1e3 * machine.seconds(work.flops, work.bytes)
    facts = {"contender": extra.contender, "work": " + ".join(extra.parts), **asdict(work)}
    return {**facts, "floor_ms": least, "ms": ms, "share": least / ms if ms > 0 else None}
