"""Vectors of a few words out of a GloVe text file, or out of the zip it comes in.

Letters: W size of a vector.

The format (https://nlp.stanford.edu/projects/glove/): a line a word, the word and W numbers with
one blank between any two, no header, UTF-8 but for a few lines. Programs that read word2vec's
text format put a first line `count size` in front. Some words of glove.840B hold blanks
(`. . .`, `at name@domain.com`), so only the number of blanks tells such a line from one of the
word `at`.

Lines stay bytes, and only those whose first word is wanted are looked at: a file is read in a
stream, in memory that does not grow with it, and always to its end, where a zip's checksum is.
"""

from __future__ import annotations

import io
import lzma
import zipfile
import zlib
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import GmpipeError

_FETCH_AGAIN = "It may have been cut off or damaged on its way: fetch it again."

# A vector of 4096 numbers takes a tenth of it.
_LONGEST_LINE = 1 << 19
_BUFFER = 1 << 20

# W is what most of so many first lines have, since words with blanks and damaged lines are rare.
_HEAD = 100

_DAMAGED = (
    OSError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    NotImplementedError,  # a compression that zipfile does not know
    RuntimeError,  # an encrypted member
    UnicodeDecodeError,  # a member's name that is not what it says it is
)


def read_words(path: Path, words: Collection[str]) -> dict[str, NDArray[np.float32]]:
    """The vectors of those ``words`` that the file has; (W,) each, rounded from the decimals.

    Args:
        path: a text file; a zip that holds one; or a member of a zip, as a path through it.
        words: none with a blank; compared byte by byte, so `Sun` is not `sun`.

    Raises:
        GmpipeError: the file, or the member of the zip, is missing, damaged, or no such text; the
            zip holds several texts and none is named; a wanted word's line has fewer than W
            values or one that is no number; a wanted word has two different vectors; the last
            line has no end, and a word was not found before it.
    """
    wanted = {word.encode(): word for word in words}
    found: dict[str, tuple[int, NDArray[np.float32]]] = {}
    number, line = 0, b""
    with _open(path) as stream:
        lines = iter(partial(stream.readline, _LONGEST_LINE), b"")
        head = list(islice(lines, _HEAD))
        size = _size(head, path)
        for number, line in enumerate(chain(head, lines), start=1):
            if len(line) == _LONGEST_LINE:
                raise _not_glove(path, f"line {number} is longer than {_LONGEST_LINE - 1} bytes")
            word = wanted.get(line[: line.find(b" ")])
            if word is None or _blanks(line) > size or (number == 1 and _header(line)):
                continue
            if not line.endswith(b"\n"):
                break  # the last line; its last number may lack digits
            vector = _parse(line, size, f"{path}, line {number}, word {word!r}")
            first, known = found.setdefault(word, (number, vector))
            if not np.array_equal(known, vector, equal_nan=True):
                raise GmpipeError(
                    f"{path}: the word {word!r} has one vector in line {first} and another in "
                    f"line {number}. Remove one of the lines."
                )
    missing = sorted(set(words) - found.keys())
    if missing and not line.endswith(b"\n"):
        raise GmpipeError(
            f"{path} ends within line {number}, and the words "
            f"{', '.join(map(repr, missing))} were not found before it. {_FETCH_AGAIN} If that "
            "line is whole, put a line end behind it."
        )
    return {word: vector for word, (_, vector) in found.items()}


def _parse(line: bytes, size: int, where: str) -> NDArray[np.float32]:
    """(W,) numbers behind the first word of a line."""
    values = line.rstrip().split(b" ")[1:]
    if len(values) < size:
        raise GmpipeError(
            f"{where}: {len(values)} values, expected {size} as in other lines. {_FETCH_AGAIN}"
        )
    try:
        numbers = np.array([float(value) for value in values])
    except ValueError as error:
        raise GmpipeError(f"{where}: {error}, expected a number. {_FETCH_AGAIN}") from None
    with np.errstate(over="ignore"):  # inf; what it means for a label is for the caller to say
        return numbers.astype(np.float32)


