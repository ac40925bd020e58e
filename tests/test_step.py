"""``compile_step``: one compiled function from batch to new parameters."""

import copy
import functools
import io
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

import thor_fx
from models import random
from thor_fx.inverses.pair import InversePair
from thor_fx.precondition import PreconditionState
from thor_fx.schedule import Schedule
from thor_fx.transform import (
    SkipState,
    add_decayed_weights,
    heavy_ball,
    scale_by_learning_rate,
)
from training import (
    CLASSES,
    HIDDEN,
    IN,
    MODELS,
    Checkpointed,
    Tied,
    assert_same,
    batches,
    build,
    by_functional_door,
    classifier_loss,
    identical,
    mlp,
    snapshot,
)

SETTINGS: dict[str, Any] = {"lr": 0.05, "damping": 0.1, "momentum": 0.9, "frequency": 3}


def make(loss_fn: Callable[..., Any], donate: bool = True, **settings: Any) -> thor_fx.CompiledStep:
    tx = thor_fx.thor(**{**SETTINGS, **settings})
    return thor_fx.compile_step(loss_fn, tx, donate=donate, backend="eager")


def start(model: nn.Module) -> dict[str, Tensor]:
    return snapshot(dict(model.named_parameters()))


class Compilations:
    """Counts the graphs that were compiled."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        compile_graph = thor_fx.step.compile_graph

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return compile_graph(*args, **kwargs)

        monkeypatch.setattr("thor_fx.step.compile_graph", counted)


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> Compilations:
    return Compilations(monkeypatch)


# --- donation ----------------------------------------------------------------------------------------


def test_donated_arguments_are_written_in_place():
    model = build(mlp)
    params, data = start(model), batches(4)
    step = make(classifier_loss(model))
    state = step.init(params, *data[0])
    tensors = [*params.values(), *pytree.tree_leaves(state.inner)]
    addresses, before = [t.data_ptr() for t in tensors], [t.clone() for t in tensors]
    new, new_state = params, state
    for batch in data:
        new, new_state, _ = step(new, new_state, *batch)
    after = [*new.values(), *pytree.tree_leaves(new_state.inner)]
    assert all(one is other for one, other in zip(tensors, after, strict=True))
    assert addresses == [t.data_ptr() for t in after]
    changed = [not torch.equal(one, other) for one, other in zip(before, after, strict=True)]
    assert (
        changed.count(False) == 4
    )  # nothing failed, nothing was skipped: a counter of two shapes, two of all
    assert (state.step, new_state.step) == (0, 4)


def test_without_donation_the_arguments_are_untouched():
    model, data = build(mlp), batches(7)
    step = make(classifier_loss(model), donate=False)
    params: Any = start(model)
    state = step.init(params, *data[0])
    trajectory = []
    for batch in data:
        before = snapshot(params), pytree.tree_map(torch.clone, state.inner)
        new, new_state, _ = step(params, state, *batch)
        again, _, _ = step(params, state, *batch)
        assert identical(params, before[0])
        for old, kept in zip(*map(pytree.tree_leaves, (state.inner, before[1])), strict=True):
            assert torch.equal(old, kept)
        assert identical(new, again), "a pure function of its arguments"
        assert not identical(new, params)
        params, state = new, new_state
        trajectory.append(snapshot(params))
    donated = by_functional_door(build(mlp), data, **SETTINGS)
    assert all(identical(one, other) for one, other in zip(trajectory, donated, strict=True))


@pytest.mark.parametrize("donate", [True, False])
def test_init_runs_nothing(donate):
    model = build(
        lambda: nn.Sequential(nn.Linear(IN, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.Linear(HIDDEN, CLASSES))
    )
    params, data = start(model), batches(1)
    buffers = snapshot(dict(model.named_buffers()))
    step = make(classifier_loss(model), donate)
    step.init(params, *data[0])
    assert identical(params, start(model))
    assert identical(dict(model.named_buffers()), buffers)


def test_other_tensors_than_those_of_init_are_welcome(compilations):
    """Parameters and state of a checkpoint are new tensors."""
    model, data = build(mlp), batches(8)
    expected = by_functional_door(build(mlp), data, **SETTINGS)
    step = make(classifier_loss(model))
    params, state = start(model), step.init(start(model), *data[0])
    compiled = compilations.count
    for batch, reference in zip(data, expected, strict=True):
        params, state, _ = step(snapshot(params), copy.deepcopy(state), *batch)
        assert identical(params, reference)
    assert compilations.count == compiled


# --- what goes in and comes out ------------------------------------------------------------------------


class Pair(NamedTuple):
    first: Any
    second: Any


def test_aux_comes_back_as_it_was_built():
    params, (x, y) = start(build(mlp)), batches(1)[0]

    def loss_fn(p, x, y):
        h = (x @ p["0.weight"].T + p["0.bias"]).tanh()
        scores = h @ p["2.weight"].T + p["2.bias"]
        loss = F.cross_entropy(scores, y)
        aux = {
            "input": x,
            "scores": scores,
            "view": scores.flatten(),
            "loss": loss,
            "nest": [(1, None, "text"), {"deep": Pair(h, 2.5)}],
            "labels": scores.argmax(-1),
        }
        return loss, aux

    step = make(loss_fn)
    state = step.init(params, x, y)
    for _ in range(2):  # a factor step and a plain step
        expected = loss_fn(snapshot(params), x, y)
        params, state, out = step(params, state, x, y)
        assert isinstance(out.aux["nest"][1]["deep"], Pair)
        assert pytree.tree_structure(out.aux) == pytree.tree_structure(expected[1])
        for leaf, reference in zip(*map(pytree.tree_leaves, (out.aux, expected[1])), strict=True):
            if isinstance(reference, Tensor):
                assert torch.equal(leaf, reference)
                assert not leaf.requires_grad
            else:
                assert leaf == reference
        assert torch.equal(out.loss, expected[0])
        assert out.loss.shape == ()
        assert not out.loss.requires_grad


def test_without_aux_there_is_none():
    model, data = build(mlp), batches(1)
    step = make(classifier_loss(model))
    params = start(model)
    _, _, out = step(params, step.init(params, *data[0]), *data[0])
    assert out.aux is None


def test_batches_may_be_nests():
    model, (x, y) = build(mlp), batches(1)[0]
    loss = classifier_loss(model)

    def nested(params, batch, factor):
        return factor * loss(params, batch["x"], *batch["rest"])

    trajectories = []
    for loss_fn, arguments in [(loss, (x, y)), (nested, ({"x": x, "rest": [y]}, 1))]:
        params, step = start(model), make(loss_fn)
        state = step.init(params, *arguments)
        trajectories.append([])
        for _ in range(4):
            params, state, _ = step(params, state, *arguments)
            trajectories[-1].append(snapshot(params))
    assert_same(*trajectories)


class Callables:
    """The same loss as a method and as an object that is called."""

    def __init__(self, loss: Callable[..., Tensor]) -> None:
        self.loss = loss

    def method(self, params, x, y):
        return self.loss(params, x, y)

    __call__ = method


@pytest.mark.parametrize(
    "wrap",
    [lambda f: functools.partial(lambda f, *a: f(*a), f), Callables, lambda f: Callables(f).method],
    ids=["partial", "object", "method"],
)
def test_any_callable_is_a_loss_function(wrap):
    model, data = build(mlp), batches(1)
    results = []
    for loss_fn in (classifier_loss(model), wrap(classifier_loss(model))):
        params, step = start(model), make(loss_fn)
        results.append(step(params, step.init(params, *data[0]), *data[0])[0])
    assert identical(*results)
    assert not identical(results[0], start(model))


# --- buffers -------------------------------------------------------------------------------------------


def with_batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(IN, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES))


def statistics_after(trajectory: list[dict[str, Tensor]], data: list[Any]) -> dict[str, Tensor]:
    """The buffers that eager training leaves, batch by batch with the parameters before each step."""
    model = build(with_batch_norm)
    for params, (x, _) in zip([start(model), *trajectory[:-1]], data, strict=True):
        functional_call(model, params, (x,))
    return dict(model.named_buffers())


def assert_same_buffers(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)
    assert expected["1.num_batches_tracked"] == 5


def test_running_statistics_of_a_captured_module():
    model, data = build(with_batch_norm), batches(5)
    trajectory = by_functional_door(model, data, **SETTINGS)
    assert_same_buffers(dict(model.named_buffers()), statistics_after(trajectory, data))


@pytest.mark.parametrize("donate", [True, False])
def test_buffers_as_an_argument(donate):
    model, data = build(with_batch_norm), batches(5)
    own = snapshot(dict(model.named_buffers()))

    def loss_fn(params, buffers, x, y):
        scores = functional_call(model, (params, buffers), (x,))  # writes to the buffers
        return F.cross_entropy(scores, y), (buffers, {"scores": scores})

    step = make(loss_fn, donate)
    params, given = start(model), snapshot(own)
    state = step.init(params, *data[0], buffers=given)
    assert identical(state.buffers, own)
    trajectory = []
    for batch in data:
        before = snapshot(state.buffers)
        new_params, new_state, out = step(params, state, *batch)
        if not donate:
            assert identical(state.buffers, before)
        params, state = new_params, new_state
        assert out.aux["scores"].shape == (len(batch[0]), CLASSES)
        trajectory.append(snapshot(params))
    assert_same_buffers(state.buffers, statistics_after(trajectory, data))
    assert_same(trajectory, by_functional_door(build(with_batch_norm), data, **SETTINGS))
    assert identical(dict(model.named_buffers()), own), "the module's own are not the ones in use"


def test_buffers_that_are_computed():
    def loss_fn(params, buffers, x, y):
        mean = 0.5 * buffers["mean"] + 0.5 * x.mean(0)
        return F.cross_entropy((x - mean) @ params["w"], y), ({"mean": mean}, None)

    params, data = {"w": torch.zeros(IN, CLASSES, dtype=torch.float64)}, batches(4)
    step, mean = make(loss_fn), torch.zeros(IN, dtype=torch.float64)
    state = step.init(params, *data[0], buffers={"mean": mean})
    for x, y in data:
        expected = 0.5 * state.buffers["mean"] + 0.5 * x.mean(0)
        params, state, out = step(params, state, x, y)
        torch.testing.assert_close(state.buffers, {"mean": expected})
        assert out.aux is None


# --- when it compiles -----------------------------------------------------------------------------------


def run(step: thor_fx.CompiledStep, params: Any, state: Any, data: list[Any]) -> tuple[Any, Any]:
    for batch in data:
        params, state, _ = step(params, state, *batch)
    return params, state


def test_the_second_step_of_either_kind_compiles_nothing(compilations):
    model, data = build(mlp), batches(9)
    params, step = start(model), make(classifier_loss(model))
    state = step.init(params, *data[0])
    assert compilations.count == 2
    run(step, params, state, data)
    assert compilations.count == 2


@pytest.mark.parametrize(("dynamic", "graphs"), [(None, 4), (True, 2), (False, 6)])
def test_a_new_batch_size_compiles_at_most_once(compilations, dynamic, graphs):
    trajectory = trajectory_over_sizes(dynamic)
    assert compilations.count == graphs  # both kinds of step for every capture
    assert_same(trajectory, every_size_traced_alone())


@functools.cache
def every_size_traced_alone() -> list[dict[str, Tensor]]:
    return trajectory_over_sizes(False)


def trajectory_over_sizes(dynamic: bool | None) -> list[dict[str, Tensor]]:
    data = [batch for rows in (7, 9, 12, 7) for batch in batches(4, rows)]
    return by_functional_door(build(mlp), data, dynamic=dynamic, **SETTINGS)


@pytest.mark.parametrize("kind", ["table", "callable", "tensor callable"])
def test_schedules_compile_nothing(compilations, kind):
    data, values = batches(6), torch.linspace(0.1, 0.05, 6, dtype=torch.float64)
    schedule = {
        "table": values,
        "callable": lambda step: values[step].item(),
        "tensor callable": lambda step: values[step],
    }[kind]
    model = build(mlp)
    step, params = make(classifier_loss(model), lr=schedule, damping=schedule), start(model)
    _, state = run(step, params, step.init(params, *data[0]), data)
    assert compilations.count == 2
    assert state.step == 6


@pytest.mark.parametrize(("frequency", "graphs"), [(1, 1), (2, 2)])
def test_kinds_that_never_run_are_not_compiled(compilations, frequency, graphs):
    model, data = build(mlp), batches(3)
    step, params = make(classifier_loss(model), frequency=frequency), start(model)
    run(step, params, step.init(params, *data[0]), data)
    assert compilations.count == graphs


def test_dynamic_shapes_from_the_start(compilations):
    """LayerNorm has a number among its attributes, which Dynamo makes symbolic too."""
    model, data = build(MODELS["normalised"]), [*batches(4, 7), *batches(4, 9)]
    tx, params = thor_fx.thor(**SETTINGS), start(model)
    step = thor_fx.compile_step(classifier_loss(model), tx, backend="eager", dynamic=True)
    run(step, params, step.init(params, *data[0]), data)
    assert compilations.count == 2


def test_numbers_in_the_batch():
    model, data = build(mlp), batches(4)
    loss = classifier_loss(model)
    step, params = make(lambda params, x, y, factor: factor * loss(params, x, y), lr=0.0), start(model)
    state = step.init(params, *data[0], 0.5)
    for factor in (0.5, 0.75, 1.5, 3.0):
        params, state, out = step(params, state, *data[0], factor)
        assert out.loss.item() == pytest.approx(factor * loss(params, *data[0]).item(), rel=1e-12)


def test_the_mode_of_a_captured_model_is_guarded(compilations):
    model = build(lambda: nn.Sequential(nn.Linear(IN, HIDDEN), nn.Dropout(0.5), nn.Linear(HIDDEN, CLASSES)))
    data, params = batches(1), start(model)
    step = make(classifier_loss(model), lr=0.0)
    state = step.init(params, *data[0])
    losses: dict[bool, list[float]] = {True: [], False: []}
    for training in (True, True, False, False, True, False):
        model.train(training)
        _, state, out = step(params, state, *data[0])
        losses[training].append(out.loss.item())
    assert compilations.count == 4
    assert len(set(losses[True])) == 3, "dropout draws anew"
    plain = classifier_loss(model)(params, *data[0]).item()
    assert losses[False] == [pytest.approx(plain, rel=1e-12)] * 3


# --- what is trained -----------------------------------------------------------------------------------


def test_frozen_parameters_stay():
    model, data = build(mlp), batches(4)
    model[0].weight.requires_grad_(False)
    params = {name: p if not p.requires_grad else p.detach().clone() for name, p in model.named_parameters()}
    before = snapshot(params)
    step = make(classifier_loss(model), weight_decay=0.1)
    params, _ = run(step, params, step.init(params, *data[0]), data)
    assert step.coverage.frozen == ("0.weight",)
    assert list(step.coverage.layers) == ["2.weight"]
    assert torch.equal(params["0.weight"], before["0.weight"])
    assert not torch.equal(params["0.bias"], before["0.bias"])


def frozen_and_compared() -> tuple[dict[str, Tensor], Callable[..., Tensor]]:
    """A frozen shift, and a loss that asks whether it got the module's own tensors, as modules do."""
    module = build(lambda: nn.Linear(IN, CLASSES))
    module.bias.requires_grad_(False)

    def loss_fn(p, x, y):
        assert (p["weight"] is module.weight) in {True, False}
        return F.cross_entropy(x @ p["weight"].T + p["bias"], y)

    return dict(module.named_parameters()), loss_fn


