"""Large JSON files, read one record at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, TextIO

from pipeline.errors import InputError

_CHUNK = 1 << 22  # characters that are read at once
_LONGEST = 1 << 26  # characters of the longest record


class JsonArrays:
    """Reads a JSON object of arrays, one element at a time.

    Attributes:
        text: the part of the file that is in memory.
        at: position in ``text`` of the next character to parse.
    """

    def __init__(self, stream: TextIO, path: Path, remedy: str) -> None:
        self._stream = stream
        self._path = path
        self._remedy = remedy
        self._decoder = json.JSONDecoder()
        self._blank = re.compile(r"[ \t\n\r]*")
        self.text = ""
        self.at = 0
        self._before = 0  # number of characters of the file before `text`

    def arrays(self) -> Iterator[tuple[str, Iterator[Any]]]:
        """Yield the name and the elements of each array in the object, and skip other values."""
        for _ in self._members("{", "}"):
            name = self._value()
            if not isinstance(name, str):
                self._fail(f"found {name!r}, expected a key")
            self._take(":")
            if self._peek() == "[":
                elements = (self._value() for _ in self._members("[", "]"))
                yield name, elements
                for _ in elements:  # that the caller has not consumed
                    pass
            else:
                self._value()
        if self._peek():
            self._fail("expected the end of the file")

    def _members(self, opening: str, closing: str) -> Iterator[None]:
        """Stop before each member of an object or array."""
        self._take(opening)
        if self._peek() == closing:
            self._take(closing)
            return
        while True:
            yield
            if self._take("," + closing) == closing:
                return

    def _peek(self) -> str:
        """The next character that is not blank; empty at the end of the file."""
        while True:
            blanks = self._blank.match(self.text, self.at)
            assert blanks  # the empty string matches
            self.at = blanks.end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._read_on():
                return ""

    def _take(self, expected: str) -> str:
        """Skip the next character, which must be one of ``expected``, and return it."""
        character = self._peek()
        if not character or character not in expected:
            self._fail(f"found {character!r}, expected {' or '.join(map(repr, expected))}")
        self.at += 1
        return character

    def _value(self) -> Any:
        """Parse the next value."""
        self._peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self.text, self.at)
                after = self.text[end : end + 1]
                if after and after in ",:]} \t\n\r":
                    self.at = end
                    return value
                # The value may be a number whose last digits are not read yet.
                problem = f"found {after!r} after a value"
            except json.JSONDecodeError as error:
                problem, end = error.msg, error.pos
            except (ValueError, RecursionError) as error:
                problem, end = str(error), self.at
            position = self._before + end
            if len(self.text) - self.at > _LONGEST or not self._read_on():
                self._fail(problem, position)

    def _read_on(self) -> bool:
        """Read more text, and report whether there was any.

        At least as much is read as is in memory, so that a long value is parsed few times.
        """
        chunk = self._stream.read(max(_CHUNK, len(self.text) - self.at))
        self._before += self.at
        self.text = self.text[self.at :] + chunk
        self.at = 0
        return bool(chunk)

    def _fail(self, problem: str, position: int | None = None) -> NoReturn:
        """Raise the error that ``problem`` is found at a position in the file, by default here."""
        if position is None:
            position = self._before + self.at
        raise InputError(
            f"{self._path} is truncated or not valid JSON, after character {position}: {problem}.",
            self._remedy,
        )
