"""YAML that a user wrote: read it, or say in plain words what is wrong with it, and where."""

from __future__ import annotations

import re
import warnings
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, ReusedAnchorWarning, StreamMark, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode
from ruamel.yaml.reader import ReaderError

from pipeline.errors import InputError

_DEEPEST = 20  # blocks in blocks; settings need 6
_LARGEST = 2**63 - 1


def load_yaml(text: str, where: str, remedy: str) -> Any:
    """Read one YAML document.

    Args:
        text: the document.
        where: begins the message of an error: the file, or the option.
        remedy: of the error if it is not YAML.

    Raises:
        InputError: the text is not YAML, has a key or an anchor twice, or a value that is not
            plain, larger than 64 bits, or in too many blocks. Names the line, or the key.
    """
    try:
        with warnings.catch_warnings(action="error", category=ReusedAnchorWarning):
            # Not the library's parser in C, which may be installed and has other messages.
            value = YAML(typ="safe", pure=True).load(text)
    except DuplicateKeyError as error:
        raise _duplicate_key(error, text, where) from error
    except ReusedAnchorWarning as error:
        raise _reused_anchor(error, where) from error
    except (
        YAMLError,
        # What ruamel.yaml runs into for a value that does not fit its tag, such as `!!int x`,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        OverflowError,
        # and for thousands of brackets.
        RecursionError,
    ) as error:
        raise InputError(f"{where} is not valid YAML: {_problem(error, text)}.", remedy) from error
    _check_plain(value, "", where, 0, {})
    return value


# --- what is defined twice -----------------------------------------------------------------------


def _duplicate_key(error: DuplicateKeyError, text: str, where: str) -> InputError:
    """Name the key that stands twice in one block, and both lines."""
    found = re.match(r'found duplicate (?:merge )?key "(.*?)"', str(error.problem), re.DOTALL)
    key = " ".join(found[1].split()) if found else "?"
    second = error.problem_mark.line
    first = _first_line(YAML(typ="safe", pure=True).compose(text), second)
    both = (
        f"line {second + 1}" if first in (None, second) else f"lines {first + 1} and {second + 1}"
    )
    return InputError(
        f"{where}: `{key}` is defined twice, {both}.", "Merge the two, or remove one of them."
    )


def _first_line(document: Node, second: int) -> int | None:
    """The line of the key that the key in line ``second`` repeats; lines are counted from 0."""
    left, known = [document], set()  # aliases can put a block into many places, or into itself
    while left:
        node = left.pop()
        if id(node) in known or not isinstance(node, MappingNode | SequenceNode):
            continue
        known.add(id(node))
        if isinstance(node, SequenceNode):
            left += node.value
            continue
        lines: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line
            if line == second and name in lines:
                return lines[name]
            lines.setdefault(name, line)
            left.append(value)
    return None


def _reused_anchor(error: ReusedAnchorWarning, where: str) -> InputError:
    found = re.search(r"anchor '(.*?)'", str(error))
    lines = re.findall(r"\(line: (\d+)\)", str(error))
    return InputError(
        f"{where}: the anchor `&{found[1] if found else '?'}` is defined twice, lines "
        f"{' and '.join(lines)}.",
        "Give one of them another name.",
    )


# --- what is not YAML ----------------------------------------------------------------------------


_WORDS = {
    "constructor for the tag '(?:tag:yaml.org,2002:)?(.*?)'": (
        "the tag '{0}' is not one of a plain value"
    ),
    r"character '\\t'|found character '\t'": "found a tab, expected blanks",
    "unexpected end of stream": "the quote that opens at {start} is never closed",
    r"expected ',' or '(.)', but got (.*)": (
        "expected `,` or `{0}` in what the bracket at {start} opens, found {found}"
    ),
    r"expected the node content, but found '<stream end>'": "a bracket is opened and never closed",
    r"expected the node content, but found (.*)": "expected a value in brackets, found {found}",
    r"could not find expected ':'": "expected `:` and a blank after `{line}` at {start}",
    r"expected <block end>, but found '<block mapping start>'": (
        "the line is indented like none of the blocks above, expected as many blanks as one of them"
    ),
    r"expected <block end>, but found '\?'": (
        "found a key among the entries of the list at {start}, expected `- `"
    ),
    r"expected <block end>, but found '-'": (
        "found an entry of a list among the keys of the block at {start}, expected a key"
    ),
    r"expected <block end>, but found '<scalar>'": (
        "found text after the end of a value; put the whole value in quotes"
    ),
    r"expected <block end>, but found (.*)": "found {found}, which nothing opens",
    r"character '(.*)' that cannot start any token": (
        "a value can't begin with {found}; put it in quotes"
    ),
    "undefined alias '(.*)'": (
        "'*{0}' stands for an anchor '&{0}', which is not defined above; put it in quotes if it is "
        "text"
    ),
    "sequence entries are not allowed": "the entries of a list begin on a line of their own",
    "for merging, but found": (
        "`<<` takes an alias of a block, or a list of them, found another value"
    ),
    "unknown escape character '(.*)'": (
        "a backslash followed by '{0}' stands for nothing in double quotes; use single quotes"
    ),
    "found unhashable key": (
        "a block or a list can't be a key; put the value in quotes if braces belong to it"
    ),
    "found another document": "a second document begins here, expected one",
    "expected alphabetic or numeric character": (
        "expected a name after `&` or `*`; put the value in quotes if it is text"
    ),
    "expected a comment or a line break|expected chomping": (
        "after `|` or `>`, the text begins on the next line; put the value in quotes if it is text"
    ),
    r"expected '<document start>'|incompatible YAML document|directive": (
        "a line that begins with `%` is a directive of YAML; remove it"
    ),
}
"""What the library's messages contain -> what is wrong. `{0}` is the first thing that the pattern
finds, and `{found}` the last one in words; `{start}` is where something begins, and `{line}` the
text there."""


