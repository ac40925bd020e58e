"""Bad input gets a clear error, and nothing is lost."""

import functools
import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import thor_fx
from training import (
    CLASSES,
    HIDDEN,
    IN,
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
)

SETTINGS: dict[str, Any] = {"lr": 0.05, "damping": 0.1, "momentum": 0.9, "frequency": 3}
PLAIN = thor_fx.thor(**SETTINGS)


def weights(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: torch.ones(shape, dtype=torch.float64) for name, shape in shapes.items()}


def step_of(loss_fn: Callable[..., Any], **settings: Any) -> thor_fx.CompiledStep:
    return thor_fx.compile_step(loss_fn, thor_fx.thor(**{**SETTINGS, **settings}), backend="eager")


# --- arguments -----------------------------------------------------------------------------------------

WRONG = [
    ("lr", "fast", TypeError),
    ("lr", None, TypeError),
    ("lr", [0.1, 0.2], TypeError),
    ("lr", True, TypeError),
    ("lr", 1j, TypeError),
    ("lr", torch.tensor([True]), TypeError),
    ("lr", torch.tensor([1j]), TypeError),
    ("lr", -0.1, ValueError),
    ("lr", math.nan, ValueError),
    ("lr", math.inf, ValueError),
    ("lr", torch.ones(2, 2), ValueError),
    ("lr", torch.ones(0), ValueError),
    ("lr", torch.tensor([0.1, -0.2]), ValueError),
    ("lr", torch.tensor([0.1, math.nan]), ValueError),
    ("damping", "much", TypeError),
    ("damping", None, TypeError),
    ("damping", -1.0, ValueError),
    ("damping", math.nan, ValueError),
    ("damping", torch.tensor([-1.0]), ValueError),
    ("damping", torch.ones(1, 1), ValueError),
    ("momentum", "0.9", TypeError),
    ("momentum", None, TypeError),
    ("momentum", True, TypeError),
    ("momentum", torch.tensor(0.9), TypeError),
    ("momentum", -0.1, ValueError),
    ("momentum", math.inf, ValueError),
    ("weight_decay", "0", TypeError),
    ("weight_decay", None, TypeError),
    ("weight_decay", -1e-9, ValueError),
    ("weight_decay", math.nan, ValueError),
    ("loss_scale", "1", TypeError),
    ("loss_scale", None, TypeError),
    ("loss_scale", 0.0, ValueError),
    ("loss_scale", -1.0, ValueError),
    ("loss_scale", math.inf, ValueError),
    ("batch_size", 32.0, TypeError),
    ("batch_size", "32", TypeError),
    ("batch_size", True, TypeError),
    ("batch_size", 0, ValueError),
    ("batch_size", -4, ValueError),
    ("use_nesterov", 1, TypeError),
    ("use_nesterov", None, TypeError),
    ("enable_clip_grad", "yes", TypeError),
    ("enable_clip_grad", 0, TypeError),
    ("decay_filter", ["fc.weight"], TypeError),
    ("decay_filter", "fc", TypeError),
    ("layer_filter", ["fc.weight"], TypeError),
    ("rows", 0.3, ValueError),
    ("factor_dtype", torch.float16, ValueError),
    ("update_dtype", torch.float32, ValueError),
    ("reduce_dtype", "bfloat16", TypeError),
    ("process_group", "gloo", TypeError),
    ("work_sharing", "all", ValueError),
    ("split_indices", 3, TypeError),
    ("split_indices", "12", TypeError),
    ("split_indices", [1.0], TypeError),
    ("split_indices", [True], TypeError),
    ("split_indices", [], ValueError),
    ("split_indices", [2, 1], ValueError),
    ("split_indices", [1, 1], ValueError),
    ("split_indices", [-1], ValueError),
    ("frequency", 2.0, TypeError),
    ("frequency", True, TypeError),
    ("frequency", None, TypeError),
    ("frequency", 0, ValueError),
    ("frequency", -5, ValueError),
    ("damping_rule", "trace", ValueError),
    ("damping_rule", None, TypeError),
    ("damping_rule", ["sqrt"], TypeError),
    ("block_size", 128.0, TypeError),
    ("block_size", "all", TypeError),
    ("block_size", 0, ValueError),
    ("sharing", 1, TypeError),
    ("sharing", "both", ValueError),
    ("bias", True, TypeError),
    ("bias", "none", ValueError),
    ("max_dim", 1.5, TypeError),
    ("max_dim", 0, ValueError),
    ("long_side", None, TypeError),
    ("long_side", "nothing", ValueError),
    ("kl_clip", "0.1", TypeError),
    ("kl_clip", 0.0, ValueError),
    ("clip", None, TypeError),
    ("clip", "layer", ValueError),
    ("clip_norm", None, TypeError),
    ("clip_norm", 0.0, ValueError),
    ("step_norm", 1.0, TypeError),
    ("step_norm", "muon", ValueError),
    ("momentum_on", None, TypeError),
    ("momentum_on", "weights", ValueError),
    ("decoupled_weight_decay", 1, TypeError),
    ("fallback", None, TypeError),
    ("fallback", "adam", ValueError),
    ("fallback_lr", "fast", TypeError),
    ("fallback_lr", -0.1, ValueError),
    ("preset", 1, TypeError),
    ("preset", "fast", ValueError),
    ("fisher", True, TypeError),
    ("fisher", "mc", ValueError),
    ("likelihood", 1, TypeError),
    ("likelihood", "poisson", ValueError),
    ("inverse", None, TypeError),
    ("inverse", "qr", ValueError),
    ("factor_decay", "0.9", TypeError),
    ("factor_decay", True, TypeError),
    ("factor_decay", 1.0, ValueError),
    ("factor_decay", -0.5, ValueError),
    ("refresh", 10, TypeError),
    ("refresh", "every", TypeError),
    ("refresh", thor_fx.Staggered(500), ValueError),
    ("refresh", thor_fx.Staggered(2, steps=2), ValueError),
    ("refresh_async", 1, TypeError),
    ("refresh_async", "yes", TypeError),
]


