"""Stacks of random factors for the methods of inversion, and the dense matrices that they stand for."""

import itertools
from typing import Any

import torch
from torch import Tensor

import oracle
from thor_fx.inverses import METHODS, Method, Stack
from thor_fx.inverses.attempts import GOOD
from thor_fx.layers import Layer
from thor_fx.passes.sides import Side

BLOCK, LAYERS = 3, 2
LAMBDA = torch.tensor(0.2, dtype=torch.float64)
TERMS = torch.tensor(7.0, dtype=torch.float64)

KINDS: dict[str, tuple[Side, Side]] = {  # output, input
    "dense": (Side(3), Side(2)),
    "cut": (Side(5), Side(7)),
    "one size": (Side(3), Side(6)),
    "blocks": (Side(4, "blocks", 2), Side(7, "blocks", 3)),
    "embedding": (Side(4), Side(6, "diagonal")),
    "diagonals": (Side(4, "diagonal"), Side(5, "diagonal")),
    "one side": (Side(4, "identity"), Side(5)),
    "no side": (Side(4, "identity"), Side(3, "identity")),
}


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def layer(output: Side, input_: Side) -> Layer:
    return Layer("w", "w", input_, output, (), (), uses=1, rows="1")


def factor(seed: int, side: Side, layers: int = LAYERS) -> Tensor | None:
    """Random factors of a side: (layers, *side.shape)."""
    x = random(seed, layers, side.dim + 2, side.dim)
    gram = x.mT @ x / side.dim
    if side.kind == "identity":
        return None
    if side.kind == "mean":
        return x[:, 0]
    if side.kind == "diagonal":
        return gram.diagonal(dim1=1, dim2=2).clone()
    if side.kind == "dense":
        return gram
    padded = torch.nn.functional.pad(gram, (0, -side.dim % side.block) * 2)
    starts = range(0, padded.shape[-1], side.block)
    return torch.stack([padded[:, i : i + side.block, i : i + side.block] for i in starts], 1)


def dense(value: Tensor | None, side: Side, block_size: int | None = BLOCK) -> Tensor:
    """The matrix that the factor of one layer stands for: (d, d)."""
    if value is None:
        return torch.eye(side.dim, dtype=torch.float64)
    if side.kind == "mean":
        return torch.outer(value, value)
    if side.kind == "diagonal":
        return torch.diag(value)
    if side.kind == "blocks":
        return torch.block_diag(*value)[: side.dim, : side.dim]
    of_index = torch.arange(side.dim) // (block_size or side.dim)
    return value * (of_index[:, None] == of_index[None, :])


def sides_for(name: str, kinds: tuple[Side, Side]) -> tuple[Side, Side]:
    """The sides of a method: Eva's are means."""
    if name != "eva":
        return kinds
    return Side(kinds[0].dim, "mean"), Side(kinds[1].dim, "mean")


def constant(damp_a: Any, damp_g: Any) -> Any:
    """A damping rule that gives the same in every call."""
    return lambda _pair, _layer: (damp_a, damp_g)


class Stacked:
    """A method with random factors for the layers of one kind.

    Attributes:
        state: before any refresh.
        stack: what the first refresh is given.
        gradients: (L, out, in).
    """

    def __init__(self, name: str, kinds: str | tuple[Side, Side] = "cut", seed: int = 1) -> None:
        self.method: Method = METHODS[name]
        self.output, self.input = sides_for(name, KINDS[kinds] if isinstance(kinds, str) else kinds)
        self.layer = layer(self.output, self.input)
        self.state = self.method.init(LAYERS, (self.input, self.output), BLOCK, LAMBDA)
        self.never = torch.zeros(
            LAYERS, self.method.units((self.input, self.output), BLOCK), dtype=torch.int64
        )
        self.stack = self.measured(seed)
        self.gradients = random(99, LAYERS, self.output.dim, self.input.dim)

    def measured(self, seed: int, state: Any = None) -> Stack:
        pair = factor(seed, self.input), factor(seed + 50, self.output)
        return Stack(self.layer, pair, self.state if state is None else state, self.never)

    def refresh(self, stack: Stack | None = None, damping: Any = None) -> tuple[Any, int]:
        """The state, and how many blocks have failed."""
        state, outcomes = self.attempt(stack, damping)
        return state, int((outcomes != GOOD).sum())

    def attempt(self, stack: Stack | None = None, damping: Any = None) -> tuple[Any, Tensor]:
        """The state, and how the attempts have ended, (L, U)."""
        damping = damping or constant(LAMBDA, LAMBDA)
        (state,), (outcomes,) = self.method.refresh([self.stack if stack is None else stack], damping, BLOCK)
        return state, outcomes

    def apply(self, state: Any, gradients: Tensor | None = None, lam: Tensor = LAMBDA) -> Tensor:
        return self.method.apply(state, self.gradients if gradients is None else gradients, TERMS, lam)[0]

    def solve(self, damp_a: Tensor, damp_g: Tensor) -> Tensor:
        """Both factors damped, by dense solves."""
        pairs = list(self.matrices())
        found = [
            oracle.natural_step(A, G, g, a, d)
            for (A, G), g, a, d in zip(pairs, self.gradients, damp_a, damp_g, strict=True)
        ]
        return torch.stack(found)

    def solve_jointly(self, lam: Tensor = LAMBDA) -> Tensor:
        """``(A (x) G + lambda I)^-1``, by dense solves."""
        found = []
        for (A, G), g in zip(self.matrices(), self.gradients, strict=True):
            block = oracle.kronecker(G, A) + lam * torch.eye(g.numel(), dtype=g.dtype)
            found.append(torch.linalg.solve(block, g.flatten()).view_as(g))
        return torch.stack(found)

    def matrices(self) -> list[tuple[Tensor, Tensor]]:
        """``A`` and ``G`` of every layer, dense."""
        a, g = self.stack.factors
        of = [[None] * LAYERS if v is None else list(v) for v in (a, g)]
        return [(dense(one, self.input), dense(other, self.output)) for one, other in zip(*of, strict=True)]


def tensors(state: Any) -> list[Tensor]:
    return list(itertools.chain.from_iterable(state))
