"""``Thor`` is a ``torch.optim.Optimizer`` in every respect."""

import copy
import functools
import io
import pickle
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import thor_fx
from training import (
    CLASSES,
    MODELS,
    Batch,
    Parameters,
    assert_moved,
    assert_same,
    batches,
    build,
    by_drop_in_door,
    by_functional_door,
    classifier_loss,
    compiled,
    identical,
    mlp,
    snapshot,
    train,
    unfreezes,
)

SETTINGS: dict[str, Any] = {"lr": 0.05, "damping": 0.1, "momentum": 0.9, "frequency": 3}
FIRST, SECOND = ("0.weight", "0.bias"), ("2.weight", "2.bias")


def thor(model: nn.Module, **settings: Any) -> thor_fx.Thor:
    return thor_fx.Thor(model, **{**SETTINGS, **settings})


def one_step(model: nn.Module, optimizer: thor_fx.Thor, batch: Batch) -> Parameters:
    return train(model, optimizer, [batch])[0]


def reference(steps: int, **settings: Any) -> list[Parameters]:
    """The functional door, in which tables stand for what schedulers and users do by hand."""
    return by_functional_door(build(mlp), batches(steps), **{**SETTINGS, **settings})


# --- groups --------------------------------------------------------------------------------------------


def test_it_is_a_torch_optimizer():
    model = compiled()
    optimizer = thor(model, weight_decay=0.01)
    assert isinstance(optimizer, torch.optim.Optimizer)
    (group,) = optimizer.param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]
    shown = {name: group[name] for name in ("lr", "damping", "momentum", "weight_decay")}
    assert shown == {"lr": 0.05, "damping": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    assert "lr: 0.05" in repr(optimizer)


def test_a_table_shows_its_value_in_the_group():
    model, table = compiled(), torch.tensor([0.5, 0.25, 0.125])
    optimizer = thor(model, lr=table)
    shown = []
    for batch in batches(3):
        one_step(model, optimizer, batch)
        shown.append(optimizer.param_groups[0]["lr"])
    assert shown == table.tolist()


def two_groups(model: nn.Module, **second: Any) -> list[Parameters]:
    optimizer = thor(model, params=[{"params": list(SECOND), **second}])
    assert len(optimizer.param_groups) == 2
    return train(model, optimizer, batches(7))


@pytest.mark.parametrize(
    "setting",
    [
        {"lr": 0.01},
        {"momentum": 0.0},
        {"weight_decay": 0.3},
        {"damping": 1.0},
        {"lr": torch.linspace(0.1, 0.01, 7)},
        {"damping": lambda step: 1.0 / (1 + step), "momentum": 0.5},
    ],
    ids=["lr", "momentum", "weight_decay", "damping", "table", "callable"],
)
def test_every_group_has_its_own_settings(setting):
    """In the first step, whose gradients know nothing of settings, each layer moves as if it were alone."""
    split = two_groups(compiled(), **setting)
    assert_moved(split, snapshot(dict(build(mlp).named_parameters())))
    plain, (changed,) = in_one_group(), reference(1, **setting)
    for names, alone in ((FIRST, plain[0]), (SECOND, changed)):
        assert_same([{name: split[0][name] for name in names}], [{name: alone[name] for name in names}])
    assert any(not torch.equal(split[-1][name], plain[-1][name]) for name in SECOND)


@functools.cache
def in_one_group() -> list[Parameters]:
    return reference(7)


def test_two_groups_by_hand():
    """The whole trajectory, against two functional updates of the same gradients."""
    model, data = compiled(), batches(7)
    optimizer = thor(model, params=[{"params": list(SECOND), "lr": 0.01, "momentum": 0.5}])
    found = train(model, optimizer, data)
    twin = build(mlp)
    params = snapshot(dict(twin.named_parameters()))
    steps, states = [], []
    for own in ({}, {"lr": 0.01, "momentum": 0.5}):
        step = thor_fx.compile_step(
            classifier_loss(twin), thor_fx.thor(**{**SETTINGS, **own}), backend="eager", donate=False
        )
        steps.append(step)
        states.append(step.init(params, *data[0]))
    for batch, expected in zip(data, found, strict=True):
        results = []
        for i in range(2):
            new, states[i], _ = steps[i](params, states[i], *batch)
            results.append(new)
        params = {name: results[name in SECOND][name] for name in params}
        assert_same([params], [expected])


def test_groups_that_are_alike_are_one_group():
    assert_same(two_groups(compiled()), in_one_group())


def test_members_may_be_tensors_or_names():
    by_name, by_tensor = compiled(), compiled()
    optimizer = thor(by_tensor, params=[{"params": by_tensor[2].parameters(), "lr": 0.01}])
    assert_same(train(by_tensor, optimizer, batches(7)), two_groups(by_name, lr=0.01))


@unfreezes
def test_groups_added_later():
    """Train the head, then unfreeze the body."""
    model, data = compiled(), batches(10)
    model[0].requires_grad_(False)
    optimizer = thor(model)
    frozen = snapshot(model[0].state_dict())
    train(model, optimizer, data[:4])
    assert identical(model[0].state_dict(), frozen)
    momentum = {id(p): optimizer.state[p]["momentum"].clone() for p in model[2].parameters()}
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.01})
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2]
    for p in model[2].parameters():
        assert torch.equal(optimizer.state[p]["momentum"], momentum[id(p)])
    before = snapshot(dict(model.named_parameters()))
    trajectory = train(model, optimizer, data[4:])
    assert_moved(trajectory[2:], trajectory[1])
    assert not torch.equal(trajectory[0]["2.weight"], before["2.weight"])
    assert sorted(optimizer.coverage.layers) == ["0.weight", "2.weight"]
    assert optimizer.metrics().items() >= {"skipped_steps": 0, "failed_inverses": 0}.items()


class WithConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(1, 2, 3), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x[:, None]).tanh().flatten(1))


def test_gradients_of_a_group_are_centralized():
    model = compiled(WithConvolution)
    optimizer = thor(model, momentum=0.0, params=[{"params": "conv.weight", "grad_centralization": True}])
    for x, y in batches(4):
        before = model.conv.weight.detach().clone()
        F.cross_entropy(model(x), y).backward()
        gradient = model.conv.weight.grad.clone()
        optimizer.step()
        optimizer.zero_grad()
        moved = (model.conv.weight.detach() - before) / -SETTINGS["lr"]
        if "conv.weight" in optimizer.coverage.fallback:  # else it is preconditioned, too
            torch.testing.assert_close(moved, gradient - gradient.mean((1, 2), keepdim=True))
        assert not torch.allclose(moved, gradient)
    plain = by_drop_in_door(build(WithConvolution), batches(4), **{**SETTINGS, "momentum": 0.0})
    assert not torch.equal(model.conv.weight.detach(), plain[-1]["conv.weight"])


def test_only_gradients_of_convolutions_can_be_centralized():
    with pytest.raises(ValueError, match=r"grad_centralization=True .* '2\.weight'"):
        thor(compiled(), params=[{"params": "2.weight", "grad_centralization": True}])


# --- settings that change ------------------------------------------------------------------------------


def test_changing_settings_by_hand():
    model, optimizer_steps = compiled(), 7
    lr = torch.linspace(0.1, 0.01, optimizer_steps, dtype=torch.float64)
    damping = torch.linspace(0.5, 0.1, optimizer_steps, dtype=torch.float64)
    optimizer = thor(model)
    trajectory = []
    for step, batch in enumerate(batches(optimizer_steps)):
        optimizer.param_groups[0]["lr"] = lr[step].item()
        optimizer.param_groups[0]["damping"] = damping[step].item()
        trajectory.append(one_step(model, optimizer, batch))
    assert_same(trajectory, reference(optimizer_steps, lr=lr, damping=damping))


def test_learning_rate_as_a_tensor_in_the_group():
    model = compiled()
    optimizer = thor(model)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.2, dtype=torch.float64)
    assert_same(train(model, optimizer, batches(4)), reference(4, lr=0.2))