def test_copies_of_frozen_parameters_are_not_trained(compilations):
    (params, loss_fn), data = frozen_and_compared(), batches(3)
    step = make(loss_fn, donate=False, frequency=1)
    new, _ = run(step, params, step.init(params, *data[0]), data)
    assert compilations.count == 1  # init has seen what steps see
    assert torch.equal(new["bias"], params["bias"])
    assert not torch.equal(new["weight"], params["weight"])


def test_parameters_frozen_in_init_only_are_refused():
    (params, loss_fn), data = frozen_and_compared(), batches(1)
    step = make(loss_fn)
    state = step.init(params, *data[0])
    with pytest.raises(RuntimeError, match=r"params are not those that step.init saw.*\['bias'\]"):
        step(snapshot(params), state, *data[0])


def test_parameters_that_the_loss_ignores_stay():
    model, data = build(mlp), batches(4)
    extra = torch.ones(3, 2, dtype=torch.float64)
    params = {**start(model), "extra": extra, "also": nn.Parameter(extra.clone())}

    def loss_fn(p, x, y):
        return (
            F.cross_entropy((x @ p["0.weight"].T).tanh() @ p["2.weight"].T, y) + 0 * p["also"].detach().sum()
        )

    step = make(loss_fn, weight_decay=0.1)
    params, _ = run(step, params, step.init(params, *data[0]), data)
    assert set(step.coverage.unused) == {"extra", "also", "0.bias", "2.bias"}
    for name in ("extra", "also"):
        assert torch.equal(params[name].detach(), torch.ones(3, 2, dtype=torch.float64))


