"""Nothing is printed unless it is asked for, and then what was."""

import logging
import os
import subprocess
import sys

import pytest

from thor_fx import logs

PROGRAM = """
import torch
import thor_fx

model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
model = thor_fx.compile(model, backend="aot_eager")
opt = thor_fx.Thor(model, lr=0.1, damping=0.1, momentum=0.9)
model(torch.randn(4, 3)).square().mean().backward()
opt.step()
tx = thor_fx.thor(0.1, 0.1, 0.9)
step = thor_fx.compile_step(lambda p, x: (x @ p["w"]).square().mean(), tx, backend="eager")
step.init({"w": torch.ones(3, 2)}, torch.randn(4, 3))
"""


def run(wanted: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "THOR_FX_LOGS": wanted, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False
    )


def test_what_is_asked_for_is_printed():
    done = run("passes, +sites")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert "[thor_fx.sites] graph 0: 1 layers" in lines
    assert "[thor_fx.sites] step: 1 layers" in lines
    assert "  0.weight: linear, A 3x3, G 2x2, rows 4, uses 1" in lines
    assert "[thor_fx.sites] elementwise: 1.weight, 1.bias" in lines
    assert any(line.startswith("[thor_fx.passes] emit_factors: +") for line in lines)
    assert any(line.startswith("  0.bias: a vector") for line in lines)
    assert "def forward" not in done.stderr, "that is for +passes"


def test_nothing_is_said_to_those_who_do_not_ask():
    done = run("")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"must name some of \['passes', 'sites'\], got 'pases'"):
        logs.configure("sites,pases")
    assert not logging.getLogger("thor_fx.sites").handlers, "nothing is changed"
