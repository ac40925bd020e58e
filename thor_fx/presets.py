"""Settings that belong together, by name: ``thor_fx.thor(lr=0.1, preset="recommended")``.

A preset gives values to the arguments that are left out. What is given, counts, even a default value::

    thor(lr, preset="recommended", damping=0.1) == thor(lr, **{**RECOMMENDED, "damping": 0.1})

The learning rate is in none of them.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, ParamSpec, TypeVar

from .arguments import check_choice

P = ParamSpec("P")
R = TypeVar("R")
Preset = Literal["thor", "recommended"]

THOR: Mapping[str, Any] = MappingProxyType(
    {
        "damping": 0.03,
        "momentum": 0.9,
        "frequency": 100,
        "damping_rule": "factor",
        "block_size": 128,
        "sharing": "expand",
        "bias": "raw",
        "inverse": "cholesky",
        "factor_decay": None,
        "refresh": None,
        "momentum_on": "update",
        "decoupled_weight_decay": False,
        "step_norm": None,
        "kl_clip": None,
        "clip": "tensor",
        "clip_norm": 1.0,
        "fallback": "sgd",
    }
)
"""The reference: MindSpore's ``nn.thor`` as documented, with the damping and momentum of its ResNet-50."""

RECOMMENDED: Mapping[str, Any] = MappingProxyType(
    {
        "damping": 1.0,
        "momentum": 0.9,
        "use_nesterov": True,
        "frequency": 10,
        "damping_rule": "relative",
        "max_dim": 128,
        "bias": "joint",
        "factor_decay": 0.9,
        "momentum_on": "gradient",
        "decoupled_weight_decay": True,
        "step_norm": "orthogonal",
        "fallback": "adamw",
    }
)
"""General training: natural gradients, of which an orthogonal step is taken. See benchmarks/convergence."""

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType({"thor": THOR, "recommended": RECOMMENDED})


def takes_preset(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, whose argument ``preset`` gives values to those that are left out.

    Example:
        >>> @takes_preset
        ... def show(lr, damping=None, frequency=100, preset=None, **rest):
        ...     return lr, damping, frequency
        >>> show(0.1), show(0.1, preset="recommended"), show(0.1, 0.5, preset="recommended")
        ((0.1, None, 100), (0.1, 1.0, 10), (0.1, 0.5, 10))
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def filled(*args: P.args, **kwargs: P.kwargs) -> R:
        name: Any = kwargs.get("preset")
        if name is None:
            return function(*args, **kwargs)
        check_choice("preset", name, Preset)
        given = signature.bind_partial(*args, **kwargs).arguments
        values: dict[str, Any] = {k: v for k, v in PRESETS[name].items() if k not in given}
        return function(*args, **{**values, **kwargs})

    return filled
