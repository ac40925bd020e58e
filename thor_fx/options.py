"""The arguments of THOR, checked once for both doors."""

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch

from .arguments import (
    check_choice,
    check_integer,
    check_likelihood,
    check_number,
    check_sharing,
    check_type,
    shown,
)
from .blocks import BlockSize
from .clips import Clip
from .distributed.work import Mode, WorkSharing
from .inverses import Inverse
from .levenberg_marquardt import LevenbergMarquardt
from .overlap import Overlap, check_overlap
from .passes.layout import BiasRule, Fisher, Likelihood, LongSide, Rules, Sharing
from .presets import RECOMMENDED
from .refresh import DampingRule
from .refresh_rules import ByTrace, RefreshRule, check_refresh
from .schedule import Schedule
from .step_norm import StepNorm

MomentumOn = Literal["update", "gradient"]
Fallback = Literal["sgd", "adamw"]

INVERTS_SIDES: tuple[Inverse, ...] = ("cholesky", "eigen", "newton_schulz")
"""The methods whose state is the damped inverses of both sides."""

CANNOT_SHARE = {
    "inverse": "refresh_async=True, which inverts beside later steps",
    "gradient": "damping=LevenbergMarquardt(...) or refresh=ByTrace(...), which look at all inverses",
}

MAX_DIM = 8192  # the longest side with a whole factor: 256 MB in float32


@dataclass(frozen=True)
class Options:
    """Settings of :func:`thor_fx.thor` and :class:`thor_fx.Thor` that hold for a whole run.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: an argument has a wrong value.
    """

    loss_scale: float = 1.0
    batch_size: int | None = None
    use_nesterov: bool = False
    decay_filter: Callable[[str], bool] | None = None
    split_indices: Sequence[int] | None = None
    reduce_dtype: torch.dtype | None = None
    work_sharing: WorkSharing = "none"
    enable_clip_grad: bool = False
    frequency: int = 100
    damping_rule: DampingRule = "factor"
    block_size: BlockSize = 128
    sharing: Sharing = "expand"
    bias: BiasRule = "raw"
    max_dim: int | None = MAX_DIM
    long_side: LongSide = "blocks"
    inverse: Inverse = "cholesky"
    factor_decay: float | None = None
    refresh: RefreshRule | None = None
    refresh_async: bool = False
    kl_clip: float | None = None
    clip: Clip = "tensor"
    clip_norm: float = 1.0
    step_norm: StepNorm | None = None
    momentum_on: MomentumOn = "update"
    decoupled_weight_decay: bool = False
    fallback: Fallback = "sgd"
    adaptive: LevenbergMarquardt | None = None
    fisher: Fisher = "empirical"
    likelihood: Likelihood | None = None
    layer_filter: Callable[[str], bool] | None = None
    rows: float = 1.0
    factor_dtype: torch.dtype | None = None
    update_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        check_number("loss_scale", self.loss_scale, positive=True)
        check_integer("batch_size", self.batch_size, optional=True)
        check_integer("frequency", self.frequency)
        _check_block_size(self.block_size)
        for name in ("use_nesterov", "enable_clip_grad", "decoupled_weight_decay", "refresh_async"):
            check_type(name, getattr(self, name), bool, "True or False")
        for name in ("decay_filter", "layer_filter"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise TypeError(f"{name} must be a callable name -> bool, got {shown(value)}")
        check_choice("damping_rule", self.damping_rule, DampingRule)
        check_sharing("sharing", self.sharing)
        check_choice("bias", self.bias, BiasRule)
        check_integer("max_dim", self.max_dim, optional=True)
        check_choice("long_side", self.long_side, LongSide)
        check_choice("inverse", self.inverse, Inverse)
        _check_decay(self.factor_decay)
        check_refresh(self.refresh, self.frequency)
        if self.refresh_async:
            check_overlap(self.refresh, self.inverse, self.frequency)
        if self.kl_clip is not None:
            check_number("kl_clip", self.kl_clip, positive=True)
        check_choice("clip", self.clip, Clip)
        check_number("clip_norm", self.clip_norm, positive=True)
        if self.step_norm is not None:
            check_choice("step_norm", self.step_norm, StepNorm)
        check_choice("momentum_on", self.momentum_on, MomentumOn)
        check_choice("fallback", self.fallback, Fallback)
        check_choice("fisher", self.fisher, Fisher)
        check_likelihood("likelihood", self.likelihood)
        _check_split_indices(self.split_indices)
        _check_rows(self.rows)
        check_choice("work_sharing", self.work_sharing, WorkSharing)
        if self.work_sharing not in {"auto", *self.sharable}:
            raise ValueError(
                f"work_sharing={self.work_sharing!r} does not go with {CANNOT_SHARE[self.work_sharing]}: use "
                f"one of {['auto', *self.sharable]}"
            )
        for name in ("factor_dtype", "update_dtype", "reduce_dtype"):
            _check_rounding(name, getattr(self, name))
        if self.inverse == "eva" and self.fisher != "empirical":
            raise ValueError(
                f"inverse='eva' takes the mean of the cotangents, and that of drawn labels is zero: "
                f"fisher={self.fisher!r} needs another inverse="
            )
        if self.update_dtype is not None and self.inverse not in INVERTS_SIDES:
            raise ValueError(
                f"update_dtype={self.update_dtype} rounds inverses of both sides: inverse= must be one of "
                f"{list(INVERTS_SIDES)}, got {self.inverse!r}"
            )
        if self.adaptive is not None and self.inverse not in INVERTS_SIDES:
            raise ValueError(
                f"damping=LevenbergMarquardt(...) needs the inverses of both sides: inverse= must be one of "
                f"{list(INVERTS_SIDES)}, got {self.inverse!r}"
            )

    def __str__(self) -> str:
        """What differs from the defaults."""
        own = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]
        return ", ".join(f"{name}={value!r}" for name, value in own) or "the defaults"

    @property
    def refresh_rule(self) -> RefreshRule | Overlap | None:
        """When inverses are recomputed; None: in every factor step."""
        return Overlap(self.frequency) if self.refresh_async else self.refresh

    @property
    def rules(self) -> Rules:
        """What is measured of every layer."""
        known = None if self.block_size == "auto" else self.block_size
        means = self.inverse == "eva"
        sides = self.max_dim, self.long_side, known
        rules = Rules(
            self.sharing,
            self.bias,
            *sides,
            means=means,
            layer_filter=self.layer_filter,
            every=round(1 / self.rows),
            dtype=self.factor_dtype,
        )
        if self.fisher == "empirical":
            return rules
        scale = float(self.loss_scale)
        return replace(rules, fisher=self.fisher, likelihood=self.likelihood, loss_scale=scale)

    @property
    def sharable(self) -> tuple[Mode, ...]:
        """The ways in which ranks can share the work.

        Inverses are sent in the step that computes them, and ``refresh_async`` computes them beside later
        ones. What all ranks decide together has to be seen by all of them: the inverses of every layer.
        """
        modes: list[Mode] = ["none"]
        if not self.refresh_async:
            modes.append("inverse")
        if self.adaptive is None and not isinstance(self.refresh, ByTrace):
            modes.append("gradient")
        return tuple(modes)

    def decays(self, name: str) -> bool:
        """Whether weight decay applies to the parameter called ``name``."""
        return self.decay_filter is None or bool(self.decay_filter(name))


