"""Read the pages of documentation: their commands, settings, links, and the options in their prose.

A block of code names its language. An HTML comment on the lines before a block says how it is used:

- none, before ``sh`` or ``python``: it is run, in the order of the page;
- ``not run: REASON``, before ``sh`` or ``python``: it is only parsed;
- ``params.yaml``, before ``yaml``: it is merged into params.yaml;
- ``file: PATH``: it is written to that file, and later commands read it. Code is not run.
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
    "CONTRIBUTING.md",
    "data/README.md",
    "cache/README.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")),
]
LANGUAGES = {"csv", "python", "sh", "text", "xml", "yaml"}

_COMMENT = re.compile(r"<!--\s*(.*?)\s*-->", re.DOTALL)
_OF_FOLDERS = {"cd", "git"}  # commands whose word `gmpipe` is the name of a folder
_ENDS = {"&", "&&", "|", "||", ";"}  # end a command in a shell line of several


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: the page's name.
        line: the line of its fence, from 1.
        language: what the fence names; empty if it names none.
        text: its content.
        comment: the HTML comment directly before it; empty if there is none.
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
        """Why its commands are not run; None if they are run."""
        kind, _, reason = self.comment.partition("not run:")
        return reason.strip() if not kind and reason else None

    @property
    def file(self) -> str | None:
        """The file that it is written to, if it is."""
        kind, _, path = self.comment.partition("file:")
        return path.strip() if not kind and path else None

    @property
    def lines(self) -> list[str]:
        """The commands, without comments; lines that end in a backslash are joined."""
        joined = self.text.replace("\\\n", " ").splitlines()
        return [line for line in joined if line.strip() and not line.lstrip().startswith("#")]


@dataclass(frozen=True)
class Page:
    """A page.

    Attributes:
        name: its path in the checkout.
        blocks: the fenced and indented blocks, in order.
        spans: the code in prose, each with its line.
        links: the targets of links, each with its line.
        anchors: the anchors of the headings.
        headings: the code in headings, each with its line.
    """

    name: str
    blocks: list[Block] = field(default_factory=list)
    spans: list[tuple[int, str]] = field(default_factory=list)
    links: list[tuple[int, str]] = field(default_factory=list)
    anchors: list[str] = field(default_factory=list)
    headings: list[tuple[int, str]] = field(default_factory=list)


def read_page(name: str, text: str | None = None) -> Page:
    """Read a page of the checkout, or ``text`` instead."""
    page = Page(name)
    tokens = MarkdownIt("commonmark").enable("table").parse(text or (ROOT / name).read_text())
    for position, token in enumerate(tokens):
        line = token.map[0] + 1 if token.map else 0
        if token.type in ("fence", "code_block"):
            before = tokens[position - 1] if position else None
            match = _COMMENT.fullmatch(before.content.strip()) if _is_html(before) else None
            comment = " ".join(match[1].split()) if match else ""
            language = token.info.strip() if token.type == "fence" else "text"  # an indented one
            page.blocks.append(Block(name, line, language, token.content, comment))
        elif token.type == "inline":
            heading = tokens[position - 1].type == "heading_open"
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
    """Make an anchor as GitHub does: lower case, hyphens for blanks, no other signs, numbered."""
    text = "".join(child.content for child in heading.children or ())
    slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
    same = sum(bool(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", anchor)) for anchor in before)
    return f"{slug}-{same}" if same else slug


def commands(line: str) -> Iterator[list[str]]:
    """Split a shell line into its commands, each a list of words; a redirection ends a command."""
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
    """The arguments after `gmpipe`, also if `torchrun` or `env` calls it; None if nothing does."""
    if words[0] in _OF_FOLDERS or "gmpipe" not in words:
        return None
    return list(words[words.index("gmpipe") + 1 :])
