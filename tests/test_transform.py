"""Gradient transformations: each alone, and composed."""

import pytest
import torch

import thor_fx
from thor_fx.layers import Coverage
from thor_fx.schedule import Schedule
from thor_fx.skipping import skip_nonfinite
from thor_fx.transform import (
    Signals,
    Transform,
    add_decayed_weights,
    all_finite,
    apply_updates,
    centralize_gradients,
    chain,
    clip_by_norm,
    heavy_ball,
    partition,
    scale_by_learning_rate,
    stateless,
)

NOTHING = Coverage({}, (), {})
STEPS = 6


def tensors(seed: int, **shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(s, dtype=torch.float64, generator=generator) for k, s in shapes.items()}


def params() -> dict[str, torch.Tensor]:
    return tensors(0, w=(3, 4), b=(3,))


def gradients(step: int) -> dict[str, torch.Tensor]:
    return tensors(1 + step, w=(3, 4), b=(3,))


def once(tx: Transform, updates, old=None, step: int = 0, state=None):
    """One update and the new state."""
    old = params() if old is None else old
    state = tx.init(old, NOTHING) if state is None else state
    return tx.update(updates, state, old, Signals(NOTHING, tx.hyper(step)))


def train(tx: Transform, gradient=gradients) -> list[dict[str, torch.Tensor]]:
    """The parameters after every one of some steps."""
    p, trajectory = params(), []
    state = tx.init(p, NOTHING)
    for step in range(STEPS):
        updates, state = once(tx, gradient(step), p, step, state)
        p = apply_updates(p, updates)
        trajectory.append(p)
    return trajectory


def train_with_torch(**options) -> list[dict[str, torch.Tensor]]:
    p, trajectory = params(), []
    optimizer = torch.optim.SGD(list(p.values()), **options)
    for step in range(STEPS):
        for name, g in gradients(step).items():
            p[name].grad = g
        optimizer.step()
        trajectory.append({name: value.clone() for name, value in p.items()})
    return trajectory


def assert_close(got, expected, tolerance=1e-12):
    assert set(got) == set(expected)
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=tolerance, atol=tolerance)


def sgd(lr=0.1, momentum=0.9, weight_decay=0.0, nesterov=False, decays=lambda name: True):
    return chain(
        add_decayed_weights(Schedule("weight_decay", weight_decay), decays),
        heavy_ball(Schedule("momentum", momentum), nesterov=nesterov),
        scale_by_learning_rate(Schedule("lr", lr)),
    )


# --- each alone ------------------------------------------------------------------------------------


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_momentum_and_decay_are_those_of_sgd(momentum, weight_decay, nesterov):
    got = train(sgd(momentum=momentum, weight_decay=weight_decay, nesterov=nesterov))
    expected = train_with_torch(lr=0.1, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)
    for ours, theirs in zip(got, expected, strict=True):
        assert_close(ours, theirs)


def test_momentum_zero_is_plain_descent():
    for ours, theirs in zip(train(sgd(momentum=0.0)), train_with_torch(lr=0.1), strict=True):
        assert_close(ours, theirs)


def test_momentum_by_hand():
    for nesterov, expected in ((False, [1, 2.5, 4.25]), (True, [1.5, 3.25, 5.125])):
        tx = heavy_ball(Schedule("momentum", 0.5), nesterov=nesterov)
        state, got = tx.init({"w": torch.zeros(())}, NOTHING), []
        for step in range(3):
            updates, state = once(tx, {"w": torch.tensor(step + 1.0)}, {"w": torch.zeros(())}, step, state)
            got.append(updates["w"].item())
        assert got == expected


def test_momentum_of_a_parameter_without_a_gradient_is_kept():
    tx = heavy_ball(Schedule("momentum", 0.5))
    _, state = once(tx, gradients(0))
    updates, new = once(tx, {"w": gradients(1)["w"]}, state=state)
    assert set(updates) == {"w"}
    assert torch.equal(new["b"], state["b"])


def test_only_chosen_names_decay():
    tx = add_decayed_weights(Schedule("weight_decay", 0.3), lambda name: name == "w")
    updates, _ = once(tx, gradients(0))
    assert_close(updates, {"w": gradients(0)["w"] + 0.3 * params()["w"], "b": gradients(0)["b"]})


def test_clipping_is_tensor_by_tensor():
    given = {"w": torch.full((2, 2), 3.0), "b": torch.tensor([0.3, 0.4])}
    updates, _ = once(clip_by_norm(1.0), given, given)
    assert_close(updates, {"w": torch.full((2, 2), 0.5), "b": given["b"]}, tolerance=1e-7)


