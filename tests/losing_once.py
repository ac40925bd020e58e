"""Run a script of which rank 1 ends once: ``torchrun --max-restarts 1 losing_once.py SCRIPT ARGUMENT...``.

``LOST_IN`` says when: ``step 25``, or ``save 3``, in the middle of writing a checkpoint; counted from 1.
"""

import os
import runpy
import sys
from typing import Any

from torch.distributed.checkpoint import FileSystemWriter

import thor_fx


def end_in(owner: type, method: str, call: int) -> None:
    """End this process in a call of a method."""
    original, calls = getattr(owner, method), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os._exit(17)
        return original(*args, **kwargs)

    setattr(owner, method, counted)


if __name__ == "__main__":
    what, call = os.environ["LOST_IN"].split()
    if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
        end_in(*{"step": (thor_fx.Thor, "step"), "save": (FileSystemWriter, "write_data")}[what], int(call))
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
