"""What the demo prints."""

import math
from collections.abc import Sequence

import torch

from .race import BATCH, DAMPING, MOMENTUM, RATES, REPEATS, Result, Settings
from .tasks import Digits, Task


def describe(settings: Settings, digits: Digits, device: torch.device, threads: int) -> str:
    """The rules, before anything runs."""
    sizes = ", ".join(str(len(part.labels)) for part in (digits.training, digits.validation, digits.test))
    clipped = "; gradients clipped as THOR's updates" if settings.clip_all else ""
    rates = ", ".join(f"{rate:g}" for rate in RATES)
    return "\n".join(
        [
            f"{sizes} digits for training, validation and test; batch {BATCH}, {settings.steps} steps, "
            f"seed {settings.seed};",
            f"torch {torch.__version__}, {device.type}, {threads} thread(s), backend {settings.backend}",
            f"SGD    torch.compile(model), torch.optim.SGD(momentum={MOMENTUM}, fused=True){clipped}",
            f"AdamW  torch.compile(model), torch.optim.AdamW(weight_decay=0, fused=True){clipped}",
            f"THOR   thor_fx.compile(model), thor_fx.Thor(damping={DAMPING}, momentum={MOMENTUM}, "
            f"enable_clip_grad=True, frequency={settings.frequency})",
            f"Learning rates are constant and found by the same search: of {rates}",
            f"the one with the lowest validation loss after {settings.search_steps} steps. "
            "All other settings are fixed, for both tasks.",
        ]
    )


def target(results: Sequence[Result]) -> float:
    """The loss that all contenders are timed to: the lowest that every one of them reaches."""
    return max(min(result.curve.losses) for result in results)


def tabulate(task: Task, results: Sequence[Result]) -> str:
    """The results of a task, with their search."""
    loss = target(results)
    head = ["", "rate", f"steps to {loss:.3g}", f"s to {loss:.3g}", "ms/step", "refreshes", "compile s"]
    head += ["train loss", task.metric]
    widths = "-".join(str(width) for width in task.widths)
    return "\n".join(
        [
            f"{task.name} {widths}, {task.activation.__name__}",
            *_aligned([head, *(_row(result, loss) for result in results)]),
            f"{loss:.3g}: the lowest training loss that all three reach. "
            f"Seconds: without compilation, the fastest of {REPEATS} identical runs.",
            "compile s: the first two steps. AdamW runs what SGD compiled; Inductor's cache may hold more.",
            "Search, learning rate -> validation loss:",
            *_aligned([[f"  {result.name}", *_searched(result)] for result in results]),
        ]
    )


def _row(result: Result, loss: float) -> list[str]:
    steps, seconds = result.curve.first_below(loss)
    return [
        result.name,
        f"{result.rate:g}",
        f"{steps:g}",
        f"{seconds:.2f}",
        f"{1e3 * result.step_seconds:.2f}",
        f"{result.refreshes or '-'}",
        f"{result.compile_seconds:.1f}",
        f"{result.curve.losses[-1]:.3g}",
        f"{result.curve.score:.3g}",
    ]


def _searched(result: Result) -> list[str]:
    return [
        f"{rate:g} -> {f'{loss:.2g}' if math.isfinite(loss) else 'diverged'}"
        for rate, loss in result.search.items()
    ]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
