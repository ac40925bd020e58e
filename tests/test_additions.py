"""Tables that are added to activations without a batch axis: their gradients look like those of weights."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import oracle
import thor_fx

X, Y = torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))
W, HEAD, TABLE = (torch.randn(size, dtype=torch.float64) for size in ((4, 4), (3, 4), (6, 4)))


def added_before_the_head(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """The gradient of the table is ``dz @ head``."""
    return (x @ p["w"].T + p["table"]) @ p["head"].T


def added_to_queries(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """The gradient of the table is ``dscores @ keys``, and keys are data."""
    q, k = x @ p["w"].T + p["table"], x.tanh()
    return (q @ k.T).softmax(-1) @ x @ p["head"].T


def subtracted(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return (p["table"].view(6, 4) - x @ p["w"].T) @ p["head"].T


CASES = [added_before_the_head, added_to_queries, subtracted]


def case(logits: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    params = {"w": W.clone(), "table": TABLE.clone(), "head": HEAD.clone()}
    return lambda p, x, y: F.cross_entropy(logits(p, x), y), params


@pytest.mark.parametrize("logits", CASES, ids=lambda logits: logits.__name__)
def test_the_table_takes_the_first_order_rule(logits):
    loss_fn, params = case(logits)
    report = thor_fx.explain(loss_fn, params, X, Y)
    assert set(report.coverage.layers) == {"w", "head"}
    assert report.terms == len(X)
    reason = report.coverage.fallback["table"]
    assert "added to activations" in reason or "over features and not over rows" in reason


@pytest.mark.parametrize("logits", CASES, ids=lambda logits: logits.__name__)
def test_the_layers_keep_their_factors(logits):
    loss_fn, params = case(logits)
    found = thor_fx.factors(loss_fn, params, X, Y)
    assert oracle.relative_error(found["w"].A, X.T @ X / len(X)) < 1e-12
    assert found["w"].n == len(Y)


def test_a_table_in_front_of_a_weight_is_data_to_it():
    """``W`` multiplies the table alone: its rows are the table's."""
    loss_fn, params = case(lambda p, x: (p["table"] @ p["w"].T + x).tanh() @ p["head"].T)
    found = thor_fx.factors(loss_fn, params, X, Y)
    assert oracle.relative_error(found["w"].A, TABLE.T @ TABLE / len(TABLE)) < 1e-12
    assert set(found) == {"w", "head"}
