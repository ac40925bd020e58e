"""Docstrings as Markdown: what reStructuredText says with roles and double colons.

``:class:`~thor_fx.Every``` becomes a link where the reference has that name, and code where it has not;
``docs/steps.md`` becomes a link to the page, and ``Example:`` the section that griffe knows.
"""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|mod|meth|data|attr):`(~?)\.?([\w.]+)`")
DOCUMENT = re.compile(r"``docs/(\w+)\.md``")
LITERAL = re.compile(r"::(?=\n[ \t]*\n[ \t]+\S)")
EXAMPLE = re.compile(r"^([ \t]*)Example:$", re.MULTILINE)


def as_markdown(text: str) -> str:
    """The text of a docstring."""
    text = ROLE.sub(_reference, text)
    text = DOCUMENT.sub(r"[docs/\1.md](../\1.md)", text)
    text = EXAMPLE.sub(r"\1Examples:", text)
    return LITERAL.sub(":", text)


def _reference(match: re.Match[str]) -> str:
    short, name = match.groups()
    shown = name.rpartition(".")[2] if short else name
    return f'<autoref identifier="{name}" optional>`{shown}`</autoref>'


class Roles(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
