"""Under ``TORCH_TRACE`` every pass is an artifact in torch's structured log."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from thor_fx.trace_log import tracer

TRAINING = """
import torch, thor_fx
from torch import nn

loss_fn = lambda params, x: (x @ params["w"]).square().mean()
tx = thor_fx.thor(lr=0.1, damping=0.1, momentum=0.9, frequency=2)
step = thor_fx.compile_step(loss_fn, tx, backend="eager")
step.init({"w": torch.ones(3, 2)}, torch.eye(3))

model = thor_fx.compile(nn.Linear(3, 2), backend="aot_eager")
opt = thor_fx.Thor(model, lr=0.1, damping=0.1, momentum=0.9)
model(torch.eye(3)).square().mean().backward()
opt.step()
"""


def artifacts(log: str) -> Iterator[tuple[str, str]]:
    """Name and payload of every artifact of ours: metadata in a line, payload in the lines with a tab."""
    name, payload = None, []
    for line in [*log.splitlines(), "V end] {}"]:
        if line.startswith("\t"):
            payload.append(line[1:])
            continue
        if name is not None:
            yield name, "\n".join(payload)
        record = json.loads(line[line.index("{") :])
        found = record.get("artifact", {}).get("name", "")
        name, payload = (found if found.startswith("thor_fx_") else None), []


def test_every_stage_of_both_doors_is_in_the_log(tmp_path: Path):
    environment = {**os.environ, "TORCH_TRACE": str(tmp_path)}
    command = [sys.executable, "-c", TRAINING]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (log,) = tmp_path.glob("*.log")
    found = dict(artifacts(log.read_text()))
    expected = ["step_0_canonicalize", "refresh_step_0_emit_factors", "refresh_step_1_append_update"]
    expected += ["refresh_step_3_accumulate", "plain_step_0_append_update", "plain_step_3_return_forward"]
    expected += ["factor_graph_0_emit_factors", "update_0_append_update"]
    assert {f"thor_fx_{name}" for name in expected} <= found.keys()
    text = found["thor_fx_factor_graph_0_emit_factors"]
    assert text.startswith("emit_factors: +")
    assert "+2  aten.mm.default" in text
    assert "def forward(" in text


def test_without_a_trace_there_is_no_watcher():
    # torch's own handler takes itself away at the first record, if there is no folder
    import torch._logging

    torch._logging.trace_structured("artifact", lambda: {"name": "nothing"}, expect_trace_id=False)
    assert tracer("step") is None
