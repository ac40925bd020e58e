"""Types of command line arguments, with messages that say what is wrong."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import torch


def positive(text: str) -> int:
    """A whole number above zero."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


positive.__name__ = "number"  # argparse: "invalid number value: 'x'"


def device(text: str) -> torch.device:
    """A device that tensors can be made on."""
    try:
        found = torch.device(text)
        torch.zeros((), device=found).item()
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"cannot use device {text!r}: {reason}") from None
    return found


def file(*suffixes: str) -> Callable[[str], Path]:
    """A file of one of some kinds, in a folder that can be written to."""

    def path_of(text: str) -> Path:
        path = Path(text)
        if path.suffix not in suffixes:
            one_of = f"one of {', '.join(suffixes)}" if len(suffixes) > 1 else suffixes[0]
            raise argparse.ArgumentTypeError(f"{text!r} must end in {one_of}")
        if not os.access(path.absolute().parent, os.W_OK):
            raise argparse.ArgumentTypeError(f"cannot write to the folder of {text!r}")
        return path

    return path_of
