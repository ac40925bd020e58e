"""Drawn models through both doors: the steps of a slow eager optimizer, and gradients as without us."""

from typing import Any

import pytest
import torch
from hypothesis import example, given
from torch import Tensor, nn

import thor_fx
from drawn_models import Drawn, build_drawn, drawn_models, inputs_of, loss_of, told
from drawn_oracle import assert_found, by_hooks, loss_fn_of, trained
from eager_thor import errors
from profiles import examples
from slow_thor import SlowThor
from thor_fx.compile import collector_of
from training import Parameters, snapshot

# plain torch.compile, too, makes torch 2.13 warn about the tensors between two graphs
pytestmark = [
    pytest.mark.fuzz,
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:a factor step found no factors"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
]

SETTINGS: dict[str, Any] = {"lr": 0.05, "damping": 0.1, "momentum": 0.9}
FREQUENCY, STEPS = 2, 3  # steps with factors, without, and with


def slowly(drawn: Drawn, terms: int) -> Parameters:
    model = build_drawn(drawn, plainly=True)
    slow = SlowThor(model, FREQUENCY, **SETTINGS)
    scale = terms if drawn.reduction == "sum" else 1
    for seed in range(STEPS):
        x = inputs_of(drawn, seed)
        slow.backward(lambda x=x: loss_of(drawn, *model(x)) / scale, terms)
        slow.step()
        slow.zero_grad(to_none=True)
    return snapshot(dict(model.named_parameters()))


def by_step(drawn: Drawn, given: dict[str, Any]) -> Parameters:
    tx = thor_fx.thor(**SETTINGS, **given, frequency=FREQUENCY)
    step = thor_fx.compile_step(loss_fn_of(drawn), tx, backend="eager")
    params: Any = trained(drawn)
    state = step.init(params, inputs_of(drawn))
    for seed in range(STEPS):
        params, state, _ = step(params, state, inputs_of(drawn, seed))
    return params


def by_drop_in(drawn: Drawn, given: dict[str, Any]) -> Parameters:
    model = thor_fx.compile(build_drawn(drawn), backend="aot_eager")
    optimizer = thor_fx.Thor(model, **SETTINGS, **given, frequency=FREQUENCY)
    assert_like_torch(drawn, model)
    optimizer.zero_grad()
    for seed in range(STEPS):
        loss_of(drawn, *model(inputs_of(drawn, seed))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return snapshot(dict(model.named_parameters()))


def assert_like_torch(drawn: Drawn, model: nn.Module) -> None:
    """Loss and gradients of a pass with factors, and of one without, are those of ``torch.compile``."""
    plain = torch.compile(build_drawn(drawn), backend="aot_eager")
    expected = _pass(drawn, plain)
    collector = collector_of(model)
    for wanted in (True, False):
        collector.wanted = wanted
        found = _pass(drawn, model)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    collector.wanted = True


def _pass(drawn: Drawn, model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    loss = loss_of(drawn, *model(inputs_of(drawn)))
    loss.backward()
    names = ((name.removeprefix("_orig_mod."), p.grad) for name, p in model.named_parameters())
    return {"loss": loss.detach(), **{name: grad for name, grad in names if grad is not None}}


def assert_near(found: Parameters, expected: Parameters) -> None:
    worst = errors(found, {name: p for name, p in expected.items() if name in found})
    assert max(worst.values()) < 1e-9, worst


def assert_doors(drawn: Drawn) -> None:
    torch._dynamo.reset()
    x = inputs_of(drawn)
    pairs, n = by_hooks(drawn, x)
    given = told(drawn, n)
    assert_found(thor_fx.factors(loss_fn_of(drawn), trained(drawn), x, **given), pairs, n)
    expected = slowly(drawn, n)
    assert_near(by_step(drawn, given), expected)
    assert_near(by_drop_in(drawn, given), expected)


FEATURES_NEARER_THAN_THE_HEAD = Drawn("sequence", (4, 2), (("recurrent", 2, 2, False),), 3, head="turned")
"""Views lie between the head and the loss, and none between the loss and what the model returns besides."""

SOFTPLUS = ("moved", (("linear", 2, 2, False, "tensordot"), ("act", "softplus")), 0, 1)
STRIDES_UNFORESEEN = Drawn("sequence", (4, 2), (SOFTPLUS,), 2, loss="mse", head="turned")


@examples(ci=8, nightly=300)
@given(drawn_models())
@example(FEATURES_NEARER_THAN_THE_HEAD)
@example(STRIDES_UNFORESEEN)
def test_both_doors_of_any_model(drawn):
    assert_doors(drawn)