@functools.cache
def a_compiled_model() -> nn.Module:
    return compiled()


DOORS: dict[str, Callable[..., Any]] = {
    "functional": thor_fx.thor,
    "drop-in": lambda **settings: thor_fx.Thor(a_compiled_model(), **settings),
}


def ways_to_show(value: Any) -> list[str]:
    """A value, or what is wrong with it."""
    if isinstance(value, Tensor):
        elements = [str(v) for v in value.flatten().tolist()] or ["empty"]
        return [str(tuple(value.shape)), str(value.dtype), "Tensor", *elements]
    return [repr(value), *map(repr, value)] if isinstance(value, list) else [repr(value)]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("name", "value", "error"), WRONG, ids=[f"{name}={value!r}".replace("\n", "") for name, value, _ in WRONG]
)
def test_the_message_names_argument_and_value(door, name, value, error):
    with pytest.raises(error) as caught:
        DOORS[door](**{**SETTINGS, name: value})
    message = str(caught.value)
    assert message.startswith((name, f"the {name}")), message
    assert any(text in message for text in ways_to_show(value)), message


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", ["damping", "momentum"])
def test_what_a_preset_would_give_and_is_left_out(door, name):
    rest = {key: value for key, value in SETTINGS.items() if key != name}
    with pytest.raises(TypeError, match=rf"^{name} must be a number, got None: .* preset=\"recommended\""):
        DOORS[door](**rest)


@pytest.mark.parametrize("door", DOORS)
def test_every_argument_is_tried_with_a_wrong_value(door):
    tried = {name for name, _, _ in WRONG}
    assert set(inspect.signature(thor_fx.thor).parameters) == tried
    DOORS[door](**SETTINGS)


@pytest.mark.parametrize("name", ["lr", "damping", "momentum", "weight_decay", "fallback_lr"])
@pytest.mark.parametrize("value", [-1.0, "much"])
def test_settings_of_a_group_are_checked(name, value):
    with pytest.raises((TypeError, ValueError), match=f"^{name} "):
        thor_fx.Thor(a_compiled_model(), **SETTINGS, params=[{"params": "0.weight", name: value}])


@pytest.mark.parametrize(
    ("group", "error", "message"),
    [
        ({"params": ["nothing"]}, ValueError, r"params holds 'nothing', which is no parameter of the model"),
        ({"params": torch.ones(2)}, ValueError, r"params holds .*Tensor.*, which is no parameter"),
        ({"params": "0.weight", "grad_centralization": 1}, TypeError, r"grad_centralization must be"),
        ({"params": "0.weight", "grad_centralization": True}, ValueError, r"'0\.weight'"),
        ({"lr": 0.1}, (TypeError, ValueError), r"params"),
    ],
    ids=["name", "tensor", "centralization type", "centralization", "no params"],
)
def test_groups_that_make_no_sense(group, error, message):
    with pytest.raises(error, match=message):
        thor_fx.Thor(a_compiled_model(), **SETTINGS, params=[group])


