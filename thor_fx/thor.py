"""THOR as a chain of small transforms (Chen et al. 2021; MindSpore's ``nn.thor``).

One step of one weight, in this order::

    g = (dL/dW) / loss_scale
    U = G_d^-1 g A_d^-1            precondition; inverses from the last factor step
    U = U + weight_decay W         for names that satisfy decay_filter
    U = U min(1, 1 / |U|)          with enable_clip_grad, tensor by tensor
    m = momentum m + U
    W = W - lr m                   with use_nesterov: W - lr (U + momentum m)

and none of it where a gradient is not finite.
"""

from collections.abc import Callable, Sequence

from .options import MAX_DIM, Options, number_schedule
from .passes.layout import BiasRule, Fisher, Likelihood, LongSide, Sharing
from .precondition import precondition
from .refresh import DampingRule
from .schedule import Schedule, Value
from .transform import (
    Transform,
    add_decayed_weights,
    chain,
    clip_by_norm,
    heavy_ball,
    scale_by_learning_rate,
    skip_nonfinite,
)

CLIP_NORM = 1.0  # the reference's constant
DEFAULT_RULES = Options().rules


def thor(
    lr: Value,
    damping: Value,
    momentum: float,
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
    block_size: int | None = 128,
    sharing: Sharing = "expand",
    bias: BiasRule = "raw",
    max_dim: int | None = MAX_DIM,
    long_side: LongSide = "blocks",
    fisher: Fisher = "empirical",
    likelihood: Likelihood | None = None,
) -> Transform:
    """THOR as a pure transform, for :func:`thor_fx.compile_step`.

    Args:
        lr: learning rate: a number, a 0-D tensor, a 1-D tensor with one value per step (the last is
            held when the table runs out), or a callable ``step -> value``. Never recompiles.
        damping: ``lambda``, given like ``lr``.
        momentum: of the heavy ball, at least 0.
        weight_decay: added to the preconditioned gradient, so it passes through momentum and ``lr``.
        loss_scale: the caller multiplies the loss by it; it cancels here.
        batch_size: terms ``n`` that the loss averages over. None: the rows of the site nearest the
            loss, that is the batch for a classifier and batch x positions for a language model.
        use_nesterov: Nesterov's form of momentum.
        decay_filter: ``name -> bool``, which parameters decay; None: all.
        split_indices: groups of factors that are reduced together when training is distributed.
        enable_clip_grad: clip every update to L2 norm 1, tensor by tensor, after weight decay.
        frequency: factors and inverses are renewed in step 0 and every ``frequency`` steps.
        damping_rule: ``"factor"``, ``"sqrt"`` or ``"pi"``: :mod:`thor_fx.precondition`.
        block_size: side of THOR's diagonal blocks; None: whole factors.
        sharing: ``"expand"``: every position is a row; ``"reduce"``: the positions of one datum are
            averaged (``A``) and summed (``G``) first; or ``name of layer -> "expand" | "reduce"``.
        bias: ``"raw"``: a bias takes the first-order rule; ``"joint"``: it is one more column of its weight.
        max_dim: the longest side of a layer with a whole factor; None: no limit.
        long_side: what a longer side keeps: ``"blocks"`` of ``block_size``, its ``"diagonal"``, or
            nothing (``"identity"``: the gradient is preconditioned from the other side only).
        fisher: where the rows of ``G`` come from: ``"empirical"``: from the gradients of the loss (free);
            ``"sampled"``: from labels drawn from the model's own predictive distribution (one more backward
            in a factor step); ``"exact"``: from all directions of a small output (one more for each):
            the generalised Gauss-Newton matrix. See ``docs/curvature.md``.
        likelihood: for the last two, of the model's output: ``"categorical"``, ``"bernoulli"``,
            ``"gaussian"``, a callable ``z -> dNLL/dz`` of drawn labels, or None: as read off the loss.

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
        fisher=fisher,
        likelihood=likelihood,
    )
    return skip_nonfinite(
        thor_chain(
            options,
            lr=Schedule("lr", lr),
            damping=Schedule("damping", damping),
            momentum=number_schedule("momentum", momentum),
            weight_decay=number_schedule("weight_decay", weight_decay),
        )
    )


def thor_chain(
    options: Options, *, lr: Schedule, damping: Schedule, momentum: Schedule, weight_decay: Schedule
) -> Transform:
    """The chain at the top of this module, without the guard against non-finite gradients."""
    links = [
        precondition(
            damping,
            damping_rule=options.damping_rule,
            block_size=options.block_size,
            loss_scale=options.loss_scale,
            batch_size=options.batch_size,
            frequency=options.frequency,
            rules=options.rules,
        ),
        add_decayed_weights(weight_decay, options.decays),
    ]
    if options.enable_clip_grad:
        links.append(clip_by_norm(CLIP_NORM))
    links.append(heavy_ball(momentum, nesterov=options.use_nesterov))
    links.append(scale_by_learning_rate(lr))
    return chain(*links)


def decay_all_but_beta_gamma(name: str) -> bool:
    """A ``decay_filter``: no weight decay for names that contain ``beta`` or ``gamma``.

    This is what the documentation of MindSpore's ``nn.thor`` promises and its code does not do.

    Example:
        >>> [name for name in ("fc.weight", "norm.gamma") if decay_all_but_beta_gamma(name)]
        ['fc.weight']
    """
    return "beta" not in name and "gamma" not in name
