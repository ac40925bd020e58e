"""The documents build as a site: strictly, with every link, picture and public name in it."""

import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib import import_module
from inspect import get_annotations
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("mkdocs", reason='the site needs: pip install -e ".[docs]"')

ROOT = Path(__file__).parents[1]
PUBLIC = ("thor_fx", "thor_fx.passes", "thor_fx.graphs", "thor_fx.page")
CHECKPOINTS = "thor_fx.distributed.checkpoint"
MODULES = (*PUBLIC, CHECKPOINTS, "thor_fx.passes.outputs", "thor_fx.plots")
TEXT, VERBATIM = {"p", "li", "td"}, {"pre", "code", "script", "style"}
MARKUP = re.compile(r"^([-*] |\d+\. |\|.*\||#+ )|\$\$|\]\(|:(?:class|func|mod|meth):`", re.MULTILINE)


class Page(HTMLParser):
    """What a page links to, where it can be linked to, and text that should have become markup."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.left_over: list[str] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        self.links += [given[name] for name in ("href", "src") if given.get(name)]
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag in TEXT | VERBATIM:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._open and self._open[-1] == tag:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in TEXT and not VERBATIM & {*self._open} and MARKUP.search(data):
            self.left_over.append(data.strip())


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Page]:
    """Every page of the site, by its file."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return {path: Page(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.html"))}


def broken(site: dict[Path, Page]) -> Iterator[str]:
    for path, page in site.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if parts.scheme not in {"http", "https", "mailto"} or not (parts.netloc or parts.path):
                    yield f"{path.name}: {link} is no address"
                continue
            if path.name == "404.html":  # its links are absolute: it is shown anywhere
                continue
            goal = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            goal = goal / "index.html" if goal.is_dir() else goal
            if not goal.is_file():
                yield f"{path.name}: {link} leads to nothing"
            elif parts.fragment and goal in site and unquote(parts.fragment) not in site[goal].anchors:
                yield f"{path.name}: {link} has no such anchor"


def test_every_link_and_picture_leads_somewhere(site: dict[Path, Page]):
    assert sum(len(page.links) for page in site.values()) > 1000
    assert list(broken(site)) == []


def test_no_markup_is_left_in_the_text(site: dict[Path, Page]):
    assert {path.name: page.left_over for path, page in site.items() if page.left_over} == {}


def test_the_reference_has_every_public_name_and_no_private_one(site: dict[Path, Page]):
    anchors = {a for path, page in site.items() if path.parent.name == "api" for a in page.anchors}
    public = {f"{module}.{name}" for module in PUBLIC for name in import_module(module).__all__}
    public |= {f"{CHECKPOINTS}.{name}" for name in ("save", "load", "newest")}
    assert public - anchors == set()
    shown = {anchor for anchor in anchors if anchor.startswith("thor_fx.")}
    assert [name for name in shown if re.search(r"\._(?!_)", name) or not exists(name)] == []


def exists(name: str) -> bool:
    """Whether a name of the reference is that of an object (a function may hide the module it comes from)."""
    module = max((m for m in MODULES if name.startswith(f"{m}.")), key=len)
    found: Any = import_module(module)
    for part in name.removeprefix(f"{module}.").split("."):
        bases = getattr(found, "__mro__", ())
        fields = {field for base in bases for field in get_annotations(base)}
        if not hasattr(found, part) and part not in fields:
            return False
        found = getattr(found, part, None)
    return True


def test_what_is_broken_is_found(tmp_path: Path):
    page = tmp_path / "page.html"
    links = '<a href="#here"></a><a href="#there"></a><img src="no.png"><a href="http:"></a>'
    text = f'<p id="here">{links}\n- no list</p>'
    page.write_text(text, encoding="utf-8")
    seen = Page(text)
    found = ["#there has no such anchor", "no.png leads to nothing", "http: is no address"]
    assert list(broken({page: seen})) == [f"page.html: {line}" for line in found]
    assert seen.left_over == ["- no list"]