def test_a_parameter_in_two_groups():
    groups = [{"params": "0.weight"}, {"params": ["0.weight", "0.bias"]}]
    with pytest.raises(ValueError, match="more than one parameter group"):
        thor_fx.Thor(a_compiled_model(), **SETTINGS, params=groups)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["lr", "damping"])
def test_a_schedule_that_returns_nonsense(name, bad):
    model, data = build(mlp), batches(2)
    step = step_of(classifier_loss(model), **{name: lambda step: bad if step else 0.1})
    params = snapshot(dict(model.named_parameters()))
    params, state, _ = step(params, step.init(params, *data[0]), *data[0])
    with pytest.raises(ValueError, match=rf"^{name} must be finite and .*, got {bad}"):
        step(params, state, *data[1])


def test_settings_changed_by_hand_are_checked():
    model = compiled()
    optimizer = thor_fx.Thor(model, **SETTINGS)
    train(model, optimizer, batches(1))
    before = snapshot(dict(model.named_parameters()))
    optimizer.param_groups[0]["lr"] = math.nan
    with pytest.raises(ValueError, match=r"^lr must be finite"):
        train(model, optimizer, batches(1))
    assert identical(before, snapshot(dict(model.named_parameters())))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: thor_fx.compile_step(3, thor_fx.thor(**SETTINGS)),
            TypeError,
            "loss_fn must be callable, got int: 3",
        ),
        (lambda: thor_fx.compile_step(len, torch.optim.SGD), TypeError, "tx must be a Transform"),
        (
            lambda: thor_fx.compile_step(len, thor_fx.thor(**SETTINGS), backend="fast"),
            ValueError,
            "backend .*'fast'",
        ),
        (lambda: thor_fx.compile(build(mlp), backend="fast"), ValueError, "backend must be one of .*'fast'"),
        (
            lambda: thor_fx.compile(build(mlp), factor_backend="fast"),
            ValueError,
            "factor_backend must be one of .*'fast'",
        ),
        (
            lambda: thor_fx.compile_step(len, thor_fx.thor(**SETTINGS), factor_backend="fast"),
            ValueError,
            "factor_backend must be one of .*'fast'",
        ),
        (lambda: thor_fx.compile(torch.ones(2)), TypeError, r"model must be a torch\.nn\.Module, got Tensor"),
        (lambda: thor_fx.compile(nn.Linear), TypeError, r"model must be a torch\.nn\.Module, got type"),
        (
            lambda: thor_fx.Thor(a_compiled_model(), **SETTINGS, backend="fast"),
            ValueError,
            "backend .*'fast'",
        ),
        (
            lambda: thor_fx.Thor(a_compiled_model(), **SETTINGS, backend=""),
            ValueError,
            "backend must be one of .*, got ''",
        ),
        (lambda: thor_fx.chain(torch.optim.SGD), TypeError, "chain takes transforms, got type"),
        (lambda: thor_fx.chain(PLAIN, PLAIN), ValueError, "schedule called 'damping'"),
    ],
)
def test_wrong_things_in_the_right_place(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- models and losses -----------------------------------------------------------------------------------


def test_no_trainable_parameter():
    model, (x, y) = build(mlp).requires_grad_(False), batches(1)[0]
    with pytest.raises(ValueError, match=r"no trainable tensor: .*requires_grad_\(\)"):
        thor_fx.compile(model)
    with pytest.raises(ValueError, match="no trainable tensor"):
        thor_fx.compile(nn.ReLU())
    step = step_of(classifier_loss(model))
    for params in (dict(model.named_parameters()), {}):
        with pytest.raises(ValueError, match="no trainable tensor"):
            step.init(params, x, y)
        with pytest.raises(ValueError, match="no trainable tensor"):
            thor_fx.trace_step(classifier_loss(model), params, x, y)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_parameters_without_a_real_gradient(dtype):
    params: dict[str, Any] = {**weights(w=(3, 2)), "table": torch.ones(3, dtype=dtype)}

    def loss_fn(p, x):
        return (x @ p["w"]).square().mean()

    message = rf"params\['table'\] must be floating-point, got {dtype}: leave it out"
    for call in (step_of(loss_fn).init, functools.partial(thor_fx.trace_step, loss_fn)):
        with pytest.raises(TypeError, match=message):
            call(params, torch.ones(4, 3, dtype=torch.float64))
    model = build(mlp)
    model.register_parameter("table", nn.Parameter(torch.ones(3, dtype=dtype), requires_grad=False))
    thor_fx.compile(model)  # frozen: a table of integers, say
    if dtype == torch.complex64:
        model.table.requires_grad_()
        with pytest.raises(TypeError, match=message):
            thor_fx.compile(model)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([torch.ones(2)], r"params must be a mapping .*, got list: use dict\(model\.named_parameters\(\)\)"),
        (torch.ones(2), r"params must be a mapping .*, got Tensor"),
        ({"w": 1.0}, r"params\['w'\] must be a tensor, got float"),
        ({0: torch.ones(2)}, r"params must have names as keys, got 0"),
    ],
    ids=["list", "tensor", "number", "key"],
)
def test_parameters_that_are_no_mapping_of_tensors(params, message):
    with pytest.raises(TypeError, match=message):
        step_of(lambda p, x: x.sum()).init(params, torch.ones(3))
    with pytest.raises(TypeError, match=message):
        thor_fx.trace_step(lambda p, x: x.sum(), params, torch.ones(3))


