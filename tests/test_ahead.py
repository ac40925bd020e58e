"""Values that are computed ahead: once, in the background, and never for tensors that have changed since."""

import copy
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from thor_fx.ahead import Ahead


class Doubling:
    """A function of tensors that counts its calls, and says in which threads."""

    def __init__(self, *inputs: Tensor) -> None:
        self.inputs, self.threads = inputs, []

    def __call__(self) -> list[Tensor]:
        self.threads.append(threading.current_thread())
        return [2 * tensor for tensor in self.inputs]


def given(count: int = 2) -> tuple[list[Tensor], Doubling]:
    inputs = [torch.randn(3, requires_grad=True).detach() for _ in range(count)]
    return inputs, Doubling(*inputs)


def check(found: Any, inputs: list[Tensor]) -> None:
    assert all(torch.equal(two, 2 * one) for two, one in zip(found, inputs, strict=True))


def test_it_is_computed_once_and_beside():
    ahead, (inputs, double) = Ahead(), given()
    ahead.start(inputs, "double", double)
    ahead.start(list(inputs), "double", double)
    check(ahead.take(inputs, "double", double), inputs)
    assert len(double.threads) == 1
    assert double.threads[0] is not threading.current_thread()


def test_what_was_not_started_is_computed_in_the_background_too():
    ahead, (inputs, double) = Ahead(), given()
    ahead.start(inputs, "double", double)
    for _ in range(2):
        check(ahead.take(inputs, "double", double), inputs)
    assert len(double.threads) == 2
    assert threading.current_thread() not in double.threads


def test_what_is_about_something_else_is_computed():
    ahead, (inputs, double) = Ahead(), given()
    ahead.start(inputs, "triple", lambda: [3 * tensor for tensor in inputs])
    check(ahead.take(inputs, "double", double), inputs)


def test_inputs_that_were_written_since():
    ahead, (inputs, double) = Ahead(), given()
    ahead.start(inputs, "double", double)
    inputs[1][0] = 5.0
    check(ahead.take(inputs, "double", double), inputs)
    assert len(double.threads) >= 1
    other, (inputs, double) = Ahead(), given()
    other.start(inputs, "double", double)
    inputs[1].add_(1)
    other.start(inputs, "double", double)
    check(other.take(inputs, "double", double), inputs)


def test_other_tensors_of_the_same_values():
    ahead, (inputs, double) = Ahead(), given()
    ahead.start(inputs, "double", double)
    others = [tensor.clone() for tensor in inputs]
    again = Doubling(*others)
    check(ahead.take(others, "double", again), inputs)
    assert len(again.threads) == 1


def test_copies_are_followed():
    ahead, (inputs, double) = Ahead(), given()
    ahead.start(inputs, "double", double)
    copies = {id(tensor): tensor.clone() for tensor in inputs}
    ahead.follow(copies)
    check(ahead.take(list(copies.values()), "double", pytest.fail), inputs)


def test_copies_of_what_was_written_are_not_followed():
    ahead, (inputs, double) = Ahead(), given()
    ahead.start(inputs, "double", double)
    inputs[0].zero_()
    copies = {id(tensor): tensor.clone() for tensor in inputs}
    ahead.follow(copies)
    others = list(copies.values())
    check(ahead.take(others, "double", Doubling(*others)), inputs)


def test_nothing_is_kept_of_what_is_forgotten():
    ahead, (inputs, double) = Ahead(), given()
    ahead.start(inputs, "double", double)
    ahead.forget()
    again = Doubling(*inputs)
    check(ahead.take(inputs, "double", again), inputs)
    assert len(again.threads) == 1


def test_gradients_are_off_in_the_background():
    ahead, weight = Ahead(), torch.ones(3, requires_grad=True)
    assert not ahead.take([weight], "double", lambda: 2 * weight).requires_grad


def test_an_error_is_raised_where_the_value_is_taken():
    ahead, (inputs, double) = Ahead(), given()

    def fail() -> Any:
        raise KeyError("a test")

    ahead.start(inputs, "double", fail)
    with pytest.raises(KeyError, match="a test") as caught:
        ahead.take(inputs, "double", double)
    assert "in the background" in caught.value.__notes__[0]
    check(ahead.take(inputs, "double", double), inputs)


def test_an_error_of_what_is_forgotten_is_not_raised():
    ahead, (inputs, double) = Ahead(), given()
    ahead.start(inputs, "double", lambda: 1 / 0)
    ahead.forget()
    check(ahead.take(inputs, "double", double), inputs)


def test_a_copy_begins_with_nothing():
    ahead, (inputs, double) = Ahead(), given()
    ahead.start(inputs, "double", double)
    again = Doubling(*inputs)
    check(copy.deepcopy(ahead).take(inputs, "double", again), inputs)
    assert len(again.threads) == 1


def test_where_there_is_no_background(monkeypatch):
    monkeypatch.setattr("thor_fx.ahead.can_work", lambda device: False)
    ahead, (inputs, double) = Ahead(), given()
    ahead.start(inputs, "double", double)
    assert not double.threads
    check(ahead.take(inputs, "double", double), inputs)
    assert double.threads == [threading.current_thread()]


def test_one_after_the_other_in_a_thread_that_ends():
    ahead, gate, threads = Ahead(), threading.Event(), []

    def wait() -> list[Tensor]:
        threads.append(threading.current_thread())
        assert gate.wait(60)
        return []

    for _ in range(3):
        inputs, _ = given()
        ahead.start(inputs, "wait", wait)
    gate.set()
    ahead.take(inputs, "wait", wait)
    assert len(threads) == 3
    assert len(set(threads)) == 1
    threads[0].join(60)
    assert not threads[0].is_alive()


def test_a_program_that_ends_meanwhile():
    program = """
import torch
from thor_fx.ahead import Ahead
matrix = torch.randn(600, 600)
ahead = Ahead()
ahead.start([matrix], "inverse", lambda: [torch.linalg.inv(matrix) for _ in range(30)])
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=300
    )
    assert (ran.returncode, ran.stderr) == (0, "")