def test_every_parameter_has_one_place():
    for maker in MODELS.values():
        model, data = build(maker), batches(1)
        step = make(classifier_loss(model))
        step.init(start(model), *data[0])
        found = step.coverage
        layered = {layer.param for layer in found.layers.values()}
        places = [*layered, *found.norms, *found.fallback, *found.unused, *found.frozen]
        assert sorted(places) == sorted(dict(model.named_parameters()))
        assert all(found.fallback.values()), "a reason each"


def test_shared_and_checkpointed_layers_are_preconditioned():
    uses = {}
    for maker in (Tied, Checkpointed):
        model, data = build(maker), batches(1)
        step = make(classifier_loss(model))
        step.init(start(model), *data[0])
        uses |= {name: layer.uses for name, layer in step.coverage.layers.items()}
    assert uses == {
        **{"inp.weight": 1, "left.weight": 3, "head.weight": 1},
        **{"up.weight": 1, "down.weight": 1},
    }


def test_the_order_of_parameters_means_nothing():
    """Dynamo numbers its inputs by first use."""
    model, data = build(mlp), batches(5)

    def loss_fn(p, x, y):
        return F.cross_entropy((x @ p["0.weight"].T + p["0.bias"]).tanh() @ p["2.weight"].T + p["2.bias"], y)

    trajectories = []
    for names in (list(start(model)), list(reversed(start(model)))):
        params, step = {name: start(model)[name] for name in names}, make(loss_fn)
        state = step.init(params, *data[0])
        trajectories.append([])
        for batch in data:
            params, state, _ = step(params, state, *batch)
            assert list(params) == names
            trajectories[-1].append(snapshot(params))
        momentum = state.inner.inner[2]
        assert {name: m.shape for name, m in momentum.items()} == {n: p.shape for n, p in params.items()}
    assert_same(*trajectories)