LOSSES: dict[str, tuple[Callable[..., Any], str]] = {
    "a vector": (lambda p, x: (x @ p["w"]).sum(0), r"scalar loss, got shape \(2,\)"),
    "a matrix": (lambda p, x: (x @ p["w"], {"aux": x}), r"scalar loss, got shape \(4, 2\)"),
    "one element": (lambda p, x: (x @ p["w"]).sum().reshape(1), r"scalar loss, got shape \(1,\)"),
    "independent": (lambda p, x: x.square().sum(), "does not depend on any of params"),
    "detached": (lambda p, x: (x @ p["w"].detach()).sum(), "does not depend on any of params"),
    "a number": (lambda p, x: 3.0, "loss"),
    "nothing": (lambda p, x: None, "loss"),
    "an integer": (lambda p, x: (x @ p["w"]).argmax(), "loss"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_that_cannot_be_trained(name):
    loss_fn, message = LOSSES[name]
    params, x = weights(w=(3, 2)), torch.ones(4, 3, dtype=torch.float64)
    for call in (step_of(loss_fn).init, functools.partial(thor_fx.trace_step, loss_fn)):
        with pytest.raises((ValueError, TypeError), match=message):
            call(params, x)
    assert identical(params, weights(w=(3, 2)))


def test_a_model_that_is_not_called_with_params():
    """The usual slip in functional code."""
    model, (x, y) = build(mlp), batches(1)[0]
    step = step_of(lambda params, x, y: F.cross_entropy(model(x), y))
    with pytest.raises(ValueError, match="call the model with them, not with its own"):
        step.init({name: p.detach().clone() for name, p in model.named_parameters()}, x, y)


def test_errors_of_the_loss_function_come_through():
    def loss_fn(p, x):
        return (x @ p["missing"]).sum()

    with pytest.raises(Exception, match="missing"):
        step_of(loss_fn).init(weights(w=(3, 2)), torch.ones(4, 3, dtype=torch.float64))
    model = build(mlp)
    with pytest.raises(Exception, match=r"same reduction dim|shapes cannot be"):
        step_of(classifier_loss(model)).init(
            snapshot(dict(model.named_parameters())), torch.ones(2, 99), torch.ones(2)
        )


@pytest.mark.parametrize("state", [None, {}, (0, None, None), "state"], ids=str)
def test_a_state_from_elsewhere(state):
    model, data = build(mlp), batches(1)
    step, params = step_of(classifier_loss(model)), snapshot(dict(model.named_parameters()))
    step.init(params, *data[0])
    with pytest.raises(TypeError, match=r"state must come from step\.init\(params, \*batch\), got"):
        step(params, state, *data[0])


def test_a_state_of_another_transform():
    model, data = build(mlp), batches(1)
    params = snapshot(dict(model.named_parameters()))
    step, other = step_of(classifier_loss(model)), step_of(classifier_loss(model), block_size=2)
    step.init(params, *data[0])
    with pytest.raises((TypeError, ValueError, RuntimeError), match=r"step\.init"):
        step(params, other.init(params, *data[0]), *data[0])
    assert identical(params, snapshot(dict(model.named_parameters())))


def test_parameters_of_another_model():
    step = step_of(lambda p, x: sum((x @ w).square().mean() for w in p.values()))
    x = torch.ones(4, 3, dtype=torch.float64)
    params = weights(w=(3, 2))
    state = step.init(params, x)
    with pytest.raises(RuntimeError, match=r"call step\.init again .*'w'.*'v'"):
        step({**params, **weights(v=(3, 5))}, state, x)
    assert identical(params, weights(w=(3, 2)))


def test_a_step_before_init():
    model, data = build(mlp), batches(1)
    params = snapshot(dict(model.named_parameters()))
    state = step_of(classifier_loss(model)).init(params, *data[0])
    fresh = step_of(classifier_loss(model))
    new, _, _ = fresh(params, state, *data[0])  # a state that was loaded: nothing is missing
    assert_same([snapshot(new)], by_functional_door(build(mlp), data, **SETTINGS))


# --- the drop-in door ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [build(mlp), torch.compile(build(mlp), backend="eager"), list(build(mlp).parameters()), None],
    ids=["uncompiled", "torch.compile", "parameters", "None"],
)
def test_a_model_that_is_not_ours(model):
    with pytest.raises(
        TypeError, match=r"compiled by thor_fx, got \w+: call model = thor_fx\.compile\(model\) first"
    ):
        thor_fx.Thor(model, **SETTINGS)


def test_parameters_are_no_model():
    with pytest.raises(TypeError, match=r"got generator: .* the model itself, not its parameters"):
        thor_fx.Thor(build(mlp).parameters(), **SETTINGS)


def test_a_model_compiled_in_place_by_torch():
    model = build(mlp)
    model.compile(backend="eager")
    with pytest.raises(TypeError, match=r"thor_fx\.compile\(model\)"):
        thor_fx.Thor(model, **SETTINGS)


def test_a_step_before_any_factors():
    """``model.forward`` goes round the compiled call."""
    model, (x, y) = compiled(), batches(1)[0]
    optimizer = thor_fx.Thor(model, **SETTINGS)
    before = snapshot(dict(model.named_parameters()))
    F.cross_entropy(model.forward(x), y).backward()
    with pytest.raises(RuntimeError, match=r"create Thor before the forward pass, call the model itself"):
        optimizer.step()
    assert identical(before, snapshot(dict(model.named_parameters())))
    optimizer.zero_grad()
    assert_same(train(model, optimizer, batches(4)), by_drop_in_door(build(mlp), batches(4), **SETTINGS))


def test_training_in_evaluation_mode_says_so_once():
    model, data = compiled(), batches(9)
    optimizer = thor_fx.Thor(model, **SETTINGS)
    train(model, optimizer, data[:3])
    model.eval()
    inverses = _inverses(optimizer)
    with pytest.warns(
        UserWarning, match=r"found no factors \(was the model in evaluation mode\?\)"
    ) as caught:
        train(model, optimizer, data[3:8])
    assert len(caught) == 1
    assert all(torch.equal(one, other) for one, other in zip(inverses, _inverses(optimizer), strict=True))
    model.train()
    train(model, optimizer, data[8:])
    assert not any(torch.equal(one, other) for one, other in zip(inverses, _inverses(optimizer), strict=True))


def _inverses(optimizer: thor_fx.Thor) -> list[Tensor]:
    states = [entry for entry in optimizer.state.values() if "inverses" in entry]
    return [t.clone() for entry in states for t in pytree.tree_leaves(entry["inverses"])]


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(9, HIDDEN, sparse=True), nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.words((x[:, 0].abs() * 3).long().clamp(max=8)))


