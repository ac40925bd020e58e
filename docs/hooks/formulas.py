"""Formulas as MathML, which browsers draw themselves: no script, and nothing to load."""

import html
import re

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)
DELIMITERS = {"span": ("\\(", "\\)"), "div": ("\\[", "\\]")}


def on_page_content(content: str, **_: object) -> str:
    """Replace what ``pymdownx.arithmatex`` has found."""
    return FORMULA.sub(drawn, content)


def drawn(match: re.Match[str]) -> str:
    """One formula."""
    start, end = DELIMITERS[match[1]]
    latex = html.unescape(match[2]).strip().removeprefix(start).removesuffix(end)
    if match[1] == "span":
        return convert(latex)
    return f'<div class="formula">{convert(latex, display="block")}</div>'
