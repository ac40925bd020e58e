"""Adapter to torch's structured log: under ``TORCH_TRACE=folder`` tlparse shows every pass as an artifact.

The only module that knows ``torch._logging``. Written for torch 2.11, 2.13 and 2.15.

It is called ``thor_fx_<graph>_<number>_<pass>``: what the pass added and removed, and the code after it.
"""

import itertools
import re

import torch._logging
from torch import fx
from torch._logging import trace_structured

from .passes.stages import Stage, Watch


def tracer(graph: str) -> Watch | None:
    """Writes the stages of one graph to the log; None where torch writes none.

    Args:
        graph: what the graph is called in the log: ``"refresh step"``.
    """
    if not torch._logging._internal.trace_log.handlers:
        return None
    number = itertools.count()

    def write(stage: Stage, _gm: fx.GraphModule) -> None:
        name = re.sub(r"\W+", "_", f"thor_fx_{graph}_{next(number)}_{stage.name}")
        trace_structured(
            "artifact",
            metadata_fn=lambda: {"name": name, "encoding": "string"},
            payload_fn=lambda: f"{stage}\n\n{stage.after}\n",
            expect_trace_id=False,
        )

    return write