@pytest.mark.parametrize("donate", [True, False])
def test_one_tensor_under_two_names(donate):
    """``named_parameters(remove_duplicate=False)`` of a model with shared weights."""
    model, data = build(Tied), batches(7)
    expected = by_functional_door(build(Tied), data, **SETTINGS)
    twice = dict(model.named_parameters(remove_duplicate=False))
    copies = {id(p): p.detach().clone() for p in twice.values()}
    params: Any = {name: copies[id(p)] for name, p in twice.items()}
    step = make(classifier_loss(model), donate)
    state = step.init(params, *data[0])
    for batch, reference in zip(data, expected, strict=True):
        params, state, _ = step(params, state, *batch)
        assert params["left.weight"] is params["right.weight"]
        assert_same([{name: params[name] for name in reference}], [reference])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_parameters_keep_their_dtype(dtype):
    model, data = build(mlp, dtype), batches(5, dtype=dtype)
    step, params = make(classifier_loss(model)), start(model)
    state = step.init(params, *data[0])
    assert {t.dtype for t in pytree.tree_leaves(state.inner.inner[0].inverses)} == {torch.float32}
    params, state = run(step, params, state, data)
    assert {p.dtype for p in params.values()} == {dtype}
    wide = by_functional_door(build(mlp), batches(5), **SETTINGS)[-1]
    rough = 5e-2 if dtype == torch.bfloat16 else 1e-5
    for name, p in params.items():
        assert (p - wide[name]).norm() < rough * wide[name].norm()


