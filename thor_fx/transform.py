"""Gradient transformations: pairs of pure functions ``(init, update)`` that compose.

The form is optax's. A transform gets what it needs to know of a step through :class:`Signals`;
numbers that change with the step arrive as 0-D tensors, so a compiled update never recompiles.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .factors import Moments
from .layers import Coverage
from .passes.layout import Rules, layer_of
from .schedule import Schedule

Params = Mapping[str, Tensor]
Updates = Mapping[str, Tensor]
State = Any
Hyper = Mapping[str, Tensor | float]


@dataclass(frozen=True)
class Signals:
    """What an update knows besides the gradients.

    Attributes:
        coverage: which parameters are preconditioned, and how.
        hyper: the values of the schedules in this step, by name.
        moments: what the factor step measured, by layer; None in a plain step.
        terms: the terms ``n`` that the loss averages over, 0-D; None in a plain step.
        gradient_scale: what the gradients carry, 0-D (``torch.amp.GradScaler``); None: 1.
        loss_scale: what the loss of the factor step was multiplied by, 0-D; None: 1.
        found_inf: not 0 where the scaler has seen a NaN or infinity, 0-D; None: it has not looked.
    """

    coverage: Coverage
    hyper: Any = field(default_factory=dict)
    moments: Mapping[str, Moments] | None = None
    terms: Tensor | None = None
    gradient_scale: Tensor | None = None
    loss_scale: Tensor | None = None
    found_inf: Tensor | None = None


class Transform(NamedTuple):
    """A gradient transformation.

    Attributes:
        init: ``init(params, coverage) -> state``.
        update: ``update(updates, state, params, signals) -> (updates, state)``; pure.
        schedules: the hyper-parameters that it reads from ``signals.hyper``, by name.
        frequency: it wants factors in step 0 and every ``frequency`` steps; None: never.
        rules: which factors it wants.
    """

    init: Callable[[Params, Coverage], State]
    update: Callable[[Updates, State, Params, Signals], tuple[Updates, State]]
    schedules: Mapping[str, Schedule] = {}
    frequency: int | None = None
    rules: Rules = Rules()

    def hyper(self, step: int) -> dict[str, float]:
        """The value of every schedule in step ``step``."""
        return {name: schedule(step) for name, schedule in self.schedules.items()}

    def wants_factors(self, step: int) -> bool:
        """Whether step ``step`` is a factor step."""
        return self.frequency is not None and step % self.frequency == 0


def _rules(transforms: Iterable[Transform]) -> Rules:
    """The rules of the transforms that want factors."""
    wanted = {transform.rules for transform in transforms if transform.frequency is not None}
    if len(wanted) > 1:
        raise ValueError(f"transforms in one chain want different factors: {wanted}")
    return next(iter(wanted), Rules())


def chain(*transforms: Transform) -> Transform:
    """Apply transforms one after the other.

    Raises:
        TypeError: an argument is no transform.
        ValueError: two transforms have a schedule of the same name, or want different factors, or
            at different frequencies.
    """
    schedules: dict[str, Schedule] = {}
    for transform in transforms:
        if not isinstance(transform, Transform):
            raise TypeError(f"chain takes transforms, got {type(transform).__name__}: {transform!r}")
        for name, schedule in transform.schedules.items():
            if name in schedules:
                raise ValueError(f"two transforms in this chain have a schedule called {name!r}")
            schedules[name] = schedule
    frequencies = {t.frequency for t in transforms if t.frequency is not None}
    if len(frequencies) > 1:
        raise ValueError(f"transforms in one chain want factors at different frequencies: {frequencies}")

    def init(params: Params, coverage: Coverage) -> tuple[State, ...]:
        return tuple(transform.init(params, coverage) for transform in transforms)

    def update(
        updates: Updates, state: State, params: Params, signals: Signals
    ) -> tuple[Updates, tuple[State, ...]]:
        new_state = []
        for transform, inner in zip(transforms, state, strict=True):
            updates, new_inner = transform.update(updates, inner, params, signals)
            new_state.append(new_inner)
        return updates, tuple(new_state)

    return Transform(init, update, schedules, next(iter(frequencies), None), _rules(transforms))


def stateless(
    function: Callable[[Updates, Params, Signals], Updates], schedules: Mapping[str, Schedule] | None = None
) -> Transform:
    """A transform without memory."""

    def update(updates: Updates, state: State, params: Params, signals: Signals) -> tuple[Updates, State]:
        return function(updates, params, signals), state

    return Transform(lambda _params, _coverage: (), update, schedules or {})


def scale_by_learning_rate(lr: Schedule) -> Transform:
    """``-lr u``: the last link of a chain."""

    def scale(updates: Updates, _: Params, signals: Signals) -> Updates:
        return {name: -signals.hyper["lr"] * u for name, u in updates.items()}

    return stateless(scale, {"lr": lr})


def add_decayed_weights(weight_decay: Schedule, decays: Callable[[str], bool]) -> Transform:
    """``u + weight_decay p`` for the parameters whose name satisfies ``decays``."""

    def decay(updates: Updates, params: Params, signals: Signals) -> Updates:
        rate = signals.hyper["weight_decay"]
        return {name: u + rate * params[name] if decays(name) else u for name, u in updates.items()}

    return stateless(decay, {"weight_decay": weight_decay})


def clip_by_norm(largest: float) -> Transform:
    """Scale every update, tensor by tensor, down to an L2 norm of at most ``largest``."""

    def clip(updates: Updates, _params: Params, _signals: Signals) -> Updates:
        norms = {name: torch.linalg.vector_norm(u) for name, u in updates.items()}
        return {name: u * (largest / norms[name].clamp_min(largest)) for name, u in updates.items()}

    return stateless(clip)


def heavy_ball(momentum: Schedule, *, nesterov: bool = False) -> Transform:
    """``m = mu m + u``; the update is ``m``, or ``u + mu m`` with ``nesterov``."""

    def init(params: Params, _: Coverage) -> dict[str, Tensor]:
        return {name: torch.zeros_like(p) for name, p in params.items()}

    def update(updates: Updates, state: State, _: Params, signals: Signals) -> tuple[Updates, State]:
        mu = signals.hyper["momentum"]
        moving = {name: mu * state[name] + u for name, u in updates.items()}
        new_state = {**state, **moving}
        if nesterov:
            return {name: u + mu * moving[name] for name, u in updates.items()}, new_state
        return moving, new_state

    return Transform(init, update, {"momentum": momentum})


def centralize_gradients() -> Transform:
    """Subtract from every gradient its mean over all axes but the first (Yong et al. 2020, eq. 1).

    For weights of convolutions: gradients of three axes or more. Others pass unchanged.
    """

    def centralize(updates: Updates, _params: Params, _signals: Signals) -> Updates:
        return {
            name: u - u.mean(dim=tuple(range(1, u.dim())), keepdim=True) if u.dim() > 2 else u
            for name, u in updates.items()
        }

    return stateless(centralize)


def unscale(inner: Transform) -> Transform:
    """Take the scales of ``torch.amp.GradScaler`` off before ``inner`` sees a step.

    Gradients are divided by ``signals.gradient_scale``; sums of squares of cotangents, and with them
    ``G``, by the square of ``signals.loss_scale``. The two differ where somebody has divided the
    gradients already, to clip them. Only the empirical Fisher carries the scale of the loss.
    """
    carries = inner.rules.fisher == "empirical"

    def update(updates: Updates, state: State, params: Params, signals: Signals) -> tuple[Updates, State]:
        if signals.gradient_scale is not None:
            updates = {name: u / signals.gradient_scale for name, u in updates.items()}
        if carries and signals.loss_scale is not None and signals.moments is not None:
            square = signals.loss_scale**2
            moments = {
                name: m if m.cotangents is None else m._replace(cotangents=m.cotangents / square)
                for name, m in signals.moments.items()
            }
            signals = replace(signals, moments=moments)
        return inner.update(updates, state, params, signals)

    return inner._replace(update=update)


class SkipState(NamedTuple):
    """State of :func:`skip_nonfinite`: that of the inner transform, and the steps skipped so far."""

    inner: State
    skipped: Tensor


def skip_nonfinite(inner: Transform) -> Transform:
    """Let a step whose updates are not all finite change nothing, and count it.

    A NaN or infinite gradient makes its update NaN or infinite, whatever the transform; what a
    gradient scaler has found counts too. The decision is taken on the device (``torch.where``),
    without a synchronisation.
    """

    def init(params: Params, coverage: Coverage) -> SkipState:
        device = next(iter(params.values())).device
        return SkipState(inner.init(params, coverage), torch.zeros((), dtype=torch.int64, device=device))

    def update(
        updates: Updates, state: SkipState, params: Params, signals: Signals
    ) -> tuple[Updates, SkipState]:
        new, new_inner = inner.update(updates, state.inner, params, signals)
        finite = torch.stack([u.isfinite().all() for u in new.values()]).all()
        if signals.found_inf is not None:
            finite = finite & (signals.found_inf == 0)
        new = {name: torch.where(finite, u, torch.zeros_like(u)) for name, u in new.items()}
        kept = pytree.tree_map(lambda n, old: torch.where(finite, n, old), new_inner, state.inner)
        return new, SkipState(kept, state.skipped + ~finite)

    return Transform(init, update, inner.schedules, inner.frequency, inner.rules)


def partition(transforms: Mapping[str, Transform], groups: Mapping[str, str]) -> Transform:
    """Different transforms for different parameters.

    Args:
        transforms: by label; the schedule ``lr`` of label ``x`` is called ``x.lr`` outside.
        groups: the label of every parameter.
    """
    schedules = {
        f"{label}.{name}": schedule
        for label, transform in transforms.items()
        for name, schedule in transform.schedules.items()
    }

    def members(label: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in tensors.items() if groups[name] == label}

    def restrict(label: str, names: Mapping[str, Tensor], signals: Signals) -> Signals:
        hyper = {name: signals.hyper[f"{label}.{name}"] for name in transforms[label].schedules}
        mine = signals.coverage.restrict(frozenset(names))
        moments = {n: m for n, m in (signals.moments or {}).items() if layer_of(n) in mine.layers}
        return replace(signals, coverage=mine, hyper=hyper, moments=moments or None)

    def init(params: Params, coverage: Coverage) -> dict[str, State]:
        mine = {label: members(label, params) for label in transforms}
        return {
            label: transforms[label].init(own, coverage.restrict(frozenset(own)))
            for label, own in mine.items()
            if own
        }

    def update(updates: Updates, state: State, params: Params, signals: Signals) -> tuple[Updates, State]:
        new: dict[str, Tensor] = {}
        new_state = dict(state)
        for label, inner in state.items():
            own = members(label, params)
            changed, new_state[label] = transforms[label].update(
                members(label, updates), inner, own, restrict(label, own, signals)
            )
            new |= changed
        return new, new_state

    frequencies = {transform.frequency for transform in transforms.values()} - {None}
    return Transform(init, update, schedules, next(iter(frequencies), None), _rules(transforms.values()))


def apply_updates(params: Params, updates: Updates) -> dict[str, Tensor]:
    """``p + u``, in the dtype of ``p``; parameters without an update stay the same tensor."""
    return {name: p + updates[name].to(p.dtype) if name in updates else p for name, p in params.items()}
