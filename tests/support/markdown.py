"""README.md and docs/ as the tests read them: code blocks, inline code, links and anchors of each page."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")],
    key=lambda page: page.relative_to(ROOT).as_posix(),
)


@dataclass(frozen=True)
class Snippet:
    """A code block, a span of inline code, or a link's target, and the line of the page where it is."""

    page: Path
    line: int
    text: str
    language: str = ""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@cache
def tokens(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text())


def code_blocks(page: Path) -> Iterator[Snippet]:
    """Fenced blocks with their language, indented ones with none."""
    for token in tokens(page):
        if token.type in ("fence", "code_block"):
            assert token.map
            yield Snippet(page, token.map[0] + 1, token.content, token.info.strip())


def _inline(page: Path) -> Iterator[tuple[int, Token]]:
    for token in tokens(page):
        if token.type == "inline" and token.map:
            yield from ((token.map[0] + 1, child) for child in token.children or ())


def inline_code(page: Path) -> Iterator[Snippet]:
    for line, token in _inline(page):
        if token.type == "code_inline":
            yield Snippet(page, line, token.content)


def links(page: Path) -> Iterator[Snippet]:
    """Targets of links and sources of pictures."""
    for line, token in _inline(page):
        target = token.attrGet("href" if token.type == "link_open" else "src")
        if token.type in ("link_open", "image") and target:
            yield Snippet(page, line, str(target))


def anchors(page: Path) -> set[str]:
    """The ids that hosting services give to headings: lower case, punctuation dropped, spaces as hyphens."""
    found = set()
    parsed = tokens(page)
    for opening, heading in pairwise(parsed):
        if opening.type == "heading_open":
            text = "".join(child.content for child in heading.children or ())
            found.add(re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-"))
    return found
