"""Work in the background: beside the thread that asks for it, and on a GPU beside its stream.

On a CPU a thread is enough: torch holds no lock of Python's while it computes. On a GPU the same thread
queues the work on a stream of its own, which starts behind what the asking stream has been given so far.
Nobody waits for the device: whoever fetches the result makes *its stream* wait for it.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

THREAD = "thor_fx background"
"""What the threads are called."""

FAILED = "this happened in the background, some steps ago (refresh_async=True)"


def can_work(device: torch.device) -> bool:
    """Whether there is a background on this kind of device."""
    return device.type in {"cpu", "cuda"}


class Worker:
    """Does one task after the other, in a thread that ends when there is none left.

    Not a daemon: a program that ends meanwhile waits for the task, which torch does not survive otherwise.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[Callable[[], None]] = deque()
        self._busy = False

    def start(self, compute: Callable[[], Any], inputs: Sequence[Tensor]) -> "Task":
        """Begin to compute a nest of tensors.

        Args:
            compute: it reads ``inputs``, and no other tensors that anybody writes.
            inputs: tensors on one device; at least one.
        """
        device = inputs[0].device
        stream = None if device.type == "cpu" else _beside(inputs, device)
        future: Future[_Done] = Future()
        with self._lock:
            self._waiting.append(lambda: _run(future, compute, stream))
            if not self._busy:
                self._busy = True
                threading.Thread(target=self._all, name=THREAD).start()
        return Task(future, device)

    def _all(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._busy = False
                    return
                task = self._waiting.popleft()
            task()
            del task  # and with it the tensors that it has read


_Done = tuple[Any, torch.cuda.Event | None]
"""A result, and on a GPU the event after which it is there."""


class Task:
    """Something that is being computed."""

    def __init__(self, future: "Future[_Done]", device: torch.device) -> None:
        self._future = future
        self._device = device

    def result(self) -> Any:
        """What was computed, for the current stream; or the error is raised that stopped it."""
        try:
            result, done = self._future.result()
        except Exception as error:
            error.add_note(FAILED)
            raise
        if done is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(done)
            # NOTE: the memory belongs to the other stream, which must not reuse it before this one has read
            _record(pytree.tree_leaves(result), current)
        return result

    def cancel(self) -> None:
        """Do not begin, if that has not happened yet; nobody will ask for the result."""
        self._future.cancel()


def _beside(inputs: Sequence[Tensor], device: torch.device) -> torch.cuda.Stream:
    """A stream that starts when all is done that writes the inputs."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    _record(inputs, stream)  # if their last owner drops them, their memory is not reused before they are read
    return stream


def _record(tensors: Sequence[Any], stream: torch.cuda.Stream) -> None:
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            tensor.record_stream(stream)


def _run(future: "Future[_Done]", compute: Callable[[], Any], stream: torch.cuda.Stream | None) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(_work(compute, stream))
    except BaseException as error:  # to be raised where somebody waits
        future.set_exception(error)


def _work(compute: Callable[[], Any], stream: torch.cuda.Stream | None) -> _Done:
    with torch.no_grad():  # NOTE: that of the asking thread does not count here
        if stream is None:
            return compute(), None
        with torch.cuda.stream(stream):
            return compute(), stream.record_event()
