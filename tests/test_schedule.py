"""Hyper-parameters per step."""

import warnings

import pytest
import torch

from thor_fx.schedule import Schedule


@pytest.mark.parametrize("value", [0.5, 1, torch.tensor(0.5), torch.tensor(1), torch.tensor(0.5).double()])
def test_a_constant_is_the_same_in_every_step(value):
    schedule = Schedule("lr", value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [schedule(step) for step in (0, 1, 1000)] == [float(value)] * 3
    assert schedule.constant


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.int64])
def test_a_table_has_one_value_per_step(dtype):
    schedule = Schedule("lr", torch.tensor([4, 2, 1]).to(dtype))
    assert [schedule(step) for step in range(3)] == [4.0, 2.0, 1.0]
    assert not schedule.constant


def test_a_table_that_requires_grad():
    assert Schedule("lr", torch.tensor([0.5, 0.25], requires_grad=True))(1) == 0.25


@pytest.mark.parametrize("table", [[0.5, 0.25], [0.25]])
def test_a_table_that_runs_out_keeps_its_last_value_and_says_so_once(table):
    schedule = Schedule("damping", torch.tensor(table))
    last = len(table)
    with pytest.warns(UserWarning, match=f"the damping table has {last} values? and step {last} is past"):
        assert schedule(last) == 0.25
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [schedule(last), schedule(last + 100)] == [0.25, 0.25]


def test_every_table_says_so_for_itself():
    for name in ("lr", "damping"):
        with pytest.warns(UserWarning, match=f"the {name} table"):
            Schedule(name, torch.tensor([1.0, 2.0]))(2)


def test_a_callable_is_called_with_the_step():
    schedule = Schedule("lr", lambda step: 1 / (1 + step))
    assert [schedule(0), schedule(1), schedule(3)] == [1.0, 0.5, 0.25]
    assert not schedule.constant
    assert Schedule("lr", lambda step: torch.tensor(0.5))(7) == 0.5


@pytest.mark.parametrize(
    "value",
    ["0.1", None, [0.1, 0.2], (0.1,), {"lr": 1}, True, 1j, torch.tensor([True]), torch.tensor([1j])],
    ids=repr,
)
def test_a_wrong_type_is_named(value):
    with pytest.raises(TypeError, match=r"^lr must be"):
        Schedule("lr", value)


@pytest.mark.parametrize(
    "value",
    [
        -0.1,
        float("nan"),
        float("inf"),
        torch.tensor(-1.0),
        torch.tensor([0.1, -0.1]),
        torch.tensor([0.1, float("nan")]),
        torch.ones(2, 2),
        torch.ones(0),
    ],
    ids=repr,
)
def test_a_wrong_value_is_named(value):
    with pytest.raises(ValueError, match=r"^lr (must be|is an empty table)"):
        Schedule("lr", value)


@pytest.mark.parametrize("value", [0, 0.0, torch.tensor([1.0, 0.0])])
def test_zero_is_refused_where_it_must_be_positive(value):
    assert Schedule("lr", value)(1 if isinstance(value, torch.Tensor) else 0) == 0
    with pytest.raises(ValueError, match=r"^lr must be finite and > 0, got 0"):
        Schedule("lr", value, positive=True)


@pytest.mark.parametrize("value", [-1.0, float("nan"), torch.tensor(float("inf"))])
def test_a_wrong_value_of_a_callable_is_named(value):
    with pytest.raises(ValueError, match=r"^lr must be finite"):
        Schedule("lr", lambda step: value)(0)


@pytest.mark.parametrize("value", [None, "0.1", [0.1], 1j, torch.ones(2), torch.tensor(1j)], ids=repr)
def test_a_wrong_type_from_a_callable_is_named(value):
    with pytest.raises((TypeError, ValueError), match=r"lr"):
        Schedule("lr", lambda step: value)(0)


def test_it_shows_its_name_and_values():
    assert repr(Schedule("lr", 0.5)) == "Schedule('lr', 0.5)"
    assert repr(Schedule("lr", torch.tensor([0.5, 0.25]))) == "Schedule('lr', [0.5, 0.25])"