def test_clipping_keeps_what_is_within_the_bound_bit_for_bit():
    given = {"w": gradients(0)["w"] / 1000, "zero": torch.zeros(3, dtype=torch.float64)}
    updates, _ = once(clip_by_norm(1.0), given, given)
    assert all(torch.equal(updates[name], given[name]) for name in given)


@pytest.mark.parametrize("largest", [0.5, 2.0])
def test_clipping_to_another_norm(largest):
    updates, _ = once(clip_by_norm(largest), {"w": 100 * gradients(0)["w"]})
    assert updates["w"].norm().item() == pytest.approx(largest, rel=1e-12)


def test_learning_rate_changes_the_sign():
    updates, _ = once(scale_by_learning_rate(Schedule("lr", 0.25)), gradients(0))
    assert_close(updates, {name: -0.25 * g for name, g in gradients(0).items()})


def test_learning_rate_per_step():
    tx = scale_by_learning_rate(Schedule("lr", torch.tensor([1.0, 0.5])))
    updates, _ = once(tx, gradients(0), step=1)
    assert_close(updates, {name: -0.5 * g for name, g in gradients(0).items()})


def test_centralized_gradients_of_convolutions_have_no_mean_per_filter():
    given = tensors(0, conv=(4, 3, 2, 2), conv1d=(4, 3, 2), dense=(4, 3), bias=(4,))
    updates, _ = once(centralize_gradients(), given, given)
    for name in ("conv", "conv1d"):
        per_filter = given[name].flatten(1)
        expected = (per_filter - per_filter.mean(1, keepdim=True)).view_as(given[name])
        torch.testing.assert_close(updates[name], expected, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(updates[name], given[name]) for name in ("dense", "bias"))


# --- skip_nonfinite --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("bad", [None, torch.nan, torch.inf, -torch.inf])
def test_all_finite_sees_every_number(bad: float | None, backend: str):
    values = [torch.zeros(3, 37), torch.full((2,), 3e38), torch.full((5,), 1e300, dtype=torch.float64)]
    values += [torch.full((4,), -6e4, dtype=torch.float16), torch.ones(0), torch.tensor(2.0)]
    finite = torch.compile(all_finite, backend=backend)
    assert finite(values).item()
    for i, value in enumerate(values):
        if value.numel():
            spoilt = value.clone()
            spoilt.view(-1)[-1] = 1.0 if bad is None else bad
            assert finite([*values[:i], spoilt, *values[i + 1 :]]).item() == (bad is None)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_step_with_a_bad_gradient_changes_nothing_and_is_counted(bad):
    def spoiled(step):
        found = gradients(step)
        if step in (0, 3):
            found["b"][1] = bad
        return found

    tx = skip_nonfinite(sgd(weight_decay=0.3))
    with_bad = train(tx, spoiled)
    assert_close(with_bad[0], params(), tolerance=0)
    assert_close(with_bad[3], with_bad[2], tolerance=0)

    p, state = params(), tx.init(params(), NOTHING)
    for step in range(STEPS):
        updates, state = once(tx, spoiled(step), p, step, state)
        p = apply_updates(p, updates)
    assert state.skipped == 2

    good = [gradients(step) for step in range(STEPS) if step not in (0, 3)]
    q, state = params(), sgd(weight_decay=0.3).init(params(), NOTHING)
    for found in good:
        updates, state = once(sgd(weight_decay=0.3), found, q, 0, state)
        q = apply_updates(q, updates)
    assert_close(p, q, tolerance=0)


def test_good_steps_are_those_of_the_inner_transform():
    for guarded, plain in zip(train(skip_nonfinite(sgd())), train(sgd()), strict=True):
        assert_close(guarded, plain, tolerance=0)


def test_the_guard_passes_schedules_and_frequency_on():
    inner = sgd()._replace(frequency=7)
    guarded = skip_nonfinite(inner)
    assert guarded.schedules == inner.schedules
    assert guarded.frequency == 7


# --- composition -----------------------------------------------------------------------------------


def plus(number: float) -> Transform:
    return stateless(lambda updates, params, signals: {k: u + number for k, u in updates.items()})


def times(number: float) -> Transform:
    return stateless(lambda updates, params, signals: {k: u * number for k, u in updates.items()})


def test_a_chain_applies_its_links_in_order():
    given = {"w": torch.tensor(1.0)}
    assert once(chain(plus(1), times(10)), given, given)[0]["w"] == 20
    assert once(chain(times(10), plus(1)), given, given)[0]["w"] == 11
    assert once(chain(), given, given)[0] is given


def test_chains_of_chains():
    nested = chain(chain(sgd()), plus(0.0))
    for ours, theirs in zip(train(nested), train(sgd()), strict=True):
        assert_close(ours, theirs, tolerance=0)


