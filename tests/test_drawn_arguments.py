"""Every public option against all sorts of values: right ones construct, wrong ones are refused by name.

What is right is said once for every option, as the documentation says it. An option that is not said here
fails the first test.
"""

import enum
import fractions
import functools
import inspect
import math
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor, nn

import thor_fx
from profiles import examples
from thor_fx.passes.switches import OPTIMISATIONS
from training import build, mlp

pytestmark = pytest.mark.fuzz

Right = Callable[[Any], bool]


# --- what is right ---------------------------------------------------------------------------------------


def number(value: Any, positive: bool = False) -> bool:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    try:
        found = float(value)
    except OverflowError:
        return False
    return math.isfinite(found) and (found > 0 if positive else found >= 0)


def schedule(value: Any) -> bool:
    if isinstance(value, Tensor):
        real = value.dtype != torch.bool and not value.is_complex() and value.device.type != "meta"
        return real and value.dim() < 2 and value.numel() > 0 and all(map(number, value.reshape(-1).tolist()))
    return number(value) or value is rule


def rule(step: int) -> float:
    """The one callable of the pool that takes a step and returns a number."""
    return 1 / (1 + step)


def positive(value: Any) -> bool:
    return number(value, positive=True)


def integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def flag(value: Any) -> bool:
    return isinstance(value, bool)


def one_of(*choices: str) -> Right:
    return lambda value: isinstance(value, str) and value in choices


def optional(right: Right) -> Right:
    return lambda value: value is None or right(value)


def either(*rights: Right) -> Right:
    return lambda value: any(right(value) for right in rights)


def share(value: Any) -> bool:
    every = 1 / value if positive(value) and value <= 1 else math.inf
    return math.isfinite(every) and abs(every - round(every)) < 1e-6


def indices(value: Any) -> bool:
    if isinstance(value, str | bytes) or not isinstance(value, Sequence) or not value:
        return False
    whole = all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value)
    return whole and list(value) == sorted(set(value))


def names(value: Any) -> bool:
    collection = isinstance(value, list | tuple | set | frozenset | dict)
    return collection and all(isinstance(name, str) and name in OPTIMISATIONS for name in value)


def functions(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(callable, value))


def is_rule(value: Any) -> bool:
    return isinstance(value, thor_fx.Every | thor_fx.Staggered | thor_fx.ByTrace)


def is_adaptive(value: Any) -> bool:
    return isinstance(value, thor_fx.LevenbergMarquardt)


def bfloat16(value: Any) -> bool:
    return value is torch.bfloat16


def groups(value: Any) -> bool:
    """Of parameters; those of :data:`POOL` are right if they are empty, or have empty groups."""
    known = isinstance(value, list | tuple | set | frozenset | Iterator)
    return known and all(isinstance(group, dict) and group.get("params") == [] for group in value)


BACKENDS = one_of("inductor", "aot_eager", "eager")
SETTINGS: dict[str, Right] = {
    "lr": schedule,
    "damping": either(schedule, is_adaptive),
    "momentum": number,
    "weight_decay": number,
    "loss_scale": positive,
    "batch_size": optional(integer),
    "use_nesterov": flag,
    "decay_filter": optional(callable),
    "split_indices": optional(indices),
    "enable_clip_grad": flag,
    "frequency": integer,
    "damping_rule": one_of("factor", "sqrt", "pi", "relative"),
    "block_size": either(optional(integer), one_of("auto")),
    "sharing": either(one_of("expand", "reduce"), callable),
    "bias": one_of("raw", "joint"),
    "max_dim": optional(integer),
    "long_side": one_of("blocks", "diagonal", "identity"),
    "inverse": one_of("cholesky", "eigen", "newton_schulz", "ekfac", "eva"),
    "factor_decay": optional(lambda value: number(value) and value < 1),
    "refresh": optional(is_rule),
    "refresh_async": flag,
    "kl_clip": optional(positive),
    "clip": one_of("tensor", "global"),
    "clip_norm": positive,
    "step_norm": optional(one_of("adam", "sgd", "rms", "spectral", "orthogonal")),
    "momentum_on": one_of("update", "gradient"),
    "decoupled_weight_decay": flag,
    "fallback": one_of("sgd", "adamw"),
    "fallback_lr": optional(schedule),
    "preset": optional(one_of("thor", "recommended")),
    "fisher": one_of("empirical", "sampled", "exact"),
    "likelihood": optional(either(one_of("categorical", "bernoulli", "gaussian"), callable)),
    "layer_filter": optional(callable),
    "rows": share,
    "factor_dtype": optional(bfloat16),
    "update_dtype": optional(bfloat16),
    "process_group": lambda value: value is None,
    "reduce_dtype": optional(bfloat16),
    "work_sharing": one_of("none", "inverse", "gradient", "auto"),
}
COMPILING: dict[str, Right] = {
    "backend": BACKENDS,
    "factor_backend": optional(BACKENDS),
    "mode": optional(one_of("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")),
    "options": optional(lambda value: isinstance(value, Mapping) and not value),
    "strict": flag,
    "passes": functions,
    "disable_passes": names,
    "on_compile_error": one_of("raise", "eager"),
}
DOORS: dict[str, dict[str, Right]] = {
    "thor": SETTINGS,
    "Thor": {
        **SETTINGS,
        "model": lambda value: value is a_model(),
        "params": optional(groups),
        "backend": optional(BACKENDS),
    },
    "compile": {
        **COMPILING,
        "shared_graph": flag,
        "model": lambda value: (
            isinstance(value, nn.Module) and any(p.requires_grad for p in value.parameters())
        ),
    },
    "compile_step": {
        **COMPILING,
        "loss_fn": callable,
        "tx": lambda value: isinstance(value, thor_fx.Transform),
        "donate": flag,
        "dynamic": optional(flag),
    },
}