def number_schedule(name: str, value: Any) -> Schedule:
    """A schedule of ``weight_decay`` or ``momentum``, which are plain numbers.

    Raises:
        TypeError: ``value`` is no number.
        ValueError: ``value`` is negative or not finite.
    """
    _check_given(name, value)
    check_number(name, value)
    return Schedule(name, value)


def _check_given(name: str, value: Any) -> None:
    if value is None and name in RECOMMENDED:
        raise TypeError(f'{name} must be a number, got None: pass one, or preset="recommended"')


def _check_decay(decay: float | None) -> None:
    if decay is None:
        return
    if isinstance(decay, bool) or not isinstance(decay, numbers.Real):
        raise TypeError(f"factor_decay must be a number in [0, 1) or None, got {shown(decay)}")
    if not 0 <= decay < 1:
        raise ValueError(f"factor_decay must be in [0, 1), got {decay!r}")


def _check_rows(rows: Any) -> None:
    check_number("rows", rows, positive=True)
    every = 1 / float(rows) if rows <= 1 else math.inf
    if not math.isfinite(every) or abs(every - round(every)) > 1e-6:
        raise ValueError(f"rows must be 1 / k for a whole k, as 1, 0.5 or 0.25: every k-th row; got {rows!r}")


def _check_rounding(name: str, dtype: Any) -> None:
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name} must be torch.bfloat16 or None, got {shown(dtype)}")
    if dtype not in {None, torch.bfloat16}:
        raise ValueError(f"{name} must be torch.bfloat16 or None, got {dtype}")


def damping_schedule(value: Any) -> Schedule:
    """The schedule of ``damping``; one that adapts itself starts with a constant."""
    _check_given("damping", value)
    return Schedule("damping", value.initial if isinstance(value, LevenbergMarquardt) else value)


def _check_block_size(block_size: Any) -> None:
    if not isinstance(block_size, str):
        check_integer("block_size", block_size, optional=True)
    elif block_size != "auto":
        raise TypeError(f"block_size must be an integer >= 1, None or 'auto', got {shown(block_size)}")


def _check_split_indices(indices: Sequence[int] | None) -> None:
    if indices is None:
        return
    if isinstance(indices, str | bytes) or not isinstance(indices, Sequence):
        raise TypeError(f"split_indices must be a list of integers or None, got {shown(indices)}")
    for index in indices:
        if isinstance(index, bool) or not isinstance(index, int):
            raise TypeError(f"split_indices must hold integers, got {shown(index)}")
    if not indices or list(indices) != sorted(set(indices)) or indices[0] < 0:
        raise ValueError(f"split_indices must be non-negative, sorted and unique, got {list(indices)}")
