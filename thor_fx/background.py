"""Work in the background: beside the thread that asks for it, and on a GPU beside its stream.

On a CPU a thread is enough: torch holds no lock of Python's while it computes. On a GPU the same thread
queues the work on a stream of its own, which starts behind what the asking stream has been given so far.
Nobody waits for the device: whoever fetches the result makes *its stream* wait for it.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
    """One thread, which begins with the first task and ends when the worker is dropped."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix=THREAD)

    def start(self, compute: Callable[[], Any], inputs: Sequence[Tensor]) -> "Task":
        """Begin to compute a nest of tensors.

        Args:
            compute: it reads ``inputs``, and no other tensors that anybody writes.
            inputs: tensors on one device; at least one.
        """
        device = inputs[0].device
        stream = None if device.type == "cpu" else _beside(inputs, device)
        return Task(self._pool.submit(_work, compute, stream), device)


class Task:
    """Something that is being computed."""

    def __init__(self, future: "Future[tuple[Any, torch.cuda.Event | None]]", device: torch.device) -> None:
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


def _work(
    compute: Callable[[], Any], stream: torch.cuda.Stream | None
) -> tuple[Any, torch.cuda.Event | None]:
    """The result, and on a GPU the event after which it is there."""
    with torch.no_grad():  # NOTE: that of the asking thread does not count here
        if stream is None:
            return compute(), None
        with torch.cuda.stream(stream):
            return compute(), stream.record_event()