@functools.cache
def a_model() -> nn.Module:
    return thor_fx.compile(build(mlp), backend="eager")


PLAIN: dict[str, Any] = {"lr": 0.1, "damping": 0.1, "momentum": 0.9}
TX = thor_fx.thor(**PLAIN)
CALLS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "thor": (thor_fx.thor, lambda: PLAIN),
    "Thor": (thor_fx.Thor, lambda: {"model": a_model(), **PLAIN}),
    "compile": (thor_fx.compile, lambda: {"model": build(mlp), "backend": "eager"}),
    "compile_step": (thor_fx.compile_step, lambda: {"loss_fn": len, "tx": TX, "backend": "eager"}),
}


# --- values ----------------------------------------------------------------------------------------------


class Colour(enum.Enum):
    RED = "tensor"


class Word(enum.StrEnum):
    TENSOR = "tensor"


TEXTS = sorted(
    {"", "fast", "SGD", "inductor", "aot_eager", "eager", "auto", "none", "empirical", "exact", "sampled"}
    | {
        "cholesky",
        "eigen",
        "newton_schulz",
        "ekfac",
        "eva",
        "tensor",
        "global",
        "update",
        "gradient",
        "joint",
    }
    | {"raw", "expand", "reduce", "blocks", "diagonal", "identity", "adam", "adamw", "sgd", "rms", "spectral"}
    | {"orthogonal", "factor", "sqrt", "pi", "relative", "thor", "recommended", "categorical", "gaussian"}
    | {"inverse", "default", "max-autotune", *OPTIMISATIONS}
)
POOL: list[Any] = [
    *(None, True, False, 0, 1, 2, -1, 7, 10**400, 0.0, -0.0, 0.5, 1 / 3, 0.3, 1.0, 1.5, -1e-300, 1e-320),
    *(
        math.nan,
        math.inf,
        -math.inf,
        1j,
        Decimal("0.5"),
        fractions.Fraction(1, 2),
        np.float64(0.5),
        np.float32(2),
    ),
    *(np.int64(3), np.bool_(True), np.array(0.5), np.array([0.5, 0.25]), np.nan),
    *(torch.tensor(0.5), torch.tensor([0.5, 0.1]), torch.tensor(2), torch.tensor(True), torch.tensor(1j)),
    *(torch.tensor([0.1, -0.1]), torch.tensor([math.nan]), torch.ones(0), torch.ones(1, 1)),
    *(
        torch.empty((), device="meta"),
        torch.tensor(0.5, dtype=torch.float16),
        torch.tensor(0.5, requires_grad=True),
    ),
    *(torch.bfloat16, torch.float32, torch.float16, torch.device("cpu")),
    *(
        (),
        [],
        {},
        set(),
        [1],
        [0, 3],
        (2, 1),
        [True],
        [1.0],
        range(3),
        b"12",
        "12",
        {"a": 1},
        {1: 2},
        [None],
        [[]],
    ),
    *(["shifts"], {"shifts"}, ["shifts", 3], [len], (len, 3), [{}], [{"params": []}], [{"params": 3}], [3]),
    *(rule, len, Colour.RED, Word.TENSOR, object(), nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))),
    *(
        nn.ReLU(),
        nn.Linear,
        torch.nn,
        TX,
        thor_fx.Every(4),
        thor_fx.Staggered(2),
        thor_fx.ByTrace(0.01, 0.001),
    ),
    *(thor_fx.ByTrace, thor_fx.LevenbergMarquardt(0.1), NotImplemented, ..., iter([])),
]
VALUES = st.one_of(
    st.sampled_from(POOL), st.sampled_from(TEXTS), st.floats(), st.integers(), st.text(max_size=4)
)


def call(door: str, **given: Any) -> Any:
    function, defaults = CALLS[door]
    return function(**{**defaults(), **given})