SCHEDULERS: dict[str, Callable[[thor_fx.Thor], Any]] = {
    "StepLR": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5),
    "LambdaLR": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "CosineAnnealingLR": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 7),
    "OneCycleLR": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.2, total_steps=8, cycle_momentum=False
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_learning_rate_schedulers(name):
    model, rates = compiled(), []
    optimizer = thor(model)
    scheduler = SCHEDULERS[name](optimizer)
    trajectory = []
    for batch in batches(7):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        trajectory.append(one_step(model, optimizer, batch))
        scheduler.step()
    assert len(set(rates)) > 2
    assert_same(trajectory, reference(7, lr=torch.tensor(rates, dtype=torch.float64)))


def test_a_scheduler_may_cycle_momentum():
    model, data = compiled(), batches(7)
    optimizer = thor(model)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=8)
    momentum, seen = torch.zeros(CLASSES, dtype=torch.float64), []
    bias = model[2].bias  # it takes the first-order rule: m = mu m + g
    for x, y in data:
        group = optimizer.param_groups[0]
        rate, mu = float(group["lr"]), float(group["momentum"])
        seen.append(mu)
        before = bias.detach().clone()
        F.cross_entropy(model(x), y).backward()
        momentum = mu * momentum + bias.grad
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(bias.detach(), before - rate * momentum, rtol=1e-12, atol=1e-14)
        scheduler.step()
    assert min(seen) < 0.9 < max(seen)


# --- the loop --------------------------------------------------------------------------------------------


def test_closures():
    model, losses = compiled(), []
    optimizer = thor(model)
    trajectory = []
    for x, y in batches(7):

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        losses.append(loss.item())
        trajectory.append(snapshot(dict(model.named_parameters())))
    assert_same(trajectory, in_one_group())
    x, y = batches(1)[0]
    assert losses[0] == pytest.approx(F.cross_entropy(build(mlp)(x), y).item(), rel=1e-12)


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad(to_none):
    model, data = compiled(), batches(7)
    optimizer = thor(model)
    trajectory = []
    for x, y in data:
        F.cross_entropy(model(2 * x), y).backward()  # thrown away, gradients and factors both
        optimizer.zero_grad(set_to_none=to_none)
        for p in model.parameters():
            assert p.grad is None if to_none else not p.grad.any()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=to_none)
        trajectory.append(snapshot(dict(model.named_parameters())))
    assert_same(trajectory, in_one_group())


def test_zero_grad_of_the_model_is_enough_between_steps():
    model = compiled()
    optimizer = thor(model)
    trajectory = []
    for x, y in batches(7):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        trajectory.append(snapshot(dict(model.named_parameters())))
    assert_same(trajectory, in_one_group())


def test_parameters_without_gradient_stay():
    model, data = compiled(), batches(7)
    optimizer = thor(model, weight_decay=0.1)
    before = snapshot(dict(model.named_parameters()))
    for step, (x, y) in enumerate(data):
        F.cross_entropy(model(x), y).backward()
        model[0].weight.grad = None
        momentum = None if step == 0 else optimizer.state[model[0].weight]["momentum"].clone()
        optimizer.step()
        optimizer.zero_grad()
        if momentum is not None:
            assert torch.equal(optimizer.state[model[0].weight]["momentum"], momentum)
    after = snapshot(dict(model.named_parameters()))
    assert torch.equal(before["0.weight"], after["0.weight"])
    assert all(not torch.equal(before[name], after[name]) for name in ("0.bias", *SECOND))


def test_a_step_without_any_gradient_does_nothing():
    model = compiled()
    optimizer = thor(model)
    before = snapshot(dict(model.named_parameters()))
    assert optimizer.step() is None
    assert identical(before, snapshot(dict(model.named_parameters())))
    assert_same(train(model, optimizer, batches(4)), reference(4))


def test_gradients_are_only_read():
    model, (x, y) = compiled(), batches(1)[0]
    optimizer = thor(model)
    F.cross_entropy(model(x), y).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    before = snapshot(gradients)
    optimizer.step()
    assert all(p.grad is gradients[name] for name, p in model.named_parameters())
    assert identical(gradients, before)


def test_clipping_gradients_before_the_step():
    model, data = compiled(), batches(4)
    optimizer = thor(model, momentum=0.0)
    for x, y in data:
        before = snapshot(dict(model.named_parameters()))
        F.cross_entropy(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-9)
        optimizer.step()
        optimizer.zero_grad()
        for name, p in model.named_parameters():
            assert 0 < (p - before[name]).norm() < 1e-6