# --- state and transforms --------------------------------------------------------------------------------


def test_saved_state_continues_bitwise():
    model, data = build(mlp), batches(8)
    expected = by_functional_door(build(mlp), data, **SETTINGS)
    step, params = make(classifier_loss(model)), start(model)
    params, state = run(step, params, step.init(params, *data[0]), data[:4])  # amid a refresh interval
    file = io.BytesIO()
    torch.save({"params": params, "state": state}, file)
    file.seek(0)
    with torch.serialization.safe_globals([thor_fx.StepState, SkipState, PreconditionState, InversePair]):
        saved = torch.load(file, weights_only=True)
    fresh = make(classifier_loss(model))
    fresh.init(start(model), *data[0])
    params, state = run(fresh, saved["params"], saved["state"], data[4:])
    assert identical(params, expected[-1])
    assert state.step == 8


@pytest.mark.parametrize("nesterov", [False, True])
def test_transforms_without_factors_are_sgd(compilations, nesterov):
    data, model, twin = batches(8), build(mlp), build(mlp)
    tx = thor_fx.chain(
        add_decayed_weights(Schedule("weight_decay", 0.01), lambda _name: True),
        heavy_ball(Schedule("momentum", 0.9), nesterov=nesterov),
        scale_by_learning_rate(Schedule("lr", 0.1)),
    )
    step, params = thor_fx.compile_step(classifier_loss(model), tx, backend="eager"), start(model)
    state = step.init(params, *data[0])
    sgd = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=nesterov)
    for x, y in data:
        params, state, _ = step(params, state, x, y)
        F.cross_entropy(twin(x), y).backward()
        sgd.step()
        sgd.zero_grad()
        assert_same([params], [snapshot(dict(twin.named_parameters()))])
    assert compilations.count == 1
    assert not tx.wants_factors(0)


