"""What must be the same on all ranks, compared before the first step."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..layers import Coverage
from ..options import Options
from ..transform import Transform
from .collectives import World
from .dtensors import is_part
from .faults import waiting_for_others

Value = TypeVar("Value")


class RanksDiffer(RuntimeError):
    """Ranks that should train one model have different models or settings."""


def check_agreement(world: World, mine: Mapping[str, str]) -> None:
    """Compare what describes a run; every rank calls this, and all of them raise if two differ.

    Args:
        world: the ranks.
        mine: what each thing is on this rank, by what it is called.

    Raises:
        RanksDiffer: naming the first difference, the rank and both values.
    """
    with waiting_for_others(world, "before the first step"):
        first, *others = world.everybodys(dict(mine))
    for rank, other in enumerate(others, start=1):
        for name in dict.fromkeys([*first, *other]):  # settings first: what follows from them differs, too
            if first.get(name) != other.get(name):
                raise RanksDiffer(
                    f"ranks must train the same model with the same settings, but {name} is "
                    f"{first.get(name, 'missing')} on rank 0 and {other.get(name, 'missing')} on rank {rank}"
                )


def check_ranks(tx: Transform, params: Mapping[str, Tensor], coverage: Coverage) -> None:
    """Compare what a transform is for on all ranks of its world, if it has one.

    Raises:
        RanksDiffer: see :func:`check_agreement`.
    """
    if tx.world is not None and tx.options is not None:
        check_agreement(tx.world, described(tx.options, tx.hyper(0), params, coverage))


class AnotherRankFailed(RuntimeError):
    """A rank has raised an error where all ranks have to come to one result."""


def agreed(world: World | None, find: Callable[[], Value]) -> Value:
    """What rank 0 has found, for what every rank measures and finds a little different.

    Args:
        world: the ranks; None: there are no others.
        find: called on every rank. Where it raises on one, all ranks raise.

    Raises:
        AnotherRankFailed: ``find`` has raised on another rank, and not on this one.
    """
    if world is None:
        return find()
    value, error = _tried(find)
    text = None if error is None else f"{type(error).__name__}: {error}"
    with waiting_for_others(world, "to learn what rank 0 has found"):
        found = world.everybodys((value, text))
    if error is not None:
        raise error
    for rank, (_, told) in enumerate(found):
        if told is not None:
            raise AnotherRankFailed(f"rank {rank} has stopped, so all ranks do: {told}")
    first: Value = found[0][0]
    return first


def _tried(find: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """What is found, or the error that stopped it."""
    try:
        return find(), None
    except Exception as error:
        return None, error


def described(
    options: Options, hyper: Mapping[str, float], params: Mapping[str, Tensor], coverage: Coverage
) -> dict[str, str]:
    """Settings, parameters with a checksum of their values, and layers. Waits for the device."""
    found = {f"{f.name}=": _shown(getattr(options, f.name)) for f in fields(options)}
    found |= {f"{name} in the first step": repr(value) for name, value in hyper.items()}
    for name, p in params.items():
        values = "dealt out" if is_part(p) else f"sum {_checksum(p)}"
        found[f"parameter {name!r}"] = f"{tuple(p.shape)} {p.dtype} ({values})"
    found["the order of parameters"] = ", ".join(params)
    found["the layers with factors"] = ", ".join(coverage.layers)
    sides = {name: f"A {layer.input}, G {layer.output}" for name, layer in coverage.layers.items()}
    return found | {f"layer {name!r}": text for name, text in sides.items()}


def _checksum(parameter: Tensor) -> str:
    return f"{float(torch.sum(parameter.detach(), dtype=torch.float64)):.17g}"


def _shown(value: Any) -> str:
    """A value in words that do not depend on the process."""
    if isinstance(value, Callable):  # type: ignore[arg-type]
        return str(getattr(value, "__qualname__", type(value).__qualname__))
    return repr(value)