def test_step_hooks():
    model, calls = compiled(), []
    optimizer = thor(model)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(model, optimizer, batches(2))
    assert calls == ["before", "after"] * 2


def test_what_it_reports():
    model = compiled(MODELS["normalised"])
    optimizer = thor(model)
    assert optimizer.coverage is None
    assert optimizer.metrics().items() >= {"skipped_steps": 0, "failed_inverses": 0}.items()
    train(model, optimizer, batches(1))
    assert sorted(optimizer.coverage.layers) == ["0.weight", "3.weight"]
    assert optimizer.coverage.norms == ("1.weight", "1.bias")
    assert list(optimizer.coverage.fallback) == ["0.bias"]
    assert optimizer.metrics().items() >= {"skipped_steps": 0, "failed_inverses": 0}.items()


# --- saving and loading --------------------------------------------------------------------------------


def tensors_in(nest: Any) -> Iterator[Tensor]:
    if isinstance(nest, Tensor):
        yield nest
    elif isinstance(nest, Mapping):
        for inner in nest.values():
            yield from tensors_in(inner)
    elif isinstance(nest, list | tuple):
        for inner in nest:
            yield from tensors_in(inner)


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(("name", "saved_after"), [("mlp", 0), ("mlp", 1), ("mlp", 3), ("attention", 5)])
def test_a_loaded_state_continues_bitwise(name, saved_after):
    """Also in the middle of a refresh interval: the inverses are part of the state."""
    data, maker = batches(8), MODELS[name]
    settings = {**SETTINGS, "lr": torch.linspace(0.1, 0.05, 8, dtype=torch.float64), "block_size": 4}
    expected = by_drop_in_door(build(maker), data, **settings)
    model = compiled(maker)
    optimizer = thor_fx.Thor(model, **settings)
    train(model, optimizer, data[:saved_after])
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})

    fresh = compiled(maker)
    fresh.load_state_dict(saved["model"])
    resumed = thor_fx.Thor(fresh, **settings)
    resumed.load_state_dict(saved["optimizer"])
    for found, wanted in zip(train(fresh, resumed, data[saved_after:]), expected[saved_after:], strict=True):
        assert identical(found, wanted)


def test_loading_into_the_running_optimizer():
    """Back to an earlier state, in place."""
    model, data = compiled(), batches(8)
    optimizer = thor(model)
    train(model, optimizer, data[:4])
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    first = train(model, optimizer, data[4:])
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    second = train(model, optimizer, data[4:])
    assert all(identical(one, other) for one, other in zip(first, second, strict=True))


def test_the_state_dict_is_a_snapshot_of_tensors():
    model = compiled()
    optimizer = thor(model)
    train(model, optimizer, batches(4))
    state = optimizer.state_dict()
    assert set(state) == {"state", "param_groups"}
    for index, p in enumerate(model.parameters()):
        assert torch.equal(state["state"][index]["momentum"], optimizer.state[p]["momentum"])
        assert state["state"][index]["momentum"].any()
        assert ("inverses" in state["state"][index]) == (p.dim() == 2)
    again = thor(compiled())
    again.load_state_dict(state)
    found, expected = (list(tensors_in(d)) for d in (again.state_dict(), state))
    assert len(found) == len(expected) > 8
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_settings_are_part_of_the_state():
    model, other = compiled(), compiled()
    optimizer, loaded = thor(model, lr=0.3, momentum=0.5), thor(other)
    loaded.load_state_dict(optimizer.state_dict())
    assert loaded.param_groups[0]["lr"] == 0.3
    assert_same(train(other, loaded, batches(4)), train(model, optimizer, batches(4)))
    assert_same([snapshot(dict(other.named_parameters()))], reference(4, lr=0.3, momentum=0.5)[-1:])


def test_counters_survive():
    model, (x, y) = compiled(), batches(1)[0]
    optimizer = thor(model)
    train(model, optimizer, [(x, y), (x * torch.inf, y), (x, y)])
    assert optimizer.metrics()["skipped_steps"] == 1
    fresh = compiled()
    resumed = thor(fresh)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    train(fresh, resumed, [(x, y), (x * torch.nan, y)])
    assert resumed.metrics()["skipped_steps"] == 2


