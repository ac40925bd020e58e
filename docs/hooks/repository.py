"""Documents outside of ``docs/`` as pages, and links between documents that work here and in the repository.

README.md is the first page, CHANGELOG.md and others keep their names, and so do the documents, pictures and
results of ``benchmarks/``; a script of ``examples/`` is a page with its code. In documents, links are those
of the repository: ``../benchmarks/README.md``. Here they become links from page to page. One that leads to
nothing is left as it is: ``tests/test_docs_site.py`` finds it.
"""

import ast
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "SECURITY.md": "SECURITY.md",
}
FENCES = re.compile(r"^(```.*?^```)$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
SCHEME = re.compile(r"[a-z]+:|#|/")


def on_files(files: Files, *, config: Any) -> Files:
    """Add what is not in ``docs/``."""
    for path, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    for path in sorted((ROOT / "benchmarks").rglob("*")):
        if path.suffix in {".md", ".png", ".json"}:
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    scripts = sorted((ROOT / "examples").glob("*.py"))
    for script in scripts:
        page = script_page(script)
        files.append(File.generated(config, f"examples/{script.stem}.md", content=page))
    files.append(File.generated(config, "examples/index.md", content=overview(scripts)))
    return files


def script_page(script: Path) -> str:
    """A script as a page: its name, and its code."""
    return f"# {script.name}\n\n`python examples/{script.name}`\n\n```python\n{script.read_text()}```\n"


def overview(scripts: list[Path]) -> str:
    """The list of all scripts, with the first lines of their docstrings."""
    lines = [f"- [{script.name}]({script.stem}.md): {summary(script)}" for script in scripts]
    return "# Examples\n\n" + "\n".join(lines) + "\n"


def summary(script: Path) -> str:
    """The first paragraph of a docstring."""
    docstring = ast.get_docstring(ast.parse(script.read_text())) or ""
    return " ".join(docstring.partition("\n\n")[0].split()).replace("``", "`")


def on_page_markdown(markdown: str, *, page: Any, files: Files, **_: Any) -> str:
    """Links of the repository become links between pages; code is left alone."""
    here = page.file.src_uri
    pages = {origin(file.src_uri): file.src_uri for file in files}

    def link(match: re.Match[str]) -> str:
        path, mark, anchor = match[2].partition("#")
        if SCHEME.match(match[2]):
            return match[0]
        asked = posixpath.normpath(posixpath.join(posixpath.dirname(origin(here)), path))
        found = pages.get(asked) or pages.get(f"{asked}/index.md")
        if found is None:
            return match[0]
        return f"{match[1]}{posixpath.relpath(found, posixpath.dirname(here) or '.')}{mark}{anchor}{match[3]}"

    return "".join(part if code else LINK.sub(link, part) for code, part in parts(markdown))


def parts(markdown: str) -> Iterator[tuple[bool, str]]:
    """Fenced code and what is between it, in order: (whether it is code, text)."""
    for i, part in enumerate(FENCES.split(markdown)):
        yield i % 2 == 1, part


def origin(page: str) -> str:
    """Where in the repository a page comes from."""
    for path, name in PAGES.items():
        if name == page:
            return path
    if page.startswith(("benchmarks/", "examples/")):
        return page
    return f"docs/{page}"