def test_sparse_gradients():
    model, (x, y) = compiled(Sparse), batches(1)[0]
    optimizer = thor_fx.Thor(model, **SETTINGS)
    before = snapshot(dict(model.named_parameters()))
    with pytest.raises((TypeError, RuntimeError), match=r"words\.weight.*sparse=False|[Ss]parse"):
        train(model, optimizer, [(x, y)])
    assert identical(before, snapshot(dict(model.named_parameters())))


def test_a_sparse_gradient_set_by_hand():
    model, (x, y) = compiled(), batches(1)[0]
    optimizer = thor_fx.Thor(model, **SETTINGS)
    before = snapshot(dict(model.named_parameters()))
    F.cross_entropy(model(x), y).backward()
    model[0].weight.grad = model[0].weight.grad.to_sparse()
    with pytest.raises(TypeError, match=r"the gradient of '0\.weight' is torch\.sparse_coo.*dense gradients"):
        optimizer.step()
    assert identical(before, snapshot(dict(model.named_parameters())))


# --- what changes while training -------------------------------------------------------------------------


@pytest.mark.parametrize("train_by", [by_functional_door, by_drop_in_door])
@pytest.mark.parametrize("name", ["lr", "damping"])
def test_a_table_that_runs_out_holds_its_last_value_and_says_so_once(train_by, name):
    data, table = batches(6), torch.tensor([0.2, 0.1, 0.3], dtype=torch.float64)
    message = rf"the {name} table has 3 values and step 3 is past its end: its last value, 0\.3,"
    with pytest.warns(UserWarning, match=message) as caught:
        found = train_by(build(mlp), data, **{**SETTINGS, name: table})
    assert len(caught) == 1
    longer = torch.cat([table, table[-1:].expand(3)])
    assert_same(found, train_by(build(mlp), data, **{**SETTINGS, name: longer}))