def test_another_block_size_is_refused():
    model, other = compiled(), compiled()
    optimizer, loaded = thor(model), thor(other, block_size=4)
    train(model, optimizer, batches(1))
    loaded.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="use the block_size and the model that it was saved with"):
        train(other, loaded, batches(1))


def test_a_second_optimizer_on_the_same_model_starts_afresh():
    model, data = compiled(), batches(6)
    train(model, thor(model), data[:2])
    twin = build(mlp)
    twin.load_state_dict(model.state_dict())
    expected = by_drop_in_door(twin, data[2:], **SETTINGS)
    assert_same(train(model, thor(model), data[2:]), expected)


@pytest.mark.parametrize("steps", [0, 4])
def test_a_model_may_change_its_dtype(steps):
    """As with optimizers of torch: momentum and inverses follow, and the schedule goes on."""
    model, data = compiled(), batches(8)
    optimizer = thor(model)
    train(model, optimizer, data[:steps])
    model.float()
    narrow = [(x.float(), y) for x, y in data[steps:]]
    found = train(model, optimizer, narrow)
    assert all(p.dtype == torch.float32 for p in found[-1].values())
    expected = by_drop_in_door(build(mlp), data, **SETTINGS)[steps:]
    assert_same([{n: p.double() for n, p in params.items()} for params in found], expected, rtol=1e-4)
    state = optimizer.state[model[0].weight]
    inverses = [part for side in state["inverses"]["0.weight"].values() for part in side]
    assert {state["momentum"].dtype, *(part.dtype for part in inverses)} == {torch.float32}


def test_a_part_of_a_model_may_change_its_dtype_and_back():
    model, data = compiled(), batches(6)
    optimizer = thor(model)
    train(model, optimizer, data[:2])
    model[2].float()
    model[2].double()
    expected = by_drop_in_door(build(mlp), data, **SETTINGS)
    assert_same(train(model, optimizer, data[2:]), expected[2:], rtol=1e-5)


def test_a_copied_optimizer_says_what_to_do():
    """It has the state, as a copy of any optimizer of torch; the compiled model it has not."""
    model = compiled()
    optimizer = thor(model)
    train(model, optimizer, batches(1))
    copied = copy.deepcopy(optimizer)
    assert "Options: of a copy" in repr(copied)
    for use in (
        copied.step,
        copied.metrics,
        copied.zero_grad,
        lambda: copied.load_state_dict(optimizer.state_dict()),
        lambda: pickle.loads(pickle.dumps(optimizer)).add_param_group({"params": "0.weight"}),
    ):
        with pytest.raises(
            RuntimeError, match=r"this Thor is a copy .* create Thor\(thor_fx\.compile\(model\)"
        ):
            use()
    assert not hasattr(copied, "no_such_thing")
    twin, data = compiled(), batches(4)
    resumed = thor(twin)
    twin.load_state_dict(model.state_dict())
    resumed.load_state_dict(copied.state_dict())
    one, other = train(twin, resumed, data[1:]), train(model, optimizer, data[1:])
    assert all(map(identical, one, other))


def test_a_process_group_that_comes_later_is_told_once(monkeypatch):
    """Trainers initialise it: each rank would have inverses of its own, and the weights drift apart."""
    model, data = compiled(), batches(2)
    optimizer = thor(model)
    monkeypatch.setattr("thor_fx.distributed.peers.has_others", lambda: True)
    with pytest.warns(UserWarning, match=r"before torch.distributed was initialised: create it after that"):
        train(model, optimizer, data[:1])
    train(model, optimizer, data[1:])


def test_a_wrapper_of_torch_compile_around_the_model_shows_nothing():
    model, (x, y) = compiled(), batches(1)[0]
    optimizer = thor(model)
    F.cross_entropy(torch.compile(model, backend="aot_eager")(x), y).backward()
    with pytest.raises(RuntimeError, match=r"nor torch.compile\(model\)"):
        optimizer.step()
