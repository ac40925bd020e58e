"""Gradient transformations: pairs of pure functions ``(init, update)`` that compose.

The form is optax's. A transform gets what it needs to know of a step through :class:`Signals`;
numbers that change with the step arrive as 0-D tensors, so a compiled update never recompiles.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .ahead import Ahead
from .factors import Moments
from .inverses import Inverse
from .layers import Coverage
from .passes.layout import Rules, layer_of
from .per_coverage import PerCoverage
from .precision import wide
from .schedule import Schedule

if TYPE_CHECKING:
    from .distributed.collectives import World
    from .levenberg_marquardt import LevenbergMarquardt
    from .options import Options

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
        refreshes: of the layers that were measured, those to invert in this step; None: all.
        compares: whether the change of the loss that the step should make is wanted.
        world: the ranks that see other parameters each; None: all parameters are seen here.
    """

    coverage: Coverage
    hyper: Any = field(default_factory=dict)
    moments: Mapping[str, Moments] | None = None
    terms: Tensor | None = None
    gradient_scale: Tensor | None = None
    loss_scale: Tensor | None = None
    found_inf: Tensor | None = None
    refreshes: frozenset[str] | None = None
    compares: bool = False
    world: "World | None" = None

    def within(self, coverage: Coverage) -> "Signals":
        """What is known of the layers of a part of the coverage."""
        moments = {n: m for n, m in (self.moments or {}).items() if layer_of(n) in coverage.layers}
        return replace(self, coverage=coverage, moments=moments or None)

    def total(self, terms: Sequence[Tensor]) -> Tensor:
        """The sum of 0-D tensors of the parameters that are seen here, and of those of other ranks."""
        if self.world is None:
            return torch.stack(list(terms)).sum()
        zero = torch.zeros_like(next(iter(self.hyper.values())))  # in one dtype on all ranks
        return self.world.total(zero + sum(term.to(zero.dtype) for term in terms))


@dataclass(frozen=True)
class Taken:
    """What is known on the host of a step that has been taken.

    Attributes:
        step: its number.
        measured: the layers that were measured and not inverted in it.
        ready: the layers that had inverses before it.
        ahead: where what a later step needs is computed beside the steps before it; None: nowhere.
    """

    step: int
    measured: frozenset[str]
    ready: frozenset[str]
    ahead: Ahead | None = None

    def within(self, coverage: Coverage) -> "Taken":
        """What is known of the layers of a part of the coverage."""
        measured, ready = (names.intersection(coverage.layers) for names in (self.measured, self.ready))
        return replace(self, measured=measured, ready=ready)


class Transform(NamedTuple):
    """A gradient transformation.

    Attributes:
        init: ``init(params, coverage) -> state``.
        update: ``update(updates, state, params, signals) -> (updates, state)``; pure.
        schedules: the hyper-parameters that it reads from ``signals.hyper``, by name.
        frequency: it wants factors in step 0 and every ``frequency`` steps; None: never.
        rules: which factors it wants.
        inverse: what it makes of them (:mod:`thor_fx.inverses`).
        between: ``between(state, params, signals, taken) -> (state, due)``, pure; called after every step
            in which some layers had inverses already. ``due`` is the next step that it wants factors in;
            None: no change. The new state acts from the next step on. None: nothing happens between steps,
            and layers are inverted in every factor step.
        adaptive: changes the schedule ``damping``, by what steps do to the loss; None: nothing does.
        resolve: where ``block_size="auto"``: the transform for the block size that has been chosen,
            ``resolve(block_size)``; it has to be called first. None: there is nothing to choose.
        world: the ranks whose gradients and factors it averages; None: those of this process are all.
        options: where there is a world, the settings that must be the same on all of its ranks.
    """

    init: Callable[[Params, Coverage], State]
    update: Callable[[Updates, State, Params, Signals], tuple[Updates, State]]
    schedules: Mapping[str, Schedule] = {}
    frequency: int | None = None
    rules: Rules = Rules()
    inverse: Inverse = "cholesky"
    between: "Between | None" = None
    adaptive: "LevenbergMarquardt | None" = None
    resolve: "Callable[[int | None], Transform] | None" = None
    world: "World | None" = None
    options: "Options | None" = None

    def hyper(self, step: int) -> dict[str, float]:
        """The value of every schedule in step ``step``."""
        return {name: schedule(step) for name, schedule in self.schedules.items()}

    def wants_factors(self, step: int, due: int | None = None) -> bool:
        """Whether step ``step`` is a factor step, where ``between`` has asked for one in step ``due``."""
        if self.frequency is None:
            return False
        return step % self.frequency == 0 if due is None else step >= due


Between = Callable[[State, Params, Signals, Taken], tuple[State, int | None]]


def after(
    transform: Transform, state: State, params: Params, signals: Signals, taken: Taken
) -> tuple[State, int | None]:
    """What a transform does between steps; one without a hook wants factors at its frequency."""
    if transform.between is not None:
        return transform.between(state, params, signals, taken)
    every = transform.frequency if taken.measured else None
    return state, None if every is None else taken.step + every - taken.step % every