def _problem(error: Exception, text: str) -> str:
    """Say in one line what breaks YAML's syntax, and where."""
    if isinstance(error, RecursionError):
        return f"blocks or lists are nested more than {_DEEPEST} deep"
    if isinstance(error, ReaderError) and isinstance(error.character, int):
        before = text[: error.position]
        column = error.position - (before.rfind("\n") + 1) + 1
        return (
            f"line {before.count(chr(10)) + 1}, column {column}: the character "
            f"U+{error.character:04X} can't be in a YAML file"
        )
    if not isinstance(error, MarkedYAMLError) or error.problem_mark is None:
        # Without where it is in ruamel.yaml's buffer, and without Python's advice.
        problem = re.split(r"\s+in \"<|;", str(error))[0]
        return problem if isinstance(error, YAMLError) else f"a value can't be read ({problem})"
    return f"{_place(error.problem_mark)}: {_in_words(error, text)}"


def _in_words(error: MarkedYAMLError, text: str) -> str:
    problem = " ".join(str(error.problem).split())
    lines = re.split("\r\n|\n|\r", text)  # as the library counts them
    if "mapping values are not allowed" in problem:
        return _stray_colon(lines, error.problem_mark.line, error.problem_mark.column)
    start = error.context_mark or error.problem_mark
    line = lines[start.line].strip() if start.line < len(lines) else ""
    for pattern, words in _WORDS.items():
        if found := re.search(pattern, problem):
            groups = [group.strip("'") for group in found.groups()]
            last = _named(groups[-1]) if groups else ""
            return words.format(*groups, found=last, start=_place(start), line=line[:100])
    return f"{problem} {error.context or ''}".strip()


def _stray_colon(lines: list[str], number: int, column: int) -> str:
    """Say why a colon can't make a key where it stands."""
    line = lines[number]
    before = next((one for one in reversed(lines[:number]) if one.strip()), "")
    if found := re.match(r"\s*(?:- +)?([\w.-]+):[^\s:/]", before):
        return f"the line above needs a blank after `{found[1]}:`"
    if "\u00a0" in before + line:
        return "found a no-break space (U+00A0), expected a blank"
    if re.search(r":\s", line[:column]):
        return "a second `: ` in the line; put the value in quotes"
    if _indent(line) > _indent(before):
        return "the line is indented more than the one above, which has a value already"
    return "a key can't stand here; check the indentation, and put values with `: ` in quotes"


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _place(mark: StreamMark) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"


def _named(token: str) -> str:
    """What the library calls a token, as people call it."""
    names = {"<stream end>": "the end", "<scalar>": "text", "<block mapping start>": "a block"}
    return names.get(token, f"`{token}`")


# --- values --------------------------------------------------------------------------------------


def _check_plain(value: Any, key: str, where: str, depth: int, known: dict[int, int]) -> int:
    """Check a value and all that it holds, and return how deep blocks are nested in it.

    Args:
        value: as it was read.
        key: of the value, dotted.
        where: as for `load_yaml`.
        depth: number of blocks that the value lies in.
        known: the result for each block, by its `id`: with YAML's aliases, a few lines can hold a
            block billions of times, or in itself.
    """
    shown = f"{where}: `{key[:200]}`" if key else where
    height = known.get(id(value), 0)
    if not height and isinstance(value, dict | list) and depth < _DEEPEST:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        inner = 0
        for name, item in items:
            if isinstance(value, dict):
                _check_plain(name, key, where, _DEEPEST, known)
            below = f"{key}.{name}" if key else str(name)
            inner = max(inner, _check_plain(item, below, where, depth + 1, known))
        height = known[id(value)] = 1 + inner
    if depth + height > _DEEPEST or (isinstance(value, dict | list) and not height):
        raise InputError(
            f"{shown}: blocks or lists are nested more than {_DEEPEST} deep.",
            "Write fewer levels.",
        )
    if type(value) is int and abs(value) > _LARGEST:
        raise InputError(
            f"{shown} is a number of {value.bit_length()} bits, expected at most {_LARGEST}.",
            "Change the value.",
        )
    if isinstance(value, str) and (
        "\0" in value or value != value.encode(errors="replace").decode()
    ):
        raise InputError(
            f"{shown} is {value[:200]!r}: it has a null byte or half a character (a lone "
            "surrogate), expected text.",
            "Change the value.",
        )
    if not isinstance(value, dict | list | str | int | float | None):
        kind = type(value).__name__
        raise InputError(
            f"{shown} is a {kind}, expected a block, a list, text, a number, true, false or null.",
            "Put it in quotes if it is text.",
        )
    return height
