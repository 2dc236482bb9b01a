r"""Names, labels and other texts of the user, made safe for what they are written into.

File names are bytes, and labels come from files of other programs. So both can hold line breaks,
escape sequences of a terminal, bytes that are not UTF-8, formulas and markup. One escape is used
everywhere: `\xHH` stands for one byte of UTF-8 or of a file name, with two hexadecimal digits. The
backslash of a text that already looks like such an escape is written as `\x5c`. So two texts never
become the same, and whoever replaces each `\xHH` by its byte has the text again.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

LONGEST = 32
"""Characters of a name that a figure shows at most."""

_ESCAPE = r"\\(?=x[0-9a-fA-F]{2})"
_NOT_UTF8 = r"\ud800-\udfff"  # Python reads each byte of a name that is not UTF-8 as one of these
# Control characters, line and paragraph separators, characters that reorder what follows, and
# those that XML does not allow.
_UNPRINTABLE = (
    r"\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufdd0-\ufdef\ufffe\uffff"
)
_STORABLE = re.compile(f"[{_NOT_UTF8}]|{_ESCAPE}")
_PRINTABLE = re.compile(rf"[\n{_NOT_UTF8}{_UNPRINTABLE}]|{_ESCAPE}")
_PRINTABLE_LINES = re.compile(f"[{_NOT_UTF8}{_UNPRINTABLE}]")
_FORMULA = re.compile(r"'*[=+\-@\t\r]")
# A backslash before a sign of Markdown; an underscore is one at the edge of a word only.
_MARKDOWN = re.compile(r"[`*\[\]|~$]|\\(?=[!-/:-@\[-`{-~])|(?<![^\W_])_|_(?![^\W_])")


def composed(text: str) -> str:
    """A text in Unicode's form NFC, so that two texts that look alike are equal.

    macOS and some programs write `é` as `e` and a combining accent.
    """
    return unicodedata.normalize("NFC", text)


def storable(text: str) -> str:
    r"""Make a text valid Unicode, for JSON and Parquet: a byte that is not UTF-8 becomes `\xHH`."""
    return _STORABLE.sub(_escape, text)


def printable(text: str) -> str:
    r"""Make a text visible, on one line and valid XML: as `storable`, and control characters too.

    Characters that break a line or reorder what follows are control characters here. Each byte of
    their UTF-8 becomes `\xHH`.
    """
    return _PRINTABLE.sub(_escape, text)


def printable_lines(text: str) -> str:
    """Make a message visible whose line breaks are meant: as `printable`, but for these.

    Backslashes stay as they are, since a message may hold names that are escaped already.
    """
    return _PRINTABLE_LINES.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    try:
        written = match[0].encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half of a pair, which JSON allows
        written = match[0].encode("utf-8", "surrogatepass")
    return "".join(f"\\x{byte:02x}" for byte in written)


def legible(text: str, longest: int = LONGEST) -> str:
    """Make a name fit for a figure: as `printable`, and cut after ``longest`` characters."""
    shown = printable(text)
    return shown if len(shown) <= longest else f"{shown[: longest - 1]}\u2026"


def csv_cell(text: str) -> str:
    """Make a text a cell of CSV that a spreadsheet shows and does not compute.

    A text that begins with `=`, `+`, `-`, `@`, a tab or a carriage return gets a `'` in front,
    unless it is a number. So does one that begins with such a mark after one or more `'`: whoever
    removes one `'` from a cell that begins like this has the text again.
    """
    return f"'{text}" if _FORMULA.match(text) and not _is_number(text) else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def markdown(text: str) -> str:
    """Make Markdown that shows a text as it is, on one line."""
    escaped = _MARKDOWN.sub(lambda match: f"\\{match[0]}", printable(text))
    return re.sub(r"&(?=#?\w+;)", "&amp;", escaped).replace("<", "&lt;")


def markdown_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Tabulate texts as GitHub's Markdown, each shown as it is."""
    from tabulate import tabulate  # which the help of a command does not need

    return str(
        tabulate(
            [[markdown(cell) for cell in row] for row in rows],
            [markdown(header) for header in headers],
            tablefmt="github",
            disable_numparse=True,
        )
    )


def printable_json(value: Any) -> Any:
    """Make every text in a JSON value printable, keys included."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {printable_json(key): printable_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [printable_json(inner) for inner in value]
    return value


def counted(number: int, noun: str) -> str:
    """A number of things as people read it, e.g. `1 shard` or `2 shards`; of what takes an s."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def first_few(words: Sequence[str], separator: str = ", ", most: int = 4) -> str:
    """Join words; of more than ``most``, the first of them and the number of the others."""
    more = len(words) - most
    return separator.join([*words[:most], f"and {more} more"] if more > 0 else words)
