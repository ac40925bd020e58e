"""Train a small net through both doors with Inductor, and print what its caches have done, as JSON."""

import json

import torch.nn.functional as F
from torch._dynamo.utils import counters

import thor_fx
from training import batches, build, by_functional_door, mlp

SETTINGS = {"lr": 0.1, "damping": 0.1, "momentum": 0.9, "frequency": 2}


def drop_in() -> None:
    model = thor_fx.compile(build(mlp))
    optimizer = thor_fx.Thor(model, **SETTINGS)
    for x, y in batches(2):  # a factor step, a plain step
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def functional() -> None:
    by_functional_door(build(mlp), batches(2), backend="inductor", **SETTINGS)


def cached(train) -> dict[str, int]:
    """How often Inductor's cache of graphs and AOTAutograd's were asked, with what result."""
    counters.clear()
    train()
    return {
        f"{prefix}_{result}": counters[source][f"{prefix}_cache_{result}"]
        for source, prefix in (("inductor", "fxgraph"), ("aot_autograd", "autograd"))
        for result in ("hit", "miss", "bypass")
    }


if __name__ == "__main__":
    print(json.dumps({"drop-in": cached(drop_in), "functional": cached(functional)}))
