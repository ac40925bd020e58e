"""THOR as a chain of small transforms (Chen et al. 2021; MindSpore's ``nn.thor``).

One step of one weight, in this order::

    g = (dL/dW) / loss_scale
    U = G_d^-1 g A_d^-1            precondition; inverses from the last factor step
    U = U + weight_decay W         for names that satisfy decay_filter
    U = U min(1, 1 / |U|)          with enable_clip_grad, tensor by tensor
    m = momentum m + U
    W = W - lr m                   with use_nesterov: W - lr (U + momentum m)

and none of it where a gradient is not finite. That is the reference. With every option in its place::

    g = (dL/dW) / loss_scale
    m = momentum m + g             momentum_on="gradient": of layers; below, g is m (nesterov: g + momentum m)
    U = G_d^-1 g A_d^-1            of what belongs to a layer; norms: elementwise; the rest: U = g
    U = U min(1, sqrt(kl_clip / (lr^2 sum <U, g>)))
    m = momentum m + U             momentum_on="gradient": of what belongs to no layer; below, U is m
    U = U length / |U|             step_norm, layer by layer
    U = U + weight_decay W         unless decoupled_weight_decay
    U = U min(1, clip_norm / |U|)  with enable_clip_grad; |U| of the tensor, or with clip="global" of all
    m = momentum m + U             momentum_on="update"; below, U is m (nesterov: U + momentum m)
    U = U + weight_decay W         decoupled_weight_decay
    W = W - lr U                   what belongs to no layer: fallback_lr

With ``fallback="adamw"``, what belongs to no layer (biases that are not joint, norms, tables) leaves this
chain at the top, for AdamW with ``fallback_lr`` and the same ``weight_decay``. ``docs/steps.md`` has a
section for each option.
"""

from collections.abc import Callable, Sequence

import torch
from torch.distributed import ProcessGroup

from .blocks import BlockSize
from .clips import Clip
from .distributed.collectives import world_of
from .distributed.distribute import distribute, for_one_rank
from .distributed.work import WorkSharing
from .inverses import Inverse
from .levenberg_marquardt import LevenbergMarquardt
from .links import thor_chain
from .options import MAX_DIM, Fallback, MomentumOn, Options, damping_schedule, number_schedule
from .parameter_groups import ParameterGroups
from .passes.layout import BiasRule, Fisher, Likelihood, LongSide, Sharing
from .presets import Preset, takes_preset
from .refresh import DampingRule
from .refresh_rules import RefreshRule
from .schedule import Schedule, Value
from .skipping import skip_nonfinite
from .step_norm import StepNorm
from .transform import Transform


