"""What README.md and docs/ show is what happens."""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import types
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run:(.*?)-->\n\Z", re.DOTALL)


class Block(NamedTuple):
    """A fenced block; ``line`` is where its code starts, ``exempt`` the reason why it is not run."""

    path: Path
    line: int
    language: str
    code: str
    exempt: str | None


def blocks(text: str, path: Path) -> list[Block]:
    found = []
    for match in FENCE.finditer(text):
        comment = NOT_RUN.search(text[: match.start()])
        line = text.count("\n", 0, match.start(2)) + 1
        found.append(Block(path, line, *match.groups(), comment[1].strip() if comment else None))
    return found


def run_block(block: Block, monkeypatch: pytest.MonkeyPatch) -> dict:
    """Execute ``block`` as a module of its own; tracebacks name the line of the document."""
    module = types.ModuleType(f"block_at_line_{block.line}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    code = "\n" * (block.line - 1) + block.code
    exec(compile(code, str(block.path), "exec"), module.__dict__)
    return module.__dict__


DOCUMENTS = [README, *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [block for path in DOCUMENTS for block in blocks(path.read_text(), path)]
COMMANDS = [
    command
    for block in blocks(README.read_text(), README)
    if block.language in {"bash", "sh"}
    for line in block.code.replace("\\\n", " ").splitlines()
    if (command := shlex.split(line, comments=True))
]


@pytest.mark.parametrize(
    "block",
    [block for block in BLOCKS if block.language == "python"],
    ids=lambda block: f"{block.path.relative_to(ROOT).as_posix()}:{block.line}",
)
def test_python_block(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if block.exempt is not None:
        assert block.exempt, "say why this block is not run"
        pytest.skip(block.exempt)
    monkeypatch.chdir(tmp_path)
    run_block(block, monkeypatch)


def test_readme_names_the_main_commands():
    assert ["pip", "install", ".[dev]"] in COMMANDS
    assert ["pytest", "-n", "2"] in COMMANDS
    assert ["python", "-m", "thor_fx", "demo"] in [command[:4] for command in COMMANDS]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_command_exists(command: list[str]):
    match command:
        case ["python", "-m", module, *arguments]:
            check_help(["-m", module, *arguments])
        case ["python", script, *_]:
            assert (ROOT / script).is_file()
        case ["pip", "install", *_, target] if "[" in target:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert target.partition("[")[2].rstrip("]") in extras
        case ["bash", script, *_]:
            assert (ROOT / script).is_file()
        case [program, *_]:
            assert shutil.which(program) or program in {"cd", "git", "source", "."}


def check_help(arguments: list[str]) -> None:
    """Ask a command for its help, from the checkout's root as a reader would, and find its options there."""
    words = [word for word in arguments[2:] if not word.startswith("-")][:1]
    command = [sys.executable, *arguments[:2], *words, "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    for option in (word.partition("=")[0] for word in arguments[2:] if word.startswith("--")):
        assert option in shown.stdout


def test_blocks_are_found_with_their_lines_and_reasons():
    text = "# T\n\n```python\nx = 1\n```\n\n<!-- not run: slow -->\n```python\ny = 2\n```\n```bash\nls\n```\n"
    path = Path("x.md")
    assert blocks(text, path) == [
        Block(path, 4, "python", "x = 1\n", None),
        Block(path, 9, "python", "y = 2\n", "slow"),
        Block(path, 12, "bash", "ls\n", None),
    ]


def test_a_block_that_fails_is_reported_at_its_line(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ZeroDivisionError) as caught:
        run_block(Block(Path("x.md"), 7, "python", "def f():\n    return 1 / 0\nf()\n", None), monkeypatch)
    assert [entry.lineno + 1 for entry in caught.traceback][-2:] == [9, 8]
