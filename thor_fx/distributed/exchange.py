"""Inverses that one rank computes and all get.

Layers are dealt out by the operations of their refresh, the dearest first, each to the rank with the least so
far (Graham 1969: at most 4/3 of the best).
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..inverses import METHODS, Inverse, State, Work, replace, select
from ..layers import Layer
from ..refresh import spans
from ..refresh_rules import dealt
from .collectives import World, wait
from .inverse_packing import packed, packed_numbers, unpacked
from .packing import by_dtype, joined, parted

Groups = Mapping[str, Sequence[Layer]]


@dataclass(frozen=True)
class Exchange:
    """Layers that are inverted by one rank each.

    Attributes:
        world: the ranks.
        inverse: the method of inversion.
        block_size: of the blocks that are inverted; None: whole.
    """

    world: World
    inverse: Inverse
    block_size: int | None

    def operations(self, layers: Mapping[str, Layer]) -> dict[str, Work]:
        """What every layer takes."""
        method = METHODS[self.inverse]
        return {name: method.work(layer, self.block_size) for name, layer in layers.items()}

    def numbers(self, layers: Mapping[str, Layer]) -> int:
        """How many numbers are sent of the inverses of all layers."""
        method = METHODS[self.inverse]
        return sum(packed_numbers(method, layer, self.block_size) for layer in layers.values())

    def owners(self, layers: Mapping[str, Layer]) -> dict[str, int]:
        """The rank that inverts every layer."""
        costs = {name: work.refresh_flops for name, work in self.operations(layers).items()}
        return {name: rank for rank, hand in enumerate(dealt(costs, self.world.size)) for name in hand}

    def mine(self, layers: Mapping[str, Layer]) -> frozenset[str]:
        """The layers of this rank."""
        return frozenset(n for n, rank in self.owners(layers).items() if rank == self.world.rank)

    def renewed(
        self,
        invert: Callable[[Collection[str]], tuple[dict[str, State], dict[str, Tensor]]],
        states: Mapping[str, State],
        failing: Mapping[str, Tensor],
        groups: Groups,
        wanted: Collection[str],
    ) -> tuple[dict[str, State], dict[str, Tensor]]:
        """The states after a refresh that ranks share, and how the attempts of all of them have ended.

        Args:
            invert: refreshes some layers.
            states: of all layers, by shape.
            failing: how often every block has failed in a row, (L, U), by shape.
            groups: the layers, by shape.
            wanted: those to refresh.
        """
        mine = self.mine({layer.name: layer for layers in groups.values() for layer in layers})
        own = mine.intersection(wanted)
        renewed, ended = invert(own) if own else (dict(states), {})
        outcomes = [ended.get(key, torch.zeros_like(before)) for key, before in failing.items()]
        total = self.world.sum(joined(outcomes, torch.int8))  # one rank has tried each
        everybodys = parted(wait(total), outcomes)
        return self.inverses(renewed, groups, wanted), dict(zip(failing, everybodys, strict=True))

    def inverses(
        self, states: Mapping[str, State], groups: Groups, wanted: Collection[str]
    ) -> dict[str, State]:
        """All states, where every rank has renewed those of its own layers.

        Args:
            states: of all layers, by shape.
            groups: the layers, by shape.
            wanted: those that have been inverted, by one rank or another.
        """
        owners = self.owners({layer.name: layer for layers in groups.values() for layer in layers})
        hands: list[dict[str, list[bool]]] = []
        for owner in range(self.world.size):
            flags = {
                key: [layer.name in wanted and owners[layer.name] == owner for layer in layers]
                for key, layers in groups.items()
            }
            hands.append({key: present for key, present in flags.items() if any(present)})
        places = {key: spans(list(layers)) for key, layers in groups.items()}
        owned = [{key: select(states[key], places[key], here[key]) for key in here} for here in hands]
        method = METHODS[self.inverse]
        sent = self.broadcast([packed(method, own) for own in owned])
        new = dict(states)
        for here, own, numbers in zip(hands, owned, sent, strict=True):
            arrived = unpacked(method, numbers, own)
            for key, present in here.items():
                new[key] = replace(new[key], places[key], present, arrived[key])
        return new

    def broadcast(self, sent: Sequence[Any]) -> list[Any]:
        """What each rank has at its place of a list of nests of tensors; all of them travel together."""
        kinds = [by_dtype(pytree.tree_leaves(nest)) for nest in sent]
        started = [
            {dtype: self.world.broadcast(joined(tensors), owner) for dtype, tensors in kind.items()}
            for owner, kind in enumerate(kinds)
        ]
        found = []
        for nest, kind, flats in zip(sent, kinds, started, strict=True):
            arrived = {dtype: iter(parted(wait(flat), kind[dtype])) for dtype, flat in flats.items()}
            found.append(pytree.tree_map(partial(_next_of, arrived), nest))
        return found


def _next_of(arrived: Mapping[torch.dtype, Iterator[Tensor]], like: Tensor) -> Tensor:
    return next(arrived[like.dtype])