def parameters(door: str) -> set[str]:
    known = inspect.signature(CALLS[door][0]).parameters.values()
    return {p.name for p in known if p.kind not in {p.VAR_KEYWORD, p.VAR_POSITIONAL}}


@pytest.mark.parametrize("door", DOORS)
def test_what_is_right_is_said_for_every_option(door):
    assert parameters(door) == set(DOORS[door])


def calls_it(name: str, value: Any) -> bool:
    """Whether a callable is asked for its first value, perhaps at once: what that raises is the user's."""
    return name in {"lr", "damping", "fallback_lr"} and callable(value) and value is not rule


def assert_answered(door: str, name: str, value: Any) -> None:
    """Right values are taken; wrong ones are refused in a message that names the option."""
    if DOORS[door][name](value):
        message = refusal(door, **{name: value})  # it may not go with a default
        assert message is None or len(mentioned(door, message)) > 1, (name, value, message)
        return
    with pytest.raises((TypeError, ValueError)) as caught:
        call(door, **{name: value})
    assert name in str(caught.value), (name, value, caught.value)


def refusal(door: str, **given: Any) -> str | None:
    """What the error says that values which are right alone give together, if any."""
    try:
        call(door, **given)
    except ValueError as error:
        return str(error)
    return None


def mentioned(door: str, message: str) -> set[str]:
    return {name for name in parameters(door) if name in message}


OPTIONS = [(door, name) for door, known in DOORS.items() for name in known]


@example(("thor", "lr"), 10**400)
@example(("thor", "lr"), torch.empty((), device="meta"))
@example(("thor", "momentum"), 10**400)
@example(("thor", "rows"), 1e-320)
@example(("thor", "rows"), 10**400)
@example(("thor", "split_indices"), b"12")
@example(("thor", "block_size"), np.array([0.5, 0.25]))
@example(("thor", "factor_decay"), fractions.Fraction(1, 2))
@example(("Thor", "params"), 0)
@example(("Thor", "params"), [3])
@example(("Thor", "params"), torch.ones(2))
@example(("Thor", "params"), [{"params": 3}])
@example(("compile", "backend"), np.array([0.5, 0.25]))
@example(("compile", "mode"), "fast")
@example(("compile", "options"), {"a": 1})
@example(("compile", "disable_passes"), torch.tensor(2))
@example(("compile", "model"), nn.ReLU())
@example(("compile_step", "mode"), "fast")
@example(("compile_step", "options"), {1: 2})
@example(("compile_step", "donate"), 1)
@example(("compile_step", "dynamic"), "yes")
@examples(ci=500, nightly=20000)
@given(st.sampled_from(OPTIONS), VALUES)
def test_any_value_is_taken_or_refused_by_name(option, value):
    door, name = option
    assume(not calls_it(name, value))
    assert_answered(door, name, value)


COMBINED: dict[str, st.SearchStrategy[Any]] = {
    "fisher": st.sampled_from(["empirical", "sampled", "exact"]),
    "inverse": st.sampled_from(["cholesky", "eigen", "newton_schulz", "ekfac", "eva"]),
    "damping": st.sampled_from([0.1, thor_fx.LevenbergMarquardt(0.1)]),
    "refresh": st.sampled_from(
        [None, thor_fx.Every(4), thor_fx.Staggered(3), thor_fx.ByTrace(0.01, 0.001, longest=2)]
    ),
    "refresh_async": st.booleans(),
    "frequency": st.sampled_from([1, 2, 4, 9]),
    "update_dtype": st.sampled_from([None, torch.bfloat16]),
    "work_sharing": st.sampled_from(["none", "inverse", "gradient", "auto"]),
    "preset": st.sampled_from([None, "thor", "recommended"]),
    "factor_decay": st.sampled_from([None, 0.9]),
    "block_size": st.sampled_from([None, 3, "auto"]),
    "step_norm": st.sampled_from([None, "adam", "orthogonal"]),
}
"""Right values of options that know of each other, and of some that do not."""


@example({"refresh": thor_fx.Every(4), "frequency": 9})
@examples(ci=100, nightly=3000)
@given(st.fixed_dictionaries({}, optional=COMBINED))
def test_combinations_are_taken_or_refused_by_both_names(settings):
    message = refusal("thor", **settings)
    if message is not None:
        named = mentioned("thor", message)
        assert len(named) > 1, (settings, message)
        assert named & settings.keys(), (settings, message)


def test_a_mode_and_options_are_refused_by_both_names():
    """As by ``torch.compile``; the functional door merges them."""
    settings = {"mode": "max-autotune", "options": {"epilogue_fusion": False}}
    with pytest.raises(ValueError, match=r"takes mode or options"):
        thor_fx.compile(build(mlp), **settings)
    thor_fx.compile_step(len, TX, **settings)
