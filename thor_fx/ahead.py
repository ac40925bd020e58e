"""Values that are computed ahead of the step that needs them.

A value is a pure function of tensors. Whoever knows that it will be needed starts it; whoever needs it takes
it. Taking what was never started, or was started for tensors that are not the same any more, computes it
then, in the same background: the same number, later. So this is a cache and no state; it is never saved.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .background import Task, Worker, can_work


@dataclass(eq=False)
class _Promise:
    """A value to come.

    Attributes:
        inputs: what it is a function of.
        versions: of the inputs, when it was started: how often each had been written.
        about: which function of them.
        task: computes it.
    """

    inputs: Sequence[Tensor]
    versions: list[int]
    about: Hashable
    task: Task

    @property
    def holds(self) -> bool:
        """Whether the inputs are what they were."""
        return self.versions == _versions(self.inputs)


class Ahead:
    """The values that are being computed for one training, by what they are functions of."""

    def __init__(self) -> None:
        self._worker = Worker()
        self._promises: list[_Promise] = []

    def __reduce__(self) -> Any:  # a copy has nothing under way
        return Ahead, ()

    def start(self, inputs: Sequence[Tensor], about: Hashable, compute: Callable[[], Any]) -> None:
        """Begin to compute, unless that has begun.

        Args:
            inputs: tensors on one device, at least one; nobody writes them until the value is taken, or
                else :meth:`forget` is called.
            about: ``inputs`` and ``about`` say what the value is.
            compute: the value, from ``inputs``: a nest of tensors.
        """
        if can_work(inputs[0].device) and self._find(inputs, about) is None:
            self._promise(inputs, about, compute)

    def take(self, inputs: Sequence[Tensor], about: Hashable, compute: Callable[[], Any]) -> Any:
        """The value, with arguments as in :meth:`start`; the error is raised that stopped it."""
        if not can_work(inputs[0].device):
            return compute()
        promise = self._find(inputs, about) or self._promise(inputs, about, compute)
        self._promises.remove(promise)
        return promise.task.result()

    def follow(self, copies: Mapping[int, Tensor]) -> None:
        """Values are asked for with copies of their inputs from now on: by ``id``, all that were copied."""
        for promise in self._promises:
            if promise.holds and all(id(tensor) in copies for tensor in promise.inputs):
                promise.inputs = [copies[id(tensor)] for tensor in promise.inputs]
                promise.versions = _versions(promise.inputs)

    def forget(self) -> None:
        """Drop all values: their inputs are about to change."""
        for promise in self._promises:
            promise.task.cancel()
        self._promises = []

    def _find(self, inputs: Sequence[Tensor], about: Hashable) -> _Promise | None:
        same = (p for p in self._promises if p.about == about and _are(p.inputs, inputs) and p.holds)
        return next(same, None)

    def _promise(self, inputs: Sequence[Tensor], about: Hashable, compute: Callable[[], Any]) -> _Promise:
        """Begin to compute; what was begun with the same tensors is void."""
        void = [promise for promise in self._promises if promise.inputs[0] is inputs[0]]
        for promise in void:
            promise.task.cancel()
            self._promises.remove(promise)
        made = _Promise(inputs, _versions(inputs), about, self._worker.start(compute, inputs))
        self._promises.append(made)
        return made


def _are(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]
