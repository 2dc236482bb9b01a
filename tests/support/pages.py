"""What the pages of documentation hold: commands, settings, links, and options named in prose.

A block of code says its language. An HTML comment on the lines before a block says what it is:

- none, before ``sh``: the commands are run, in the order of the page;
- ``not run: REASON``, before ``sh``: they are only parsed;
- ``params.yaml``, before ``yaml``: it is merged into params.yaml;
- ``file: PATH``: it is written to that file, which the commands after it read.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from flows import ROOT
from markdown_it import MarkdownIt
from markdown_it.token import Token

PAGES = [
    "README.md",
    "data/README.md",
    "cache/README.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")),
]
LANGUAGES = {"bibtex", "csv", "python", "sh", "text", "xml", "yaml"}

_COMMENT = re.compile(r"<!--\s*(.*?)\s*-->", re.DOTALL)
_ENDS = {"&", "&&", "|", "||", ";"}  # of a command, where a shell line has several


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        line: of its fence, from 1.
        language: as the fence names it; empty if it names none.
        text: what stands in it.
        comment: the HTML comment just before it; empty if there is none.
    """

    page: str
    line: int
    language: str
    text: str
    comment: str

    @property
    def where(self) -> str:
        return f"{self.page}, line {self.line}"

    @property
    def reason(self) -> str | None:
        """Why its commands are not run; None if they are."""
        kind, _, reason = self.comment.partition("not run:")
        return reason.strip() if not kind and reason else None

    @property
    def lines(self) -> list[str]:
        """The commands: lines, those that a backslash continues joined, without comments."""
        joined = self.text.replace("\\\n", " ").splitlines()
        return [line for line in joined if line.strip() and not line.lstrip().startswith("#")]


@dataclass(frozen=True)
class Page:
    """A page.

    Attributes:
        spans: code within prose, with its line.
        links: where links lead, with their line.
        anchors: of its headings.
        headings: code in headings, with its line.
    """

    name: str
    blocks: list[Block] = field(default_factory=list)
    spans: list[tuple[int, str]] = field(default_factory=list)
    links: list[tuple[int, str]] = field(default_factory=list)
    anchors: list[str] = field(default_factory=list)
    headings: list[tuple[int, str]] = field(default_factory=list)


def read_page(name: str, text: str | None = None) -> Page:
    """Read a page of the checkout, or ``text`` in its place."""
    page = Page(name)
    tokens = MarkdownIt("commonmark").enable("table").parse(text or (ROOT / name).read_text())
    for place, token in enumerate(tokens):
        line = token.map[0] + 1 if token.map else 0
        if token.type in ("fence", "code_block"):
            before = tokens[place - 1] if place else None
            found = _COMMENT.fullmatch(before.content.strip()) if _is_html(before) else None
            comment = " ".join(found[1].split()) if found else ""
            language = token.info.strip() if token.type == "fence" else "text"  # an indented one
            page.blocks.append(Block(name, line, language, token.content, comment))
        elif token.type == "inline":
            heading = tokens[place - 1].type == "heading_open"
            if heading:
                page.anchors.append(_anchor(token, page.anchors))
            for child in token.children or ():
                if child.type == "code_inline":
                    (page.headings if heading else page.spans).append((line, child.content))
                elif child.type == "link_open":
                    page.links.append((line, str(child.attrs["href"])))
    return page


def _is_html(token: Token | None) -> bool:
    return token is not None and token.type == "html_block"


def _anchor(heading: Token, before: Sequence[str]) -> str:
    """As GitHub makes it: lower case, hyphens for blanks, other signs left out, numbered."""
    text = "".join(child.content for child in heading.children or ())
    slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
    same = sum(bool(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", one)) for one in before)
    return f"{slug}-{same}" if same else slug


def commands(line: str) -> Iterator[list[str]]:
    """The commands of a shell line, each as its words; redirections end a command."""
    words: list[str] = []
    for word in shlex.split(line, comments=True):
        if word in _ENDS or word.startswith((">", "2>")):
            if words:
                yield words
            words = []
        else:
            words.append(word)
    if words:
        yield words


def gmpipe_arguments(words: Sequence[str]) -> list[str] | None:
    """What follows `gmpipe`, whoever calls it (`torchrun`, an environment); None if nobody does."""
    return list(words[words.index("gmpipe") + 1 :]) if "gmpipe" in words else None
