"""The arguments of THOR, checked once for both doors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .arguments import (
    check_choice,
    check_integer,
    check_likelihood,
    check_number,
    check_sharing,
    check_type,
    shown,
)
from .passes.layout import BiasRule, Fisher, Likelihood, LongSide, Rules, Sharing
from .refresh import DampingRule
from .schedule import Schedule

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
    enable_clip_grad: bool = False
    frequency: int = 100
    damping_rule: DampingRule = "factor"
    block_size: int | None = 128
    sharing: Sharing = "expand"
    bias: BiasRule = "raw"
    max_dim: int | None = MAX_DIM
    long_side: LongSide = "blocks"
    fisher: Fisher = "empirical"
    likelihood: Likelihood | None = None

    def __post_init__(self) -> None:
        check_number("loss_scale", self.loss_scale, positive=True)
        check_integer("batch_size", self.batch_size, optional=True)
        check_integer("frequency", self.frequency)
        check_integer("block_size", self.block_size, optional=True)
        for name in ("use_nesterov", "enable_clip_grad"):
            check_type(name, getattr(self, name), bool, "True or False")
        if self.decay_filter is not None and not callable(self.decay_filter):
            raise TypeError(f"decay_filter must be a callable name -> bool, got {shown(self.decay_filter)}")
        check_choice("damping_rule", self.damping_rule, DampingRule)
        check_sharing("sharing", self.sharing)
        check_choice("bias", self.bias, BiasRule)
        check_integer("max_dim", self.max_dim, optional=True)
        check_choice("long_side", self.long_side, LongSide)
        check_choice("fisher", self.fisher, Fisher)
        check_likelihood("likelihood", self.likelihood)
        _check_split_indices(self.split_indices)

    @property
    def rules(self) -> Rules:
        """What is measured of every layer."""
        rules = Rules(self.sharing, self.bias, self.max_dim, self.long_side, self.block_size)
        if self.fisher == "empirical":
            return rules
        scale = float(self.loss_scale)
        return replace(rules, fisher=self.fisher, likelihood=self.likelihood, loss_scale=scale)

    def decays(self, name: str) -> bool:
        """Whether weight decay applies to the parameter called ``name``."""
        return self.decay_filter is None or bool(self.decay_filter(name))


def number_schedule(name: str, value: Any) -> Schedule:
    """A schedule of ``weight_decay`` or ``momentum``, which are plain numbers.

    Raises:
        TypeError: ``value`` is no number.
        ValueError: ``value`` is negative or not finite.
    """
    check_number(name, value)
    return Schedule(name, value)


def _check_split_indices(indices: Sequence[int] | None) -> None:
    if indices is None:
        return
    if isinstance(indices, str) or not isinstance(indices, Sequence):
        raise TypeError(f"split_indices must be a list of integers or None, got {shown(indices)}")
    for index in indices:
        if isinstance(index, bool) or not isinstance(index, int):
            raise TypeError(f"split_indices must hold integers, got {shown(index)}")
    if not indices or list(indices) != sorted(set(indices)) or indices[0] < 0:
        raise ValueError(f"split_indices must be non-negative, sorted and unique, got {list(indices)}")