def test_a_constant_never_runs_out():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        by_functional_door(build(mlp), batches(2), **{**SETTINGS, "lr": torch.tensor(0.1), "damping": 0.5})


@pytest.mark.parametrize("train_by", [by_functional_door, by_drop_in_door])
def test_a_batch_of_another_size_works(train_by):
    """Also the last, smaller batch of an epoch, and one with a single row."""
    assert_same(train_by(build(mlp), batches_of_all_sizes(), **SETTINGS), every_size_traced_alone())


def batches_of_all_sizes() -> list[Any]:
    return [batches(1, rows)[0] for rows in (7, 7, 4, 7, 1, 7)]


@functools.cache
def every_size_traced_alone() -> list[Any]:
    return by_functional_door(build(mlp), batches_of_all_sizes(), dynamic=False, **SETTINGS)


BAD = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("taken", [3, 2], ids=["factor step", "plain step"])
def test_a_bad_batch_changes_nothing_in_the_functional_door(taken):
    model, data = build(mlp), batches(5)
    step, params = step_of(classifier_loss(model), weight_decay=0.1), snapshot(dict(model.named_parameters()))
    state = step.init(params, *data[0])
    for batch in data[:taken]:
        params, state, _ = step(params, state, *batch)
    before = snapshot(params), [t.clone() for t in pytree.tree_leaves(state.inner.inner)]
    for count, bad in enumerate(BAD, 1):
        x, y = data[taken]
        x = x.clone()
        x[2, 1] = bad
        _, state, _ = step(params, state._replace(step=taken), x, y)
        assert identical(params, before[0])
        for leaf, old in zip(pytree.tree_leaves(state.inner.inner), before[1], strict=True):
            assert torch.equal(leaf, old)
        assert thor_fx.metrics(state).items() >= {"skipped_steps": count, "failed_inverses": 0}.items()
        assert state.step == taken, "it does not count"
    params, state, _ = step(params, state, *data[taken])
    assert thor_fx.metrics(state)["skipped_steps"] == len(BAD)
    assert not identical(params, before[0])
    assert all(p.isfinite().all() for p in params.values())


@pytest.mark.parametrize("taken", [3, 1], ids=["factor step", "plain step"])
def test_a_bad_gradient_changes_nothing_in_the_drop_in_door(taken):
    model, data = compiled(), batches(7)
    optimizer = thor_fx.Thor(model, **{**SETTINGS, "frequency": 3 if taken == 1 else 1}, weight_decay=0.1)
    train(model, optimizer, data[:taken])
    before = snapshot(dict(model.named_parameters())), _state(optimizer)
    x, y = data[taken]
    for count, bad in enumerate(BAD[: 3 if taken == 3 else 2], 1):
        F.cross_entropy(model(x), y).backward()
        model[2].bias.grad[1] = bad  # one entry of the smallest tensor
        optimizer.step()
        optimizer.zero_grad()
        assert identical(snapshot(dict(model.named_parameters())), before[0])
        assert all(torch.equal(one, other) for one, other in zip(_state(optimizer), before[1], strict=True))
        assert optimizer.metrics().items() >= {"skipped_steps": count, "failed_inverses": 0}.items()
    after = train(model, optimizer, data[taken:])
    assert optimizer.metrics()["skipped_steps"] == count
    assert not identical(after[0], before[0])
    assert all(p.isfinite().all() for p in after[-1].values())


