"""``factor_decay``: running averages of factors."""

import io
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import models
import oracle
import thor_fx
from averaged_thor import AveragedThor, blocks_of, slow_trajectory
from test_precondition import LAMBDA, Run, thor
from thor_fx.factors import Moments, factor_pair
from thor_fx.precondition import PreconditionState
from training import (
    CLASSES,
    HIDDEN,
    IN,
    MODELS,
    Tied,
    assert_moved,
    assert_same,
    batches,
    build,
    by_drop_in_door,
    by_functional_door,
    classifier_loss,
    identical,
    mlp,
    snapshot,
    train,
)

SETTINGS: dict[str, Any] = {"lr": 0.05, "damping": 0.1, "momentum": 0.9, "frequency": 2}
DECAY = 0.9


def scaled(moments: dict[str, Moments], by: float) -> dict[str, Moments]:
    """The moments of a batch whose factors are ``by`` times as large."""
    return {name: Moments(by * m.activations, by * m.cotangents, m.rows) for name, m in moments.items()}


def averages_of(state: PreconditionState) -> Any:
    return state.memory.averages


# --- the average ----------------------------------------------------------------------------------


def test_without_it_nothing_is_kept():
    step = Run(models.mlp)
    state = thor().init(step.params, step.coverage)
    assert state.memory == ()
    kept = [*pytree.tree_leaves(state.inverses), *state.failing.values()]
    assert len(pytree.tree_leaves(state)) == len(kept) + 3, "n and counters"


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95])
def test_the_sum_by_its_definition(decay):
    """``S_k = (1 - decay) sum_j decay^(k - j) F_j``, corrected by ``1 - decay^k``."""
    step, tx, sizes = Run(models.mlp), thor(factor_decay=decay), (1.0, 3.0, 0.25, 2.0)
    state = None
    for size in sizes:
        updates, state = step.update(tx, state, moments=scaled(step.moments, size))
    weighted = (1 - decay) * sum(decay ** (3 - j) * size for j, size in enumerate(sizes))
    mean = weighted / (1 - decay**4)
    for i, (name, layer) in enumerate(step.coverage.layers.items()):
        pair = factor_pair(step.moments, layer, step.terms)
        for (found,), one in zip(averages_of(state).factors[name], pair, strict=True):
            assert oracle.relative_error(found, weighted * one) < 1e-12
        assert averages_of(state).weights[i].item() == pytest.approx(1 - decay**4, rel=1e-14)
        A, G = (mean * one for one in pair)
        expected = oracle.natural_step(A, G, step.gradients[name], LAMBDA, LAMBDA)
        assert oracle.relative_error(updates[name], expected) < 1e-10


@pytest.mark.parametrize("make", [models.experts, models.embedding, models.both_ways])
@pytest.mark.parametrize("options", [{}, {"block_size": 2}, {"damping_rule": "pi", "block_size": 3}])
def test_after_one_batch_it_is_the_factor_of_that_batch(make, options):
    step = Run(make)
    expected, _ = step.update(thor(**options))
    found, state = step.update(thor(**options, factor_decay=DECAY))
    for name in expected:
        assert oracle.relative_error(found[name], expected[name]) < 1e-10, name
    assert state.failures == 0


