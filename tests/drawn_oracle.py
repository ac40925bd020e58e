"""What drawn models compute, by hooks, and as a loss function for the functional door."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.func import functional_call

from drawn_models import Drawn, build_drawn, loss_of
from hooks import factors_by_hooks, uses_by_hooks
from oracle import Pair, relative_error


def loss_fn_of(drawn: Drawn) -> Any:
    model = build_drawn(drawn)

    def loss_fn(params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return loss_of(drawn, *functional_call(model, dict(params), (x,)))

    return loss_fn


def trained(drawn: Drawn) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in build_drawn(drawn).named_parameters() if p.requires_grad}


def by_hooks(drawn: Drawn, x: Tensor) -> tuple[dict[str, Pair], int]:
    """The factors of every weight that has a gradient, and the terms of the loss."""
    model, terms = build_drawn(drawn, plainly=True), []

    def loss() -> Tensor:
        scores, features = model(x)
        terms.append(len(scores))
        return loss_of(drawn, scores, features)

    uses = uses_by_hooks(model, loss)
    (n,) = terms
    scale = n**2 if drawn.reduction == "sum" else 1
    pairs = {name: factors_by_hooks(found, n) for name, found in uses.items()}
    return {name: pair._replace(G=pair.G / scale) for name, pair in pairs.items()}, n


def assert_found(found: Mapping[str, Any], expected: Mapping[str, Pair], n: int) -> None:
    assert found.keys() == expected.keys()
    for name, pair in expected.items():
        ours = found[name]
        assert (ours.rows, ours.n) == (pair.rows, n), name
        for one, other in ((ours.A, pair.A), (ours.G, pair.G)):
            assert one.shape == other.shape, name
            assert relative_error(one, other) < 1e-10, name
