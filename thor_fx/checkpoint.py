"""Checkpoints of one process in one file: there as a whole or not at all, and read without running code.

``torch.save`` writes into the file that it is given, so a process that is killed meanwhile leaves half of
one. ``torch.load`` does not look at the checksums that ``torch.save`` has written: a bit that has flipped on
a disk is a weight that is wrong. :func:`save` and :func:`load` add these two things to them, and nothing
else; several ranks have :mod:`thor_fx.distributed.checkpoint`.
"""

import os
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from .state_classes import STATE_CLASSES

File = str | os.PathLike[str]


def save(file: File, state: Any) -> None:
    """Save like ``torch.save``, in place of what the file held: that is there until all of this is.

    Args:
        file: its folder exists; a file of the same name with ``.tmp`` behind it is written first.
        state: tensors, numbers and texts in dicts, lists and tuples, e.g.
            ``{"model": net.state_dict(), "optimizer": opt.state_dict()}``, or the ``params`` and ``state`` of
            a functional step.

    Example:
        >>> save("checkpoint.pt", {"weight": torch.ones(2), "epoch": 1})
        >>> load("checkpoint.pt")
        {'weight': tensor([1., 1.]), 'epoch': 1}
    """
    target = Path(file)
    unfinished = target.with_name(f"{target.name}.tmp")
    with unfinished.open("wb") as stream:
        torch.save(state, stream)
        stream.flush()
        os.fsync(stream.fileno())  # or else, after a loss of power, the new name may be that of an empty file
    unfinished.replace(target)


def load(file: File, *, device: torch.device | str | None = None) -> Any:
    """Load what :func:`save` or ``torch.save`` has written, and nothing that would run code.

    Args:
        file: of the checkpoint.
        device: where the tensors go; None: where they were.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint, or only the beginning of one, or not what was written.
        pickle.UnpicklingError: it has something in it that ``torch.load(weights_only=True)`` refuses; for
            classes of your own there is ``torch.serialization.safe_globals``.
    """
    with Path(file).open("rb") as stream:
        check_sums(stream, repr(str(file)))
        stream.seek(0)
        with torch.serialization.safe_globals([*STATE_CLASSES]):
            return torch.load(stream, map_location=device, weights_only=True)


def check_sums(stream: IO[bytes], name: str) -> None:
    """Compare with the checksum of every record.

    Raises:
        ValueError: they differ, or there are none.
    """
    try:
        with zipfile.ZipFile(stream) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
        raise ValueError(
            f"{name} is no checkpoint, or a damaged one, or a part of one ({error}): take the one before"
        ) from None
    if damaged is not None:
        raise ValueError(
            f"{name} is damaged: {damaged!r} in it is not what was written (CRC-32): take the one before"
        )
