"""Warnings that point at the line of the user's that led to them."""

import sys
import warnings
from pathlib import Path

import torch

from . import passes

_NOT_THE_USERS = tuple(str(Path(file).parent) + "/" for file in (torch.__file__, __file__, passes.__file__))


def warn(text: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the innermost line that is neither torch's nor ours.

    torch wraps the methods of optimizers and modules, another number of times with schedulers, hooks and
    compilers: no fixed ``stacklevel`` leads to the caller.
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, category, stacklevel=level)