def between_of_inner(inner: Transform) -> Between | None:
    """The hook of a transform around another, whose state is ``inner`` of the state of the outer."""
    hook = inner.between
    if hook is None:
        return None

    def between(state: Any, params: Params, signals: Signals, taken: Taken) -> tuple[State, int | None]:
        new, due = hook(state.inner, params, signals, taken)
        return state._replace(inner=new), due

    return between


def earliest(steps: Iterable[int | None]) -> int | None:
    """The first of the steps in which factors are due; None: nobody has named one."""
    return min((step for step in steps if step is not None), default=None)


def _rules(transforms: Iterable[Transform]) -> Rules:
    """The rules of the transforms that want factors."""
    wanted = {transform.rules for transform in transforms if transform.frequency is not None}
    if len(wanted) > 1:
        raise ValueError(f"transforms in one chain want different factors: {wanted}")
    return next(iter(wanted), Rules())


def _inverse(transforms: Iterable[Transform]) -> Inverse:
    """The method of the transforms that want factors."""
    return next((t.inverse for t in transforms if t.frequency is not None), "cholesky")


def resolving(
    combine: Callable[..., Transform], parts: Sequence[Transform]
) -> Callable[[int | None], Transform] | None:
    """How a combination is resolved: part by part; None where no part has to be."""
    if all(part.resolve is None for part in parts):
        return None

    def resolve(block_size: int | None) -> Transform:
        return combine(*(p if p.resolve is None else p.resolve(block_size) for p in parts))

    return resolve


def chain(*transforms: Transform, shared: bool = False) -> Transform:
    """Apply transforms one after the other.

    Args:
        *transforms: in order.
        shared: whether several may read one and the same schedule.

    Raises:
        TypeError: an argument is no transform.
        ValueError: two transforms have a schedule of the same name, or want different factors, or at
            different frequencies, or both adapt the damping.
    """
    schedules: dict[str, Schedule] = {}
    for transform in transforms:
        if not isinstance(transform, Transform):
            raise TypeError(f"chain takes transforms, got {type(transform).__name__}: {transform!r}")
        for name, schedule in transform.schedules.items():
            if name in schedules and not (shared and schedules[name] is schedule):
                raise ValueError(f"two transforms in this chain have a schedule called {name!r}")
            schedules[name] = schedule
    adaptive = [t.adaptive for t in transforms if t.adaptive is not None]
    if len(adaptive) > 1:
        raise ValueError("two transforms in this chain adapt the damping: use LevenbergMarquardt in one")
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

    def between(
        state: State, params: Params, signals: Signals, taken: Taken
    ) -> tuple[tuple[State, ...], int | None]:
        links = zip(transforms, state, strict=True)
        results = [after(transform, own, params, signals, taken) for transform, own in links]
        return tuple(new for new, _ in results), earliest(due for _, due in results)

    hook = between if any(transform.between for transform in transforms) else None
    frequency = next(iter(frequencies), None)
    resolve = resolving(partial(chain, shared=shared), transforms)
    asked = _rules(transforms), _inverse(transforms)
    tx = Transform(init, update, schedules, frequency, *asked, hook, next(iter(adaptive), None), resolve)
    shared_by = next(((t.world, t.options) for t in transforms if t.world is not None), (None, None))
    return tx._replace(world=shared_by[0], options=shared_by[1])


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
        rate = -signals.hyper[lr.name]
        return {name: rate * u for name, u in updates.items()}

    return stateless(scale, {lr.name: lr})


def divide_by(number: float) -> Transform:
    """``u / number``: gradients without a constant scale of the loss."""
    return stateless(lambda updates, _params, _signals: divided(updates, number))


def divided(updates: Updates, number: float) -> dict[str, Tensor]:
    """``u / number``; the same tensors where that is 1."""
    return dict(updates) if number == 1.0 else {name: u / number for name, u in updates.items()}


def add_decayed_weights(weight_decay: Schedule, decays: Callable[[str], bool]) -> Transform:
    """``u + weight_decay p`` for the parameters whose name satisfies ``decays``."""

    def decay(updates: Updates, params: Params, signals: Signals) -> Updates:
        rate = signals.hyper["weight_decay"]
        return {name: u + rate * params[name] if decays(name) else u for name, u in updates.items()}

    return stateless(decay, {"weight_decay": weight_decay})


def clip_by_norm(largest: float) -> Transform:
    """Scale every update, tensor by tensor, down to an L2 norm of at most ``largest``."""

    def clip(updates: Updates, _params: Params, _signals: Signals) -> Updates:
        norms = {name: torch.linalg.vector_norm(u, dtype=wide(u)) for name, u in updates.items()}
        return {name: shrunk(u, within(norms[name], largest)) for name, u in updates.items()}

    return stateless(clip)