@takes_preset
def thor(
    lr: Value,
    damping: Value | LevenbergMarquardt | None = None,
    momentum: float | None = None,
    weight_decay: float = 0.0,
    loss_scale: float = 1.0,
    batch_size: int | None = None,
    use_nesterov: bool = False,
    decay_filter: Callable[[str], bool] | None = None,
    split_indices: Sequence[int] | None = None,
    enable_clip_grad: bool = False,
    frequency: int = 100,
    *,
    damping_rule: DampingRule = "factor",
    block_size: BlockSize = 128,
    sharing: Sharing = "expand",
    bias: BiasRule = "raw",
    max_dim: int | None = MAX_DIM,
    long_side: LongSide = "blocks",
    inverse: Inverse = "cholesky",
    factor_decay: float | None = None,
    refresh: RefreshRule | None = None,
    refresh_async: bool = False,
    kl_clip: float | None = None,
    clip: Clip = "tensor",
    clip_norm: float = 1.0,
    step_norm: StepNorm | None = None,
    momentum_on: MomentumOn = "update",
    decoupled_weight_decay: bool = False,
    fallback: Fallback = "sgd",
    fallback_lr: Value | None = None,
    preset: Preset | None = None,  # noqa: ARG001 - takes_preset has used it
    fisher: Fisher = "empirical",
    likelihood: Likelihood | None = None,
    layer_filter: Callable[[str], bool] | None = None,
    rows: float = 1.0,
    factor_dtype: torch.dtype | None = None,
    update_dtype: torch.dtype | None = None,
    process_group: ProcessGroup | None = None,
    reduce_dtype: torch.dtype | None = None,
    work_sharing: WorkSharing = "none",
) -> Transform:
    """THOR as a pure transform, for :func:`thor_fx.compile_step`.

    Args:
        lr: learning rate: a number, a 0-D tensor, a 1-D tensor with one value per step (the last is
            held when the table runs out), or a callable ``step -> value``. Never recompiles.
        damping: ``lambda``, given like ``lr``; or a :class:`thor_fx.LevenbergMarquardt`, which adapts it.
            Needed, unless a preset gives it; so is ``momentum``.
        momentum: of the heavy ball, at least 0.
        weight_decay: added to the preconditioned gradient, so it passes through momentum and ``lr``.
        loss_scale: the caller multiplies the loss by it; it cancels here.
        batch_size: terms ``n`` that the loss averages over. None: the rows of the site nearest the
            loss, that is the batch for a classifier and batch x positions for a language model.
        use_nesterov: Nesterov's form of momentum.
        decay_filter: ``name -> bool``, which parameters decay; None: all.
        split_indices: the last layers of the buckets in which factors of all ranks are averaged, in the
            order of layers, ``[26, 53]``; None: buckets of 25 MiB.
        enable_clip_grad: clip every update to L2 norm ``clip_norm``, after weight decay.
        frequency: factors and inverses are renewed in step 0 and every ``frequency`` steps; with
            ``refresh``, factors.
        damping_rule: ``"factor"``, ``"sqrt"``, ``"pi"`` or ``"relative"``: :mod:`thor_fx.precondition`.
        block_size: side of THOR's diagonal blocks; None: whole factors; ``"auto"``: measured on the first
            batch (:func:`thor_fx.block_size_report`), with long sides in blocks of ``max_dim``.
        sharing: ``"expand"``: every position is a row; ``"reduce"``: the positions of one datum are
            averaged (``A``) and summed (``G``) first; or ``name of layer -> "expand" | "reduce"``.
        bias: ``"raw"``: a bias takes the first-order rule; ``"joint"``: it is one more column of its weight.
        max_dim: the longest side of a layer with a whole factor; None: no limit.
        long_side: what a longer side keeps: ``"blocks"`` of ``block_size``, its ``"diagonal"``, or
            nothing (``"identity"``: the gradient is preconditioned from the other side only).
        inverse: what is made of the factors: damped inverses by ``"cholesky"``, ``"eigen"`` or
            ``"newton_schulz"``; ``"ekfac"``: their eigenbasis; ``"eva"``: vectors in place of factors.
            One module each in :mod:`thor_fx.inverses`.
        factor_decay: in [0, 1): what is inverted are running averages of the factors,
            ``F = decay F + (1 - decay) F_batch``, bias-corrected; None: the factors of the last batch.
        refresh: when inverses are recomputed: :class:`~thor_fx.Every`, :class:`~thor_fx.Staggered` or
            :class:`~thor_fx.ByTrace`; None: all of them in every factor step.
        refresh_async: the inversion runs beside the ``frequency // 2`` steps after a factor step, and the new
            inverses act from the step after those on: :mod:`thor_fx.overlap`.
        kl_clip: bound on ``lr^2 sum <U, g>``, twice the KL divergence that a step may cause; None: none.
        clip: what ``enable_clip_grad`` clips: every ``"tensor"``, or all together (``"global"``).
        clip_norm: to which L2 norm.
        step_norm: the length of a layer's update: that of ``"adam"`` or ``"sgd"``, fixed by ``"rms"`` or
            ``"spectral"`` size, or as it is (None): :mod:`thor_fx.step_norm`; or the nearest
            ``"orthogonal"`` matrix: :mod:`thor_fx.orthogonal`.
        momentum_on: the preconditioned ``"update"``, or the ``"gradient"`` of layers before that.
        decoupled_weight_decay: ``W - lr weight_decay W``, past clips and momentum.
        fallback: the rule of what belongs to no layer: ``"sgd"`` (norms: elementwise) or ``"adamw"``.
        fallback_lr: its learning rate, given like ``lr``; None: ``lr``.
        preset: ``"thor"`` or ``"recommended"``: values for what is left out here: :mod:`thor_fx.presets`.
        fisher: where the rows of ``G`` come from: ``"empirical"``: from the gradients of the loss (free);
            ``"sampled"``: from labels drawn from the model's own predictive distribution (one more backward
            in a factor step); ``"exact"``: from all directions of a small output (one more for each):
            the generalised Gauss-Newton matrix. See ``docs/curvature.md``.
        likelihood: for the last two, of the model's output: ``"categorical"``, ``"bernoulli"``,
            ``"gaussian"``, a callable ``z -> dNLL/dz`` of drawn labels, or None: as read off the loss.
        layer_filter: ``name of weight -> bool``: which weights have factors; the others take the rule of
            ``fallback``, as is often better for embeddings and the last layer of a language model; None:
            all that can have factors.
        rows: the share of rows that factors are measured on, ``1 / k`` for a whole k: every k-th datum, or
            every k-th position of a flat list of sequences. Unbiased where batches are shuffled.
        factor_dtype: ``torch.bfloat16``: rows are rounded to it in the products of factors, which are several
            times faster for it, and summed in float32; None: nothing is rounded.
        update_dtype: ``torch.bfloat16``: gradients and inverses are rounded to it where they are multiplied.
        process_group: the ranks that train together, each on its own part of the batch: gradients and factors
            are averaged over them, by collectives in the compiled step: :mod:`thor_fx.distributed`.
            None: there are no others.
        reduce_dtype: ``torch.bfloat16``: factors are rounded to it while they travel.
        work_sharing: ``"none"``: every rank inverts all factors; each layer is inverted by one rank, which
            sends the ``"inverse"``, or in every step the preconditioned ``"gradient"``; or what takes least
            time (``"auto"``): :mod:`thor_fx.distributed.work`.

    Returns:
        A transform whose updates are added to the parameters.

    Raises:
        TypeError: an argument has a wrong type; the message names it.
        ValueError: an argument has a wrong value; the message names it.

    Example:
        >>> tx = thor(lr=0.1, damping=0.03, momentum=0.9, frequency=10)
        >>> tx.hyper(step=0)
        {'damping': 0.03, 'weight_decay': 0.0, 'momentum': 0.9, 'lr': 0.1}
        >>> [step for step in range(25) if tx.wants_factors(step)]
        [0, 10, 20]
    """
    options = Options(
        loss_scale=loss_scale,
        batch_size=batch_size,
        use_nesterov=use_nesterov,
        decay_filter=decay_filter,
        split_indices=split_indices,
        enable_clip_grad=enable_clip_grad,
        frequency=frequency,
        damping_rule=damping_rule,
        block_size=block_size,
        sharing=sharing,
        bias=bias,
        max_dim=max_dim,
        long_side=long_side,
        inverse=inverse,
        factor_decay=factor_decay,
        refresh=refresh,
        refresh_async=refresh_async,
        kl_clip=kl_clip,
        clip=clip,
        clip_norm=clip_norm,
        step_norm=step_norm,
        momentum_on=momentum_on,
        decoupled_weight_decay=decoupled_weight_decay,
        fallback=fallback,
        adaptive=damping if isinstance(damping, LevenbergMarquardt) else None,
        fisher=fisher,
        likelihood=likelihood,
        layer_filter=layer_filter,
        rows=rows,
        factor_dtype=factor_dtype,
        update_dtype=update_dtype,
        reduce_dtype=reduce_dtype,
        work_sharing=work_sharing,
    )
    schedules = {
        "lr": Schedule("lr", lr),
        "damping": damping_schedule(damping),
        "momentum": number_schedule("momentum", momentum),
        "weight_decay": number_schedule("weight_decay", weight_decay),
    }
    if fallback_lr is not None:
        schedules["fallback_lr"] = Schedule("fallback_lr", fallback_lr)
    world = world_of(process_group)
    groups = ParameterGroups({"": schedules})
    tx = skip_nonfinite(thor_chain(for_one_rank(options, world), groups, world))
    return distribute(tx, options, groups, world, gradients=True)


def decay_all_but_beta_gamma(name: str) -> bool:
    """A ``decay_filter``: no weight decay for names that contain ``beta`` or ``gamma``.

    This is what the documentation of MindSpore's ``nn.thor`` promises and its code does not do.

    Example:
        >>> [name for name in ("fc.weight", "norm.gamma") if decay_all_but_beta_gamma(name)]
        ['fc.weight']
    """
    return "beta" not in name and "gamma" not in name
