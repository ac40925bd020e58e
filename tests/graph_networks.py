"""Small networks for tests: written by hand, and of models whose phases are marked."""

import functools
from typing import Any

import networkx as nx
import torch
from torch import Tensor, nn
from torch.func import functional_call

import thor_fx
from thor_fx.graphs import Facts

WIDTH, WORDS, LAYERS = 8, 11, 3


def by_hand(**nodes: tuple[str, dict[str, Any]]) -> nx.DiGraph:
    """A network of nodes ``name=("its sources", its facts)``, in order; facts that are left out are none."""
    graph = nx.DiGraph()
    for name, (sources, given) in nodes.items():
        op = "call_function" if sources else "placeholder"
        facts = Facts(
            op=op, operator=name, shape=(), dtype=torch.float32, phase=None, site=None, module=None, flops=0,
            bytes=0, kernel=None, view=False, pointwise=False, descriptors=(),
        )  # fmt: skip
        graph.add_node(name, **{**facts, **given})
        graph.add_edges_from((source, name) for source in sources.split())
    return graph


class Block(nn.Module):
    """A layer of a small transformer without attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Net(nn.Module):
    """An embedding, equal blocks, and a head."""

    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@functools.cache
def network(layers: int = LAYERS) -> nx.DiGraph:
    """The factor step of :class:`Net`; not to be changed."""
    model, ids = Net(layers), torch.arange(6).reshape(2, 3)

    def loss_fn(params, ids):
        return functional_call(model, params, (ids,)).square().mean()

    return thor_fx.explain(loss_fn, dict(model.named_parameters()), ids).graph
