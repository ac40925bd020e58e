"""Weights of which a mask picks rows: how many there are, only the data know."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import thor_fx
from training import (
    CLASSES,
    IN,
    assert_moved,
    assert_same,
    batches,
    build,
    by_both_doors,
    by_functional_door,
    classifier_loss,
    snapshot,
)

SETTINGS: dict[str, Any] = {"lr": 0.05, "damping": 0.1, "momentum": 0.9, "frequency": 2}
BREAKS = pytest.mark.filterwarnings(  # Dynamo's, where it takes up a graph with a computed tensor
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)
MASK = torch.tensor([True, False, True, True, False, True])


class Picked(nn.Module):
    """Some rows of ``rows`` multiply the input; which, a buffer says or the input itself."""

    def __init__(self, by_data: bool) -> None:
        super().__init__()
        self.rows, self.head = nn.Parameter(torch.randn(len(MASK), IN)), nn.Linear(IN + 1, CLASSES)
        self.by_data = by_data
        self.register_buffer("mask", MASK.clone())

    def forward(self, x: Tensor) -> Tensor:
        mask = (x @ self.rows.detach().T).sum(0) > 0 if self.by_data else self.mask.bool()
        seen = (x @ self.rows[mask].T).sin().sum(-1, keepdim=True)
        return self.head(torch.cat([x, seen], -1))


@BREAKS
@pytest.mark.filterwarnings("ignore:no compiled graph uses the weights 'rows'")
@pytest.mark.parametrize("by_data", [False, True])
def test_both_doors_take_the_same_steps(by_data):
    trajectory = by_both_doors(lambda: build(lambda: Picked(by_data)), batches(5), 1e-10, **SETTINGS)
    assert_moved(trajectory, snapshot(dict(build(lambda: Picked(by_data)).named_parameters())))


def test_the_reason_names_the_mask():
    model = build(lambda: Picked(by_data=True))
    report = thor_fx.explain(classifier_loss(model), dict(model.named_parameters()), *batches(1)[0])
    assert set(report.coverage.layers) == {"head.weight"}
    reason, used = report.why("rows").split("\n")
    assert reason.startswith("first-order rule: its gradient is index_put <- ")
    assert reason.endswith("with a mask, no product of matrices")
    assert "seen = (x @ self.rows[mask].T)" in used


@BREAKS
def test_a_weight_that_is_used_between_graphs_has_a_place():
    """Dynamo breaks the graph at the mask, and eager code picks the rows."""
    model = thor_fx.compile(build(lambda: Picked(by_data=True)), backend="aot_eager")
    optimizer = thor_fx.Thor(model, **SETTINGS)
    (x, y), *_ = batches(1)
    nn.functional.cross_entropy(model(x), y).backward()
    with pytest.warns(UserWarning, match="no compiled graph uses the weights 'rows'"):
        optimizer.step()
    assert optimizer.coverage.fallback["rows"] == "no compiled graph uses it"
    assert optimizer.coverage.unused == ()


@pytest.mark.inductor
def test_a_compiled_step():
    data = batches(3)
    made = [build(lambda: Picked(by_data=True)) for _ in range(2)]
    expected = by_functional_door(made[0], data, **SETTINGS)
    assert_same(by_functional_door(made[1], data, backend="inductor", **SETTINGS), expected, rtol=1e-10)