def test_a_transform_of_ones_own_composes():
    """Doubling the update of THOR by one more link is THOR with twice the learning rate."""

    def double(updates, state, params, signals):
        assert signals.coverage.layers.keys() == {"0.weight", "2.weight"}
        return {name: 2 * u for name, u in updates.items()}, {"calls": state["calls"] + 1}

    own = thor_fx.Transform(lambda params, coverage: {"calls": torch.zeros((), dtype=torch.int64)}, double)
    model, data = build(mlp), batches(7)
    tx = thor_fx.chain(thor_fx.thor(**SETTINGS), own)
    step, params = thor_fx.compile_step(classifier_loss(model), tx, backend="eager"), start(model)
    state = step.init(params, *data[0])
    trajectory = []
    for batch in data:
        params, state, _ = step(params, state, *batch)
        trajectory.append(snapshot(params))
    assert state.inner[1]["calls"] == 7
    assert_same(trajectory, by_functional_door(build(mlp), data, **{**SETTINGS, "lr": 0.1}))


def test_gradients_of_convolutions_are_centralized():
    w = torch.randn(2, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    b = torch.randn(4, 5, dtype=torch.float64)
    tx = thor_fx.centralize_gradients()
    new, _ = tx.update({"conv": w, "linear": b}, (), {}, thor_fx.Signals(thor_fx.Coverage({}, (), {})))
    torch.testing.assert_close(new["conv"], w - w.mean((1, 2, 3), keepdim=True))
    assert new["linear"] is b


# --- randomness ------------------------------------------------------------------------------------------


def dropout_masks(backend: str) -> list[Tensor]:
    def loss_fn(params, x):
        dropped = F.dropout(torch.ones(64, 100), 0.3)
        return (x @ params["w"]).square().mean(), {"dropped": dropped, "also": F.dropout(x, 0.3)}

    tx = scale_by_learning_rate(Schedule("lr", 0.1))  # one kind of step: a small graph
    step = thor_fx.compile_step(loss_fn, tx, backend=backend)
    params, x = {"w": torch.ones(3, 2)}, torch.ones(2000, 3)
    state = step.init(params, x)
    masks = []
    for _ in range(4):
        params, state, out = step(params, state, x)
        masks += [out.aux["dropped"], out.aux["also"]]
    return masks


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.inductor)])
def test_dropout_keeps_its_rate_and_draws_anew(backend):
    masks = dropout_masks(backend)
    for mask in masks:
        assert mask.unique().tolist() == [0.0, pytest.approx(1 / 0.7)]
        assert (mask != 0).double().mean().item() == pytest.approx(0.7, abs=0.03)
    for some in (masks[::2], masks[1::2]):
        assert not any(torch.equal(some[i], some[j]) for i in range(4) for j in range(i))


