"""What a user sees: ``python without_compiler.py BACKEND...`` prints a line for every door of each."""

import sys
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F

import thor_fx
from training import batches, build, classifier_loss, mlp

SETTINGS: dict[str, Any] = {"lr": 0.1, "damping": 0.1, "momentum": 0.9}


def told(what: Callable[[], Any]) -> None:
    try:
        what()
    except RuntimeError as error:
        print(f"{type(error).__name__}: {error}".replace("\n", " "))
    else:
        print("it works")


def main(backend: str) -> None:
    x, y = batches(1)[0]
    plain, collects = (thor_fx.compile(build(mlp), backend=backend) for _ in range(2))
    thor_fx.Thor(collects, **SETTINGS)
    told(lambda: plain(x))
    told(lambda: collects(x))
    model = thor_fx.compile(build(mlp), backend="aot_eager")
    optimizer = thor_fx.Thor(model, **SETTINGS, backend=backend)
    F.cross_entropy(model(x), y).backward()
    told(optimizer.step)
    step = thor_fx.compile_step(classifier_loss(model), thor_fx.thor(**SETTINGS), backend=backend)
    params = dict(model.named_parameters())
    told(lambda: step(params, step.init(params, x, y), x, y))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        main(name)