def test_a_chain_has_all_schedules_and_the_frequency():
    tx = chain(sgd(lr=0.5), plus(0)._replace(frequency=3))
    assert tx.hyper(0) == {"weight_decay": 0.0, "momentum": 0.9, "lr": 0.5}
    assert [step for step in range(8) if tx.wants_factors(step)] == [0, 3, 6]
    assert not any(sgd().wants_factors(step) for step in range(8))


def test_a_chain_refuses_what_is_no_transform():
    with pytest.raises(TypeError, match="chain takes transforms, got float"):
        chain(sgd(), 0.1)
    with pytest.raises(TypeError, match="chain takes transforms, got function"):
        chain(sgd)


def test_a_chain_refuses_two_schedules_of_one_name():
    with pytest.raises(ValueError, match="two transforms in this chain have a schedule called 'lr'"):
        chain(*[scale_by_learning_rate(Schedule("lr", 0.1))] * 2)


def test_a_chain_refuses_two_frequencies():
    with pytest.raises(ValueError, match="different frequencies"):
        chain(plus(0)._replace(frequency=2), plus(0)._replace(frequency=3))
    assert chain(plus(0)._replace(frequency=2), plus(0)._replace(frequency=2)).frequency == 2


def test_a_partition_treats_its_groups_apart():
    tx = partition({"fast": sgd(lr=0.5), "slow": sgd(lr=0.01, momentum=0.0)}, {"w": "fast", "b": "slow"})
    fast, slow = train(sgd(lr=0.5)), train(sgd(lr=0.01, momentum=0.0))
    for both, f, s in zip(train(tx), fast, slow, strict=True):
        assert_close(both, {"w": f["w"], "b": s["b"]}, tolerance=0)


def test_schedules_of_a_partition_carry_their_label():
    tx = partition({"x": sgd(lr=0.5), "y": sgd(lr=0.1)}, {"w": "x", "b": "y"})
    assert tx.hyper(0)["x.lr"] == 0.5
    assert tx.hyper(0)["y.lr"] == 0.1
    assert set(tx.hyper(0)) == {f"{g}.{n}" for g in "xy" for n in ("lr", "momentum", "weight_decay")}


def test_a_group_without_parameters_is_nothing():
    tx = partition({"x": sgd(), "empty": skip_nonfinite(sgd())}, {"w": "x", "b": "x"})
    for ours, theirs in zip(train(tx), train(sgd()), strict=True):
        assert_close(ours, theirs, tolerance=0)


def test_updates_are_added_in_the_dtype_of_the_parameter():
    p = {"w": torch.ones(2, dtype=torch.bfloat16), "idle": torch.ones(2)}
    new = apply_updates(p, {"w": torch.full((2,), 0.5)})
    assert new["w"].dtype == torch.bfloat16
    assert new["w"].tolist() == [1.5, 1.5]
    assert new["idle"] is p["idle"]


def test_updates_are_pure():
    given, old = gradients(0), params()
    for tx in (sgd(weight_decay=0.3), skip_nonfinite(sgd()), clip_by_norm(0.1), centralize_gradients()):
        state = tx.init(old, NOTHING)
        first = once(tx, given, old, 0, state)[0]
        second = once(tx, given, old, 0, state)[0]
        assert_close(first, second, tolerance=0)
    assert_close(given, gradients(0), tolerance=0)
    assert_close(old, params(), tolerance=0)


# --- the chain of thor -----------------------------------------------------------------------------


def test_thor_without_layers_is_sgd():
    tx = thor_fx.thor(lr=0.1, damping=0.03, momentum=0.9, weight_decay=0.3, use_nesterov=True)
    expected = train_with_torch(lr=0.1, momentum=0.9, weight_decay=0.3, nesterov=True)
    for ours, theirs in zip(train(tx), expected, strict=True):
        assert_close(ours, theirs)


def test_thor_clips_after_decay_and_before_momentum():
    tx = thor_fx.thor(lr=1.0, damping=0.03, momentum=0.5, weight_decay=2.0, enable_clip_grad=True)
    p, m = params(), {name: torch.zeros_like(v) for name, v in params().items()}
    for step, got in enumerate(train(tx)):
        for name, g in gradients(step).items():
            u = g + 2.0 * p[name]
            m[name] = 0.5 * m[name] + u * min(1.0, 1.0 / u.norm().item())
            p[name] = p[name] - m[name]
        assert_close(got, p)


def test_thor_divides_gradients_by_the_loss_scale():
    tx = thor_fx.thor(lr=0.1, damping=0.03, momentum=0.9, weight_decay=0.3, loss_scale=8.0)
    scaled = train(tx, lambda step: {name: 8.0 * g for name, g in gradients(step).items()})
    for ours, theirs in zip(scaled, train(sgd(weight_decay=0.3)), strict=True):
        assert_close(ours, theirs)
