"""The wheel and the source distribution hold the package and nothing else, and it runs from there."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
AT_LEAST = "77"  # pyproject.toml: the first that knows licences as SPDX expressions
BUILT_FROM = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "passes", "thor_fx")
CACHES = shutil.ignore_patterns("__pycache__", "golden")
GENERATED = re.compile(r"__pycache__|\.py[co]$|\.egg-info")


def build(source: Path, kind: str, into: Path) -> Path:
    """What ``python -m build --no-isolation`` does."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(into)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return into / done.stdout.splitlines()[-1]


def checkout(into: Path) -> Path:
    """A copy of what is built from, with the link from thor_fx/passes to passes/ as git has it."""
    into.mkdir()
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, into / name, symlinks=True, ignore=CACHES)
        else:
            shutil.copy(ROOT / name, into / name)
    shutil.copytree(ROOT / "tests", into / "tests", ignore=CACHES)
    return into


def sources(folder: str, prefix: str) -> set[str]:
    """The files of a package in the checkout, as an installation has them."""
    files = (path for path in (ROOT / folder).rglob("*") if path.is_file())
    names = {path.relative_to(ROOT / folder).as_posix() for path in files if not GENERATED.search(str(path))}
    return {f"{prefix}/{name}" for name in names if not name.startswith("passes/")}


PACKAGE = sources("thor_fx", "thor_fx") | sources("passes", "thor_fx/passes")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel and the source distribution of the checkout."""
    pytest.importorskip("setuptools", AT_LEAST)
    folder = tmp_path_factory.mktemp("packaging")
    source = checkout(folder / "source")
    (folder / "dist").mkdir()
    sdist = build(source, "sdist", folder / "dist")
    return build(source, "wheel", folder / "dist"), sdist


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_sources_are_found():
    suffixes = {Path(name).suffix for name in PACKAGE}
    assert suffixes == {".py", ".css", ".html", ".js", ".typed"}
    assert {"thor_fx/py.typed", "thor_fx/passes/splice.py", "thor_fx/page/page.html"} <= PACKAGE


def test_the_wheel_has_the_package_and_nothing_else(built):
    names = set(contents(built[0]))
    assert {name for name in names if ".dist-info/" not in name} == PACKAGE
    about = {name.partition(".dist-info/")[2] for name in names if ".dist-info/" in name}
    assert about == {"METADATA", "RECORD", "WHEEL", "top_level.txt", "licenses/LICENSE"}


def test_the_source_distribution_builds_the_same_wheel(built, tmp_path):
    wheel, sdist = built
    with tarfile.open(sdist) as archive:
        members = [member for member in archive.getmembers() if not GENERATED.search(member.name)]
        assert all(member.isfile() or member.isdir() for member in members), "no links"
        archive.extractall(tmp_path, filter="data")
    names = {member.name.partition("/")[2] for member in members if member.isfile()}
    in_packages = sources("thor_fx", "thor_fx") | sources("passes", "passes")
    assert names == in_packages | {*BUILT_FROM[:4], "PKG-INFO", "setup.cfg"}
    (tmp_path / "dist").mkdir()
    again = build(tmp_path / members[0].name.partition("/")[0], "wheel", tmp_path / "dist")
    assert again.name == wheel.name
    assert contents(again) == contents(wheel)


def test_the_metadata_says_what_the_project_says(built):
    name = next(name for name in contents(built[0]) if name.endswith("METADATA"))
    text = contents(built[0])[name].decode()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in [
        f"Version: {project['version']}",
        "License-Expression: Apache-2.0",
        "Requires-Python: >=3.11",
        "Description-Content-Type: text/markdown",
        *(f"Requires-Dist: {each}" for each in project["dependencies"]),
        *(f"Classifier: {each}" for each in project["classifiers"]),
    ]:
        assert f"\n{line}\n" in text, line
    assert text.endswith((ROOT / "README.md").read_text())


def test_readmes_first_example_runs_from_the_wheel(built, tmp_path):
    """Interpreted: compiled it is one of the blocks of test_readme.py."""
    pytest.importorskip("sklearn")
    readme = (ROOT / "README.md").read_text()
    example = re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)[0]
    assert "thor_fx.compile(model)" in example
    code = example.replace("thor_fx.compile(model)", "thor_fx.compile(model, backend='aot_eager')")
    code = code.replace("range(10)", "range(2)")
    code += "\nprint(thor_fx.__file__, thor_fx.passes.__file__)\n"
    with zipfile.ZipFile(built[0]) as archive:
        archive.extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *epochs, files = done.stdout.splitlines()
    assert len(epochs) == 2
    losses = [float(line.rpartition(" ")[2]) for line in epochs]
    assert losses[-1] < losses[0]
    assert all(Path(file).is_relative_to(tmp_path / "site") for file in files.split())