# --- Inductor --------------------------------------------------------------------------------------------


@pytest.mark.inductor
def test_the_compiled_step_equals_the_interpreted_one(compilations):
    model = build(mlp)
    data = [*batches(4, 7), *batches(3, 9)]
    settings = {**SETTINGS, "block_size": 4, "damping_rule": "pi", "weight_decay": 0.01}
    trajectories: dict[str, list[Any]] = {"inductor": [], "eager": []}
    for backend, trajectory in trajectories.items():
        tx = thor_fx.thor(**settings)
        step = thor_fx.compile_step(classifier_loss(model), tx, backend=backend, dynamic=True)
        params = start(model)
        state = step.init(params, *data[0])
        tensors = [*params.values(), *pytree.tree_leaves(state.inner)]
        for batch in data:
            params, state, out = step(params, state, *batch)
            trajectory.append({**snapshot(params), "loss": out.loss.clone()})
        after = [*params.values(), *pytree.tree_leaves(state.inner)]
        assert all(one is other for one, other in zip(tensors, after, strict=True))
    assert compilations.count == 2 * 2
    assert_same(trajectories["inductor"], trajectories["eager"], rtol=1e-11)


class Convolved(nn.Module):
    """Padding, a stride and blocks: everything that asks for sizes of the input."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 5, 3, padding=1), nn.Conv2d(5, 4, 3, padding=1, stride=2)
        self.head = nn.Linear(4 * 9, CLASSES)

    def forward(self, x):
        return self.head(self.second(self.first(x).relu()).relu().flatten(1))


@pytest.mark.parametrize("settings", [{}, {"block_size": 7}, {"bias": "joint", "rows": 0.5}])
def test_convolutions_of_any_batch_size_are_compiled_once(settings, compilations):
    model = build(Convolved)
    tx = thor_fx.thor(**SETTINGS, **settings)
    step = thor_fx.compile_step(classifier_loss(model), tx, backend="eager", dynamic=True)
    params = start(model)
    data = [(random(n, torch.float64, n, 2, 6, 6), torch.arange(n) % CLASSES) for n in (7, 9, 4, 6, 5)]
    state = step.init(params, *data[0])
    for batch in data:
        params, state, _ = step(params, state, *batch)
    assert compilations.count == 2


def test_init_may_be_called_again():
    params, x = {"w": torch.ones(3, 2, dtype=torch.float64)}, torch.eye(3, dtype=torch.float64)
    step = thor_fx.compile_step(
        lambda p, x: (x @ p["w"]).square().mean(), thor_fx.thor(0.1, 0.1, 0.9), backend="eager"
    )
    first = step(params, step.init(params, x), x)[2].loss
    params = {"w": torch.ones(3, 2, dtype=torch.float64)}
    state = step.init(params, x)
    assert state.step == 0
    assert step(params, state, x)[2].loss == first


def test_what_a_loss_logs_breaks_no_graph():
    """Dynamo has no graph for loggers; ``transformers`` warns about the loss of GPT-2 through one."""
    model, data = build(mlp), batches(2)
    plain, logger = classifier_loss(model), logging.getLogger("a model")

    def loss_fn(params, x, y):
        logger.warning("this loss is a default")
        return plain(params, x, y)

    loud, quiet = make(loss_fn), make(plain)
    trajectories = []
    for step in (loud, quiet):
        params = start(model)
        trajectories.append(run(step, params, step.init(params, *data[0]), data)[0])
    assert_same([trajectories[0]], [trajectories[1]])
