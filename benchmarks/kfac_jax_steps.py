"""Steps of kfac-jax, and of SGD in JAX, in a process of their own: torch is not imported here.

    python benchmarks/kfac_jax_steps.py MODEL THREADS SETTINGS

``kfac_jax_rows.py`` starts it and speaks with it in lines of JSON. The first line of the answer says how many
parameters the model has; then every number that is read is answered with the ms of as many steps. The end of
the input ends the process. ``SETTINGS`` is a JSON object: ``lr``, ``momentum``, ``damping``, ``frequency`` of
inverses, and of factors ``factor_frequency`` and ``factor_decay``; without ``damping``, SGD runs.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

Settings = dict[str, Any]
Step = Callable[[], Any]
"""Takes a step and returns its arrays, which may not be there yet."""


def main(name: str, threads: str, settings: str) -> None:
    answers = to_stdout_alone()
    limit_threads(int(threads))  # before JAX is imported
    import jax
    from kfac_jax_models import MODELS

    model, chosen = MODELS[name](), json.loads(settings)
    sizes = [leaf.size for leaf in jax.tree_util.tree_leaves(model.params)]
    say(answers, {"parameters": sum(sizes)})
    step = kfac(model, chosen) if "damping" in chosen else sgd(model, chosen)
    for line in sys.stdin:
        say(answers, [timed(step, jax.block_until_ready) for _ in range(int(line))])


def to_stdout_alone() -> TextIO:
    """Where answers go; what libraries print goes to stderr."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return answers


def limit_threads(count: int) -> None:
    """XLA has no number of threads to set: what holds is the number of cores."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
    if count == 1:
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    os.environ["JAX_PLATFORMS"] = "cpu"


def say(answers: TextIO, value: object) -> None:
    print(json.dumps(value), file=answers, flush=True)


def timed(step: Step, wait: Callable[[Any], Any]) -> float:
    start = time.perf_counter()
    wait(step())
    return 1e3 * (time.perf_counter() - start)


def loss_of(model: Any) -> Callable[[Any, Any], Any]:
    """The mean cross-entropy, registered with kfac-jax; means are over rows and, of text, positions."""
    import jax
    import jax.numpy as jnp
    import kfac_jax

    def loss(params: Any, batch: Any) -> Any:
        x, y = batch
        logits = model.logits(params, x)
        kfac_jax.register_softmax_cross_entropy_loss(logits, y, weight=len(y) / y.size)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), y[..., None], -1)
        return -chosen.mean()

    return loss


def sgd(model: Any, settings: Settings) -> Step:
    import jax

    lr, momentum = settings["lr"], settings["momentum"]
    gradient = jax.value_and_grad(loss_of(model))

    def update(params: Any, moving: Any, batch: Any) -> Any:
        loss, gradients = gradient(params, batch)
        moving = jax.tree_util.tree_map(lambda m, g: momentum * m + g, moving, gradients)
        return jax.tree_util.tree_map(lambda p, m: p - lr * m, params, moving), moving, loss

    compiled = jax.jit(update, donate_argnums=(0, 1))
    params = jax.tree_util.tree_map(jax.numpy.array, model.params)
    state = [params, jax.tree_util.tree_map(jax.numpy.zeros_like, params)]

    def step() -> Any:
        *state[:], loss = compiled(*state, model.batch)
        return *state, loss

    return step


def kfac(model: Any, settings: Settings) -> Step:
    import jax
    import jax.numpy as jnp
    import kfac_jax

    optimizer = kfac_jax.Optimizer(
        jax.value_and_grad(loss_of(model)),
        l2_reg=0.0,
        num_burnin_steps=0,
        estimation_mode="fisher_empirical",
        curvature_ema=settings["factor_decay"],
        curvature_update_period=settings["factor_frequency"],
        inverse_update_period=settings["frequency"],
    )
    key = jax.random.PRNGKey(0)
    numbers = {name: jnp.asarray(settings[short]) for name, short in NAMES.items()}
    params = jax.tree_util.tree_map(jnp.array, model.params)
    state = [params, optimizer.init(params, key, model.batch)]
    count = 0

    def step() -> Any:
        nonlocal count
        *state[:], _ = optimizer.step(*state, key, batch=model.batch, global_step_int=count, **numbers)
        count += 1
        return state

    return step


NAMES = {"learning_rate": "lr", "momentum": "momentum", "damping": "damping"}
"""Of arguments of its step, by ours."""


if __name__ == "__main__":
    main(*sys.argv[1:])