def within(norm: Tensor, largest: float) -> Tensor:
    """What makes a norm ``largest`` where it is larger, 0-D.

    NaN for an infinite norm, whose squares have overflowed: such a step is skipped and counted, where a
    factor of 0 would stop a tensor without a word.
    """
    return torch.where(norm.isinf(), torch.nan, largest / norm.clamp_min(largest))


def shrunk(update: Tensor, factor: Tensor) -> Tensor:
    """``update * factor``, multiplied in the dtype of the 0-D factor."""
    return (update.to(factor.dtype) * factor).to(update.dtype)


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
    ``G``, by the square of ``signals.loss_scale``; plain sums of cotangents by it. The two differ where
    somebody has divided the gradients already, to clip them. Only the empirical Fisher carries the scale of
    the loss.
    """
    carries = inner.rules.fisher == "empirical"

    def update(updates: Updates, state: State, params: Params, signals: Signals) -> tuple[Updates, State]:
        if signals.gradient_scale is not None:
            updates = {name: u / signals.gradient_scale for name, u in updates.items()}
        if carries and signals.loss_scale is not None and signals.moments is not None:
            scale, plain = signals.loss_scale, signals.coverage.plain_sums

            def unscaled(sums: Tensor, name: str) -> Tensor:
                once = sums / scale
                return once if name in plain else once / scale  # the square of a scale may overflow

            moments = {
                name: m if m.cotangents is None else m._replace(cotangents=unscaled(m.cotangents, name))
                for name, m in signals.moments.items()
            }
            signals = replace(signals, moments=moments)
        return inner.update(updates, state, params, signals)

    return inner._replace(update=update, resolve=resolving(unscale, [inner]))


def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Whether every number is finite, 0-D.

    By the largest of every tensor, which is NaN where one is: a compiler has two operators to look at for
    each, where ``isfinite().all()`` has five.
    """
    largest: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        values = tensor.abs()
        largest.setdefault(tensor.dtype, []).append(values.amax() if values.numel() else values.sum())
    return torch.stack([torch.stack(group).isfinite().all() for group in largest.values()]).all()


class SkipState(NamedTuple):
    """State of :func:`thor_fx.skipping.skip_nonfinite`.

    Attributes:
        inner: that of the transform which is guarded.
        skipped: steps skipped so far, int64, 0-D.
        recent: what became of the last steps, the latest last, int32 (``RECENT``,): words of
            :mod:`thor_fx.skipping`.
    """

    inner: State
    skipped: Tensor
    recent: Tensor = torch.empty(0, dtype=torch.int32)  # of a state that was saved before there was one


def partition(transforms: Mapping[str, Transform], groups: Mapping[str, str]) -> Transform:
    """Different transforms for different parameters.

    Args:
        transforms: by label; the schedule ``lr`` of label ``x`` is called ``x.lr`` outside.
        groups: the label of every parameter.

    Raises:
        ValueError: a transform adapts its damping: one loss cannot tell several dampings what to be.
    """
    adapting = [label for label, transform in transforms.items() if transform.adaptive is not None]
    if adapting:
        raise ValueError(f"LevenbergMarquardt adapts one damping for all parameters, not that of {adapting}")
    schedules = {
        f"{label}.{name}": schedule
        for label, transform in transforms.items()
        for name, schedule in transform.schedules.items()
    }

    parts: PerCoverage[Coverage] = PerCoverage()

    def members(label: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in tensors.items() if groups[name] == label}

    def restrict(label: str, names: Mapping[str, Tensor], signals: Signals) -> Signals:
        hyper = {name: signals.hyper[f"{label}.{name}"] for name in transforms[label].schedules}
        own, whole = frozenset(names), signals.coverage
        mine = parts.get(whole, own, lambda: whole.restrict(own))
        return replace(signals.within(mine), hyper=hyper)

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

    def between(state: State, params: Params, signals: Signals, taken: Taken) -> tuple[State, int | None]:
        new_state, dues = dict(state), []
        for label, inner in state.items():
            own = members(label, params)
            known = restrict(label, own, signals)
            new_state[label], due = after(transforms[label], inner, own, known, taken)
            dues.append(due)
        return new_state, earliest(dues)

    frequencies = {transform.frequency for transform in transforms.values()} - {None}
    every, frequency = transforms.values(), next(iter(frequencies), None)
    hook = between if any(transform.between for transform in every) else None

    def again(*resolved: Transform) -> Transform:
        return partition(dict(zip(transforms, resolved, strict=True)), groups)

    asked = _rules(every), _inverse(every)
    return Transform(init, update, schedules, frequency, *asked, hook, resolve=resolving(again, list(every)))


def apply_updates(params: Params, updates: Updates) -> dict[str, Tensor]:
    """``p + u``, in the dtype of ``p``; parameters without an update stay the same tensor."""
    return {name: p + updates[name].to(p.dtype) if name in updates else p for name, p in params.items()}