def _blanks(line: bytes) -> int:
    return line.rstrip().count(b" ")


def _header(line: bytes) -> tuple[int, int] | None:
    """The count and size of a first line in word2vec's manner; a vector has two values or more."""
    fields = line.split()
    if len(fields) == 2 and all(field.isdigit() for field in fields):
        return int(fields[0]), int(fields[1])
    return None


def _size(head: list[bytes], path: Path) -> int:
    """W, from the first lines."""
    header = _header(head[0]) if head else None
    body = head[1:] if header else head
    counts = Counter(_blanks(line) for line in body if line.strip())
    if not counts:
        raise _not_glove(path, "it has no lines with vectors")
    size = min(counts, key=lambda blanks: (-counts[blanks], blanks))
    if size < 2:
        raise _not_glove(path, f"most of its first lines have {size + 1} fields")
    if header and header[1] != size:
        raise _not_glove(path, f"line 1 says {header[1]} values a line, the next have {size}")
    typical = next(line for line in body if _blanks(line) == size)
    try:
        [float(value) for value in typical.rstrip().split(b" ")[1:]]
    except ValueError as error:
        raise _not_glove(path, f"line {head.index(typical) + 1}: {error}") from None
    return size


def _not_glove(path: Path, finding: str) -> GmpipeError:
    return GmpipeError(
        f"{path} is not a text file of GloVe vectors: {finding}. Expected a line a word: the "
        "word and its numbers, with one blank between any two, in UTF-8. Correct `label_vectors`."
    )


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    """The text's bytes, be it in a zip or not."""
    try:
        archive = archive_of(path)
        _check_file(archive or path)
        if archive is None:
            with path.open("rb", buffering=_BUFFER) as stream:
                yield stream
            return
        with zipfile.ZipFile(archive) as opened:
            member = _member(opened, archive, path)
            # Its own readline is many times slower.
            with io.BufferedReader(opened.open(member), _BUFFER) as stream:  # type: ignore[type-var]
                yield stream
    except _DAMAGED as error:
        raise GmpipeError(
            f"{path} can't be read ({str(error) or type(error).__name__}). {_FETCH_AGAIN}"
        ) from error


def _check_file(file: Path) -> None:
    if file.is_dir():
        raise GmpipeError(
            f"{file} is a folder, expected a file of GloVe vectors. Name the file in it as "
            "`label_vectors`."
        )
    if not file.exists():
        raise GmpipeError(
            f"there is no file {file} to read GloVe vectors from. Fetch glove.6B.zip (822 MB) "
            "from Stanford NLP's GloVe page, https://nlp.stanford.edu/projects/glove/, put it at "
            "data/glove/glove.6B.zip, and set `label_vectors: "
            "data/glove/glove.6B.zip/glove.6B.300d.txt`; it need not be unpacked. Or set "
            "`label_vectors: wordllama`, which needs no download."
        )


def archive_of(path: Path) -> Path | None:
    """The zip that a path names or leads through; a folder of such a name is a folder."""
    for place in (path, *path.parents):
        if place.suffix.lower() == ".zip" and not (place != path and place.is_dir()):
            return place
    return None


def _member(opened: zipfile.ZipFile, archive: Path, path: Path) -> zipfile.ZipInfo:
    """The member that a path through a zip names, or the only text of a zip."""
    members = {PurePosixPath(info.filename): info for info in opened.infolist()}
    texts = [name for name in members if name.suffix.lower() == ".txt"]
    choices = "; ".join(f"`label_vectors: {(archive / name).as_posix()}`" for name in texts)
    if path != archive:
        name = PurePosixPath(path.relative_to(archive).as_posix())
        if name in members and not members[name].is_dir():
            return members[name]
        found = f"has no file {name}"
    elif len(texts) == 1:
        return members[texts[0]]
    else:
        found = f"holds {len(texts)} text files, and none is named"
    raise GmpipeError(
        f"{archive} {found}. "
        + (f"Choose one: {choices}." if texts else "Expected a zip with a GloVe text file in it.")
    )