def test_of_a_factor_in_blocks_only_the_blocks_are_kept():
    step = Run(models.mlp)
    tx = thor(factor_decay=DECAY, block_size=2)
    _, state = step.update(tx)
    for name, layer in step.coverage.layers.items():
        for (kept,), side in zip(averages_of(state).factors[name], (layer.input, layer.output), strict=True):
            assert kept.shape == (-(-side.dim // 2), 2, 2) if side.dim > 2 else side.shape
        A, _ = factor_pair(step.moments, layer, step.terms)
        dense = torch.block_diag(*averages_of(state).factors[name].input[0])[: len(A), : len(A)]
        assert oracle.relative_error(dense / (1 - DECAY), blocks_of(A, 2)) < 1e-12


def test_a_layer_without_factors_in_a_step_does_not_enter():
    step, tx = Run(models.mlp), thor(factor_decay=DECAY)
    first, *_ = step.coverage.layers
    _, state = step.update(tx)
    some = {first: step.moments[first]}
    _, later = step.update(tx, state, moments=some)
    assert averages_of(later).weights.tolist() == pytest.approx([1 - DECAY**2, 1 - DECAY], rel=1e-14)
    for name in step.coverage.layers:
        old, new = (averages_of(s).factors[name].input[0] for s in (state, later))
        assert torch.equal(old, new) == (name != first)


def test_a_layer_that_never_had_factors_stands_still():
    step, tx = Run(models.mlp), thor(factor_decay=DECAY)
    first, second = step.coverage.layers
    updates, state = step.update(tx, moments={first: step.moments[first]})
    assert updates[first].any()
    assert not updates[second].any()
    assert state.failures == 0


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_factors_that_are_not_finite_do_not_enter(bad):
    step, tx = Run(models.mlp), thor(factor_decay=DECAY)
    first, second = step.coverage.layers
    _, state = step.update(tx)
    moments = scaled(step.moments, 2.0)
    moments[first] = scaled(step.moments, bad)[first]
    updates, later = step.update(tx, state, moments=moments)
    assert later.failures == 1
    assert averages_of(later).weights.tolist() == pytest.approx([1 - DECAY, 1 - DECAY**2], rel=1e-14)
    assert torch.equal(averages_of(later).factors[first].input[0], averages_of(state).factors[first].input[0])
    assert all(u.isfinite().all() for u in updates.values())
    assert averages_of(later).factors[second].input[0].isfinite().all()


def test_a_first_batch_that_is_not_finite_leaves_the_layer_where_it_is():
    step, tx = Run(models.mlp), thor(factor_decay=DECAY)
    moments = scaled(step.moments, torch.inf)
    updates, state = step.update(tx, moments=moments)
    assert not any(updates[name].any() for name in step.coverage.layers)
    updates, state = step.update(tx, state)
    expected, _ = step.update(thor())
    for name in step.coverage.layers:
        assert oracle.relative_error(updates[name], expected[name]) < 1e-10


def test_float32_parameters_beside_float64():
    """Averages are kept in the dtype of each layer's factors."""
    step = Run(models.mlp)
    name = next(iter(step.coverage.layers))
    params = {n: p.float() if n == name else p for n, p in step.params.items()}
    state = thor(factor_decay=DECAY).init(params, step.coverage)
    kept = {n: pair.input[0].dtype for n, pair in averages_of(state).factors.items()}
    assert kept == {n: torch.float32 if n == name else torch.float64 for n in kept}


# --- whole trainings, by hand ---------------------------------------------------------------------


@pytest.mark.parametrize(("make", "frequency", "block_size"), [(mlp, 1, None), (Tied, 3, 4)])
def test_training_by_hand(make, frequency, block_size):
    data, settings = batches(8), {**SETTINGS, "frequency": frequency}
    expected = slow_trajectory(build(make), data, decay=DECAY, block_size=block_size, **settings)
    settings |= {"factor_decay": DECAY, "block_size": block_size}
    found = by_functional_door(build(make), data, **settings)
    assert_moved(found, snapshot(dict(build(make).named_parameters())))
    assert_same(found, expected, rtol=1e-10)
    single = by_functional_door(build(make), data, **{**settings, "factor_decay": None})
    assert not identical(single[-1], found[-1])


OPTIONS: dict[str, dict[str, Any]] = {
    "blocks and pi": {"block_size": 4, "damping_rule": "pi"},
    "joint biases": {"bias": "joint", "batch_size": 50, "loss_scale": 8.0},
    "long sides": {"max_dim": 5, "block_size": 2},
    "diagonals": {"max_dim": 5, "long_side": "diagonal"},
    "one side": {"max_dim": 5, "long_side": "identity", "refresh": thor_fx.Staggered(2)},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_both_doors_agree(name):
    settings = {**SETTINGS, "factor_decay": DECAY, **OPTIONS[name]}
    functional = by_functional_door(build(mlp), batches(6), **settings)
    assert_same(by_drop_in_door(build(mlp), batches(6), **settings), functional)


def test_both_doors_agree_on_layers_inside_one_parameter():
    settings = {**SETTINGS, "factor_decay": DECAY, "block_size": 4}
    functional = by_functional_door(build(MODELS["attention"]), batches(5), **settings)
    assert_same(by_drop_in_door(build(MODELS["attention"]), batches(5), **settings), functional)


def test_the_last_batch_alone_is_no_average():
    found = by_functional_door(build(mlp), batches(6), **SETTINGS, factor_decay=0.0)
    assert_same(found, by_functional_door(build(mlp), batches(6), **SETTINGS), rtol=1e-12)


def test_a_symbolic_batch_size():
    """Plain operations where the number of rows is no constant: the same numbers."""
    data = [*batches(2), *batches(2, rows=4), *batches(2, rows=9)]
    expected = slow_trajectory(build(mlp), data, decay=DECAY, **{**SETTINGS, "frequency": 1})
    settings = {**SETTINGS, "frequency": 1, "factor_decay": DECAY}
    found = by_functional_door(build(mlp), data, **settings)
    assert_same(found, expected, rtol=1e-10)


def test_a_skipped_step_does_not_enter():
    """Steps 2 and 4 see no finite number."""
    data, skipped = batches(7), {2, 4}
    broken = [(x * torch.nan, y) if step in skipped else (x, y) for step, (x, y) in enumerate(data)]
    expected = skipping(build(mlp), data, skipped)
    for door in (by_functional_door, by_drop_in_door):
        assert_same(door(build(mlp), broken, **SETTINGS, factor_decay=DECAY), expected, rtol=1e-10)


def skipping(model: nn.Module, data: list[Any], skipped: set[int]) -> list[dict[str, Tensor]]:
    """The slow optimizer, which is not told of some batches: their steps do not count."""
    optimizer, found = AveragedThor(model, decay=DECAY, **SETTINGS), []
    for step, (x, y) in enumerate(data):
        if step not in skipped:
            F.cross_entropy(model(x), y).backward()
            optimizer.step(len(x))
            optimizer.zero_grad()
        found.append(snapshot(dict(model.named_parameters())))
    return found


# --- the drop-in door -----------------------------------------------------------------------------


def test_micro_batches_are_one_batch():
    """Sums and numbers of rows add up before they are averaged."""
    data = batches(5, rows=8)
    expected = by_functional_door(build(mlp), data, **SETTINGS, factor_decay=DECAY)
    model = thor_fx.compile(build(mlp), backend="aot_eager", dynamic=False)
    optimizer, found = thor_fx.Thor(model, **SETTINGS, factor_decay=DECAY), []
    for x, y in data:
        for rows in (slice(0, 4), slice(4, 8)):
            (F.cross_entropy(model(x[rows]), y[rows]) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(snapshot(dict(model.named_parameters())))
    assert_same(found, expected, rtol=1e-10)


def test_a_changing_loss_scale_changes_nothing():
    """Every batch enters without the scale it was measured with."""
    data = batches(7)
    expected = by_functional_door(build(mlp), data, **SETTINGS, factor_decay=DECAY, refresh=thor_fx.Every(4))
    model = thor_fx.compile(build(mlp), backend="aot_eager")
    optimizer = thor_fx.Thor(model, **SETTINGS, factor_decay=DECAY, refresh=thor_fx.Every(4))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
    for (x, y), after in zip(data, expected, strict=True):
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert_same([snapshot(dict(model.named_parameters()))], [after])
    assert scaler.get_scale() == 4 * 2**7


class Broken(nn.Module):
    """Two graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.head = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x).tanh()
        torch._dynamo.graph_break()
        return self.head(h)


class Whole(Broken):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inp(x).tanh())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_graph_breaks():
    settings = {**SETTINGS, "factor_decay": DECAY}
    expected = by_functional_door(build(Whole), batches(5), **settings)
    assert_same(by_drop_in_door(build(Broken), batches(5), **settings), expected)


def test_a_layer_that_is_unfrozen_later_has_an_average_of_its_own():
    model, data = thor_fx.compile(build(mlp), backend="aot_eager"), batches(10)
    model[0].requires_grad_(False)
    optimizer = thor_fx.Thor(model, **SETTINGS, factor_decay=DECAY)
    train(model, optimizer, data[:4])  # factors in steps 0 and 2
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": model[0].parameters()})
    train(model, optimizer, data[4:])  # and in 4, 6, 8; the first unfrozen step finds the new layer
    weights = {
        name: float(optimizer.state[model.get_parameter(name)]["factors"][name]["weight"])
        for name in ("0.weight", "2.weight")
    }
    counts = {name: math.log(1 - w) / math.log(DECAY) for name, w in weights.items()}
    assert counts == pytest.approx({"0.weight": 3, "2.weight": 5})


# --- saving and loading ---------------------------------------------------------------------------


def through_a_file(state: Any, weights_only: bool = True) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


@pytest.mark.parametrize("saved_after", [1, 4])
def test_the_drop_in_door_continues_bitwise(saved_after):
    data, settings = batches(8), {**SETTINGS, "factor_decay": DECAY, "block_size": 4}
    expected = by_drop_in_door(build(mlp), data, **settings)
    model = thor_fx.compile(build(mlp), backend="aot_eager")
    optimizer = thor_fx.Thor(model, **settings)
    train(model, optimizer, data[:saved_after])
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    fresh = thor_fx.compile(build(mlp), backend="aot_eager")
    fresh.load_state_dict(saved["model"])
    resumed = thor_fx.Thor(fresh, **settings)
    resumed.load_state_dict(saved["optimizer"])
    found = train(fresh, resumed, data[saved_after:])
    assert all(map(identical, found, expected[saved_after:]))


def test_the_functional_door_continues_bitwise():
    data, settings = batches(8), {**SETTINGS, "factor_decay": DECAY}
    expected = by_functional_door(build(mlp), data, **settings)
    model = build(mlp)
    params: Any = snapshot(dict(model.named_parameters()))
    state = None
    for half in (data[:3], data[3:]):
        step = thor_fx.compile_step(classifier_loss(model), thor_fx.thor(**settings), backend="eager")
        start = step.init(params, *data[0])
        state = start if state is None else state
        for batch in half:
            params, state, _ = step(params, state, *batch)
        params, state = through_a_file((params, state), weights_only=False)
    assert identical(params, expected[-1])


def test_another_block_size_is_refused():
    model = thor_fx.compile(build(mlp), backend="aot_eager")
    optimizer = thor_fx.Thor(model, **SETTINGS, factor_decay=DECAY)
    train(model, optimizer, batches(1))
    other = thor_fx.compile(build(mlp), backend="aot_eager")
    loaded = thor_fx.Thor(other, **SETTINGS, factor_decay=DECAY, block_size=4)
    loaded.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="use the block_size and the model that it was saved with"):
        train(other, loaded, batches(1))


def test_a_state_without_averages_starts_them():
    model = thor_fx.compile(build(mlp), backend="aot_eager")
    optimizer = thor_fx.Thor(model, **SETTINGS)
    train(model, optimizer, batches(3))
    resumed = thor_fx.Thor(model, **SETTINGS, factor_decay=DECAY)
    resumed.load_state_dict(optimizer.state_dict())
    assert_moved(train(model, resumed, batches(3)), snapshot(dict(model.named_parameters())))
    weight = resumed.state[model[0].weight]["factors"]["0.weight"]["weight"]
    assert weight.item() == pytest.approx(1 - DECAY, rel=1e-14)  # one factor step: number 4
