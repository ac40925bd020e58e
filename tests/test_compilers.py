"""Without a compiler everything is imported and interpreted; Inductor's need is named when it compiles."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from thor_fx.inductor import COMPILER_ERRORS, InductorError, NoCompiler, TritonMissing, tell_of_compiler

SCRIPT = Path(__file__).with_name("without_compiler.py")
DOORS = ["plain forward", "forward of a factor step", "Thor.step", "compile_step"]


def seen(backends: list[str], tmp_path: Path) -> list[str]:
    """What :mod:`without_compiler` prints where there is no compiler, and nothing compiled before."""
    hidden = {"CXX", "CC", "TORCH_INDUCTOR_INSTALL_GXX"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-W", "ignore", SCRIPT, *backends]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(sys.platform == "win32", reason="another compiler is looked for there")
def test_a_missing_compiler_is_named_by_what_needs_it(tmp_path: Path):
    lines = seen(["inductor", "aot_eager"], tmp_path)
    assert lines[len(DOORS) :] == ["it works"] * len(DOORS)
    for door, line in zip(DOORS, lines[: len(DOORS)], strict=True):
        assert line.startswith("NoCompiler: backend='inductor' writes C++ for a CPU, and there is no"), door
        assert "apt install g++" in line
        assert "pass backend='aot_eager' to thor_fx.compile or thor_fx.compile_step" in line
        assert "torch says: No working C++ compiler found" in line


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (TritonMissing(None), "Triton does not work here: pip install triton"),
        (InductorError(TritonMissing(None), None), "Triton does not work here: pip install triton"),
        (
            InductorError(RuntimeError("Failed to find C compiler. Please specify via CC ..."), None),
            "builds its launchers with a C compiler, and there is none",
        ),
    ],
    ids=["bare", "wrapped", "triton's own"],
)
def test_what_a_gpu_needs_is_named(error, text):
    """As Inductor and Triton raise it where there is a GPU."""
    assert isinstance(error, COMPILER_ERRORS)
    with pytest.raises(NoCompiler, match=text) as caught:
        tell_of_compiler(error)
    assert caught.value.__cause__ is error


def test_other_errors_of_inductor_are_not_touched():
    tell_of_compiler(InductorError(RuntimeError("a bug"), None))
