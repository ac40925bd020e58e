"""What one step of the drop-in door collects under ``fisher="exact"``."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import thor_fx
from estimators import (
    LOSSES,
    C,
    N,
    WithLoss,
    assert_pairs,
    batches,
    collected,
    make,
    watched,
    whole,
)

BOTH = pytest.mark.parametrize("likelihood", LOSSES)


@BOTH
def test_micro_batches_are_one_batch(likelihood):
    """NOTE: why cotangents are those of single terms: sums over micro-batches need no factor of their own."""
    x, y = batches(1)[0]
    y = y.clamp(min=0)
    loss, model = LOSSES[likelihood], watched(likelihood)
    for part in (slice(0, 2), slice(2, N)):
        share = (part.stop - part.start) / N
        (share * loss(model(x[part]), y[part])).backward()
    assert_pairs(collected(model), whole(loss, x, y))


@BOTH
def test_two_forward_calls_in_one_backward(likelihood):
    (x, y), (x2, y2) = batches(2)
    y, y2 = y.clamp(min=0), y2.clamp(min=0)
    loss, model = LOSSES[likelihood], watched(likelihood)
    ((loss(model(x), y) + loss(model(x2), y2)) / 2).backward()
    assert_pairs(collected(model), whole(loss, torch.cat([x, x2]), torch.cat([y, y2])))


def test_masked_rows_are_those_whose_tangent_is_zero():
    x, y = batches(1)[0]
    model = watched("categorical")
    F.cross_entropy(model(x), y).backward()
    assert_pairs(collected(model), whole(F.cross_entropy, x, y))
    assert int((y == -100).sum()) == 1


def test_a_language_model_with_its_loss_outside():
    """Logits (B, T, V), flattened by the loss."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 5)

        def forward(self, ids):
            h = self.embed(ids)
            return self.head((h @ h.mT).softmax(-1) @ h)

    ids, labels = torch.tensor([[1, 2], [3, 1], [6, 0]]), torch.tensor([[0, 4], [-100, 1], [2, 2]])

    def loss(z, labels):
        return F.cross_entropy(z.flatten(0, 1), labels.flatten())

    model = watched("categorical", Tokens().double())
    loss(model(ids), labels).backward()
    plain = Tokens().double()
    expected = thor_fx.factors(
        lambda p, i, y: loss(functional_call(plain, p, (i,)), y), dict(plain.named_parameters()), ids, labels,
        fisher="exact",
    )  # fmt: skip
    assert_pairs(collected(model), expected)


def test_images_with_their_loss_outside():
    torch.manual_seed(0)
    x, y = torch.randn(2, 2, 3, 3, dtype=torch.float64), torch.randint(C, (2, 2, 2))
    net = nn.Conv2d(2, C, 2, bias=False).double()
    expected = thor_fx.factors(
        lambda p, x, y: F.cross_entropy(functional_call(net, p, (x,)), y), dict(net.named_parameters()), x, y,
        fisher="exact",
    )  # fmt: skip
    model = watched("categorical", net)
    F.cross_entropy(model(x), y).backward()
    assert_pairs(collected(model), expected)


def test_a_name_where_the_model_returns_a_loss_that_is_not_recognised():
    """The gradient of the logits that it returns besides is zero, and must not count as their cotangent."""
    x, y = batches(1)[0]
    y = y.clamp(min=0)
    model = watched("categorical", WithLoss(make(), lambda z, y: F.cross_entropy(z, y).square()))
    model(x, y)[0].backward()
    found = {name.removeprefix("net."): pair for name, pair in collected(model).items()}
    assert_pairs(found, whole(F.cross_entropy, x, y))


@pytest.mark.inductor
def test_a_model_that_returns_its_loss_under_inductor():
    """Its joint graph is decomposed, and the gradient that the loss is given is an input of it."""
    x, y = batches(1)[0]
    loss = LOSSES["gaussian"]
    model = watched(None, WithLoss(make(), loss), backend="inductor")
    (32 * model(x, y)[0]).backward()
    found = {name.removeprefix("net."): pair for name, pair in collected(model).items()}
    assert_pairs(found, whole(loss, x, y))
