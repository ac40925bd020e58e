"""The links of the chain at the top of :mod:`thor_fx.thor`, for one group of parameters or several."""

from dataclasses import replace
from typing import Any

from .adam import adam
from .clips import clip_by_global_norm, clip_by_kl
from .distributed.collectives import World
from .distributed.distribute import shared_work
from .distributed.exchange import Exchange
from .options import Options
from .orthogonal import orthogonalize
from .parameter_groups import ParameterGroups, Schedules
from .precondition import precondition
from .predicted import apply_curvature, predict_change
from .routes import NOTHING, by_coverage
from .step_norm import LENGTHS, graft, resize
from .transform import (
    Transform,
    add_decayed_weights,
    centralize_gradients,
    chain,
    clip_by_norm,
    divide_by,
    heavy_ball,
    partition,
    scale_by_learning_rate,
)


def thor_chain(options: Options, groups: ParameterGroups, world: World | None = None) -> Transform:
    """All links, without the guard against non-finite gradients; ``world``: the ranks that share the work."""
    if options.block_size == "auto":
        return _unresolved(options, groups, world)
    tx = chain(*_links(options, groups, world), shared=True)
    if options.fallback == "adamw":
        tx = by_coverage(tx, _adamw(options, groups))
    if options.adaptive is None:
        return tx
    tx = predict_change(tx, groups.each(lambda _: apply_curvature()), options.loss_scale)
    return tx._replace(adaptive=options.adaptive)


def _unresolved(options: Options, groups: ParameterGroups, world: World | None) -> Transform:
    """The chain before its block size is known; what is measured of a layer does not depend on it."""

    def resolve(block_size: int | None) -> Transform:
        chosen = thor_chain(replace(options, block_size=block_size), groups, world)
        return chosen._replace(rules=options.rules)

    def refuse(*_: Any) -> Any:
        raise RuntimeError(
            'block_size="auto" has not been chosen yet: compile_step(...).init(params, *batch) does that; to '
            "use the transform alone, call tx.resolve(128) first"
        )

    return resolve(None)._replace(init=refuse, update=refuse, resolve=resolve)


def _links(options: Options, groups: ParameterGroups, world: World | None) -> list[Transform]:
    decay = groups.each(lambda own: add_decayed_weights(own["weight_decay"], options.decays))
    links = _centralized(groups)
    links.append(_direction(options, groups, world))
    if options.step_norm is not None and options.step_norm in LENGTHS:
        links.append(resize(LENGTHS[options.step_norm]))
    if options.step_norm == "orthogonal":
        links.append(orthogonalize())
    if not options.decoupled_weight_decay:
        links.append(decay)
    if options.enable_clip_grad:
        bound = clip_by_norm if options.clip == "tensor" else clip_by_global_norm
        links.append(bound(options.clip_norm))
    if options.momentum_on == "update":
        links.append(_momentum(options, groups))
    if options.decoupled_weight_decay:
        links.append(decay)
    links.append(_rates(groups))
    return links


def _direction(options: Options, groups: ParameterGroups, world: World | None) -> Transform:
    """Preconditioning, and what has to see its gradients as well as its updates."""
    unscaled = divide_by(options.loss_scale)
    tx = _preconditioner(options, groups, world)
    if options.kl_clip is not None:
        tx = clip_by_kl(tx, options.kl_clip, groups.named("lr"), groups.lr, options.loss_scale)
    if options.step_norm == "sgd":
        tx = graft(tx, unscaled)
    if options.momentum_on == "gradient":
        momentum = _momentum(options, groups)
        tx = chain(by_coverage(momentum, NOTHING), tx, by_coverage(NOTHING, momentum), shared=True)
    if options.step_norm == "adam":
        tx = graft(tx, by_coverage(chain(unscaled, adam()), NOTHING))
    return tx


def _preconditioner(options: Options, groups: ParameterGroups, world: World | None) -> Transform:
    def make(own: Schedules, exchange: Exchange | None = None) -> Transform:
        block_size = options.block_size
        assert block_size != "auto", "thor_chain has seen to it"
        return precondition(
            own["damping"],
            damping_rule=options.damping_rule,
            block_size=block_size,
            loss_scale=options.loss_scale,
            batch_size=options.batch_size,
            frequency=options.frequency,
            rules=options.rules,
            inverse=options.inverse,
            factor_decay=options.factor_decay,
            refresh_rule=options.refresh_rule,
            update_dtype=options.update_dtype,
            exchange=exchange,
        )

    work = shared_work(options, world)
    if work is None:
        return groups.each(make)
    return groups.each(lambda own: work.shared(make(own), make(own, work.exchange)))


def _momentum(options: Options, groups: ParameterGroups) -> Transform:
    return groups.each(lambda own: heavy_ball(own["momentum"], nesterov=options.use_nesterov))


def _adamw(options: Options, groups: ParameterGroups) -> Transform:
    decay = groups.each(lambda own: add_decayed_weights(own["weight_decay"], options.decays))
    rate = groups.each(lambda own: scale_by_learning_rate(own.get("fallback_lr", own["lr"])))
    return chain(*_centralized(groups), divide_by(options.loss_scale), adam(), decay, rate)


def _rates(groups: ParameterGroups) -> Transform:
    def rate(own: Schedules) -> Transform:
        layers = scale_by_learning_rate(own["lr"])
        if "fallback_lr" not in own:
            return layers
        return by_coverage(layers, scale_by_learning_rate(own["fallback_lr"]))

    return groups.each(rate)


def _centralized(groups: ParameterGroups) -> list[Transform]:
    if not groups.centralized or groups.labels is None:
        return []
    kinds = {label: label in groups.centralized for label in groups.schedules}
    own = {label: centralize_gradients() if wanted else NOTHING for label, wanted in kinds.items()}
    return [partition(own, groups.labels)]