def _state(optimizer: thor_fx.Thor) -> list[Tensor]:
    return [t.clone() for entry in optimizer.state.values() for t in pytree.tree_leaves(entry)]


def test_a_bad_first_batch():
    """No inverse is known, so the next step takes factors, and not only the next that is scheduled."""
    model, data = compiled(), batches(5)
    optimizer = thor_fx.Thor(model, **SETTINGS)
    start = snapshot(dict(model.named_parameters()))
    x, y = data[0]
    assert identical(train(model, optimizer, [(x * math.nan, y)])[0], start)
    trajectory = train(model, optimizer, data)
    assert optimizer.metrics().items() >= {"skipped_steps": 1, "failed_inverses": 0}.items()
    for step, after in enumerate(trajectory, 1):
        assert {name for name, p in after.items() if not torch.equal(p, start[name])} == set(start), step
    assert all(p.isfinite().all() for p in trajectory[-1].values())


def singular_batches(count: int) -> list[tuple[Tensor, Tensor]]:
    """One input feature is always zero: A of the first layer has a zero row and no inverse."""
    return [(x * torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]), y) for x, y in batches(count)]


def one_layer() -> nn.Module:
    return nn.Linear(IN, CLASSES, bias=False)


@pytest.mark.parametrize("train_by", [by_functional_door, by_drop_in_door])
def test_without_a_first_inverse_a_layer_steps_along_the_gradient(train_by):
    """Entry by entry, divided by what bounds the factors: tests/test_numerics.py."""
    start = snapshot(dict(build(one_layer).named_parameters()))
    found = train_by(build(one_layer), singular_batches(4), **{**SETTINGS, "damping": 0.0})
    assert_moved(found, start)


def ignores_a_class(scores: Tensor) -> Tensor:
    """One output never matters: G, too, has a zero row."""
    return scores[:, 1:].square().mean()


def test_a_factor_without_inverse_keeps_the_last_one():
    """Damping is 0 from step 3 on: that step finds nothing to invert. (Step 6 would: it adds damping.)"""
    data = [x for x, _ in singular_batches(6)]
    table = torch.tensor([0.1] * 3 + [0.0] * 3, dtype=torch.float64)
    settings = {**SETTINGS, "lr": 1e-3}
    trajectories = []
    for own in ({"damping": table}, {"frequency": 100}):
        model = compiled(one_layer)
        optimizer = thor_fx.Thor(model, **{**settings, **own})
        trajectories.append([])
        for x in data:
            ignores_a_class(model(x)).backward()
            optimizer.step()
            optimizer.zero_grad()
            trajectories[-1].append(snapshot(dict(model.named_parameters())))
        failed = 2 if "damping" in own else 0
        assert optimizer.metrics().items() >= {"skipped_steps": 0, "failed_inverses": failed}.items()
        assert all(inverse.any() for inverse in _inverses(optimizer))
    assert_same(*trajectories)
    start = snapshot(dict(build(one_layer).named_parameters()))
    assert all(p.isfinite().all() and not torch.equal(p, start[n]) for n, p in trajectories[0][-1].items())

    step = step_of(lambda p, x: ignores_a_class(x @ p["weight"].T), **{**settings, "damping": table})
    params: Any = snapshot(start)
    state = step.init(params, data[0])
    for x, expected in zip(data, trajectories[0], strict=True):
        params, state, _ = step(params, state, x)
        assert_same([params], [expected])
    assert thor_fx.metrics(state).items() >= {"skipped_steps": 0, "failed_inverses": 2}.items()


def test_a_loss_that_is_zero_is_no_failure():
    """Every gradient is zero: nothing moves, nothing is counted, with every damping rule."""
    for rule in ("factor", "sqrt", "pi"):
        step = step_of(lambda p, x: (x @ p["w"] * 0).sum(), damping_rule=rule)
        params, x = weights(w=(3, 2)), torch.ones(4, 3, dtype=torch.float64)
        state = step.init(params, x)
        for _ in range(4):
            params, state, _ = step(params, state, x)
        assert identical(params, weights(w=(3, 2)))
        assert thor_fx.metrics(state).items() >= {"skipped_steps": 0, "failed_inverses": 0}.items()
