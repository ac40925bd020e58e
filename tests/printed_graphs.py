"""A script: the code of every graph that both doors compile for a model of many kinds of layer, as JSON."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import thor_fx
from thor_fx import compiled_update, factor_graphs, stacked_updates, step

SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "averages": {"factor_decay": 0.9, "refresh": thor_fx.Staggered(2), "inverse": "ekfac"},
    "drawn": {"fisher": "sampled", "likelihood": "categorical", "step_norm": "orthogonal", "block_size": 4},
    "adamw": {"fallback": "adamw", "step_norm": "adam", "bias": "joint", "kl_clip": 1e-3},
}


class Mixed(nn.Module):
    """Layers, norms, a table and bare parameters, several of each."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.norms = nn.ModuleList(nn.LayerNorm(6) for _ in range(3))
        self.linears = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.scales = nn.ParameterList(torch.ones(6) for _ in range(3))
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(self.table(x).mT).mT
        for norm, linear, scale in zip(self.norms, self.linears, self.scales, strict=True):
            h = h + linear(norm(h)).tanh() * scale
        return self.head(h).flatten(0, 1)


def printing(compiler: Callable[..., Any], printed: list[str]) -> Callable[..., Any]:
    def compile_(gm: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        printed.append(gm.code)
        return compiler(gm, *args, **kwargs)

    return compile_


def printing_joint(compiler: Callable[..., Any], printed: list[str]) -> Callable[..., Any]:
    def compile_(forward: fx.GraphModule, inputs: Any, joint_pass: Callable[..., None], **kwargs: Any) -> Any:
        def pass_(gm: fx.GraphModule, **given: Any) -> None:
            joint_pass(gm, **given)
            printed.append(gm.code)

        return compiler(forward, inputs, pass_, **kwargs)

    return compile_


def batch() -> tuple[Tensor, Tensor]:
    return torch.arange(12).view(2, 6) % 7, torch.arange(12) % 5


def by_drop_in(settings: Mapping[str, Any]) -> None:
    model = thor_fx.compile(Mixed(), backend="aot_eager")
    optimizer = thor_fx.Thor(model, lr=0.1, damping=1.0, momentum=0.9, frequency=2, **settings)
    x, y = batch()
    for _ in range(3):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def by_function(settings: Mapping[str, Any]) -> None:
    model = Mixed()

    def loss_fn(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, params, (x,)), y)

    tx = thor_fx.thor(lr=0.1, damping=1.0, momentum=0.9, frequency=2, **settings)
    run = thor_fx.compile_step(loss_fn, tx, backend="aot_eager")
    params = dict(model.named_parameters())
    state = run.init(params, *batch())
    for _ in range(3):
        params, state, _ = run(params, state, *batch())


def main() -> None:
    printed: list[str] = []
    stacked_updates.FEWEST = 2  # parameters of one shape
    for module in (compiled_update, step):
        module.compile_graph = printing(module.compile_graph, printed)
    factor_graphs.compile_differentiable = printing_joint(factor_graphs.compile_differentiable, printed)
    found = {}
    for name, settings in SETTINGS.items():
        for door in (by_drop_in, by_function):
            torch.manual_seed(0)
            printed.clear()
            door(settings)
            found[f"{door.__name__}, {name}"] = list(printed)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
