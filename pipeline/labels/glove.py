"""Vectors of a few words from a GloVe text file, or from the zip in which it is published.

Letters: W size of a vector.

The format (https://nlp.stanford.edu/projects/glove/): one line per word, with the word and W
numbers, and one blank between any two; no header; UTF-8 except for a few lines. Programs that read
word2vec's text format need a first line `count size`. Some words of glove.840B contain blanks
(`. . .`, `at name@domain.com`), so only the number of blanks distinguishes such a line from that of
the word `at`.

Lines stay bytes, and only those whose first word is wanted are parsed. The file is read as a
stream, in memory that does not grow with it, and always to its end, where a zip has its checksum.
"""

from __future__ import annotations

import codecs
import errno
import io
import lzma
import unicodedata
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

from pipeline.errors import InputError, MissingError
from pipeline.files import check_regular, home_advice, open_regular

_DOWNLOAD_AGAIN = "The download may be truncated or damaged: download the file again."

_LONGEST_LINE = 1 << 19  # bytes; a vector of 4096 numbers takes a tenth of that
_BUFFER = 1 << 20
_MOST_NAMED = 20  # files or words in a message

# Number of first lines that decide W: words with blanks and damaged lines are rare among them.
_HEAD = 100

_DAMAGED = (
    OSError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    NotImplementedError,  # a compression that zipfile does not know
    RuntimeError,  # an encrypted member
    UnicodeDecodeError,  # a member's name in another encoding than it declares
)


def read_words(path: Path, words: Collection[str]) -> dict[str, NDArray[np.float32]]:
    """Read the vectors of those ``words`` that the file has; (W,) each, rounded from the decimals.

    Args:
        path: a text file; a zip that contains one; or a member of a zip, as a path through it.
        words: words without blanks, compared byte by byte, so that `Sun` is not `sun`. Only if the
            file lacks a word is its decomposed Unicode form (NFD) looked up.

    Raises:
        MissingError: the file does not exist.
        InputError: the file or the zip's member is damaged or is not such a text; the zip has no
            such member, or several texts of which none is named; the line of a wanted word has
            fewer than W values or one that is not a number; a wanted word has two different
            vectors; or the last line has no line end, and a word was not found before it.
    """
    decomposed = {word: unicodedata.normalize("NFD", word) for word in words}
    wanted = {word.encode(): word for word in (*decomposed.values(), *words)}
    vectors: dict[str, tuple[int, NDArray[np.float32]]] = {}
    number, line = 0, b""
    with _open(path) as stream:
        lines = iter(partial(stream.readline, _LONGEST_LINE), b"")
        head = list(islice(lines, _HEAD))
        head[:1] = [first.removeprefix(codecs.BOM_UTF8) for first in head[:1]]
        size = _size(head, path)
        for number, line in enumerate(chain(head, lines), start=1):
            if len(line) == _LONGEST_LINE:
                raise _not_glove(path, f"line {number} is longer than {_LONGEST_LINE - 1} bytes")
            word = wanted.get(line[: line.find(b" ")])
            if word is None or _blanks(line) > size or (number == 1 and _header(line)):
                continue
            if not line.endswith(b"\n"):
                break  # the last line, whose last number may lack digits
            vector = _parse(line, size, f"{path}, line {number}, word {word!r}")
            first, known = vectors.setdefault(word, (number, vector))
            if not np.array_equal(known, vector, equal_nan=True):
                raise InputError(
                    f"{path}: the word {word!r} has one vector in line {first} and another in "
                    f"line {number}.",
                    "Remove one of the lines.",
                )
    for word, other in decomposed.items():
        if word not in vectors and other in vectors:
            vectors[word] = vectors[other]
    missing = sorted(set(words) - vectors.keys())
    if missing and not line.endswith(b"\n"):
        raise InputError(
            f"{path} ends within line {number}, and has no line before it for the words "
            f"{', '.join(map(repr, missing[:_MOST_NAMED]))}"
            f"{f' and {len(missing) - _MOST_NAMED} more' if len(missing) > _MOST_NAMED else ''}.",
            f"{_DOWNLOAD_AGAIN} If that line is complete, add a line end.",
        )
    return {word: vectors[word][1] for word in words if word in vectors}


def _parse(line: bytes, size: int, where: str) -> NDArray[np.float32]:
    """(W,) numbers after the first word of a line."""
    values = line.rstrip().split(b" ")[1:]
    if len(values) < size:
        raise InputError(
            f"{where}: {len(values)} values, expected {size} as in other lines.", _DOWNLOAD_AGAIN
        )
    try:
        numbers = np.array([float(value) for value in values])
    except ValueError as error:
        raise InputError(f"{where}: {error}, expected a number.", _DOWNLOAD_AGAIN) from None
    with np.errstate(over="ignore"):  # inf, which is the caller's to refuse
        return numbers.astype(np.float32)


def _blanks(line: bytes) -> int:
    return line.rstrip().count(b" ")


def _header(line: bytes) -> tuple[int, int] | None:
    """Count and size in a first line of word2vec's format; a vector has at least two values."""
    fields = line.split()
    if len(fields) == 2 and all(field.isdigit() and len(field) < 19 for field in fields):
        return int(fields[0]), int(fields[1])
    return None


def _size(head: list[bytes], path: Path) -> int:
    """W, by the first lines of the file."""
    header = _header(head[0]) if head else None
    body = head[1:] if header else head
    counts = Counter(_blanks(line) for line in body if line.strip())
    if not counts:
        raise _not_glove(path, "it has no lines with vectors")
    size = min(counts, key=lambda blanks: (-counts[blanks], blanks))
    if size < 2:
        raise _not_glove(path, f"most of its first lines have {size + 1} fields")
    if header and header[1] != size:
        raise _not_glove(
            path, f"line 1 announces {header[1]} values per line, but there are {size}"
        )
    typical = next(line for line in body if _blanks(line) == size)
    try:
        [float(value) for value in typical.rstrip().split(b" ")[1:]]
    except ValueError as error:
        raise _not_glove(path, f"line {head.index(typical) + 1}: {error}") from None
    return size


def _not_glove(path: Path, problem: str) -> InputError:
    return InputError(
        f"{path} is not a text file of GloVe vectors: {problem}. Expected one line per word: the "
        "word and its numbers, with one blank between any two, in UTF-8.",
        "Change `label_vectors`.",
    )


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    """Open the text as bytes, whether it is in a zip or not."""
    archive = archive_of(path)
    _check_file(archive or path)
    try:
        with open_regular(archive or path) as stored:
            if archive is None:
                yield stored
                return
            with zipfile.ZipFile(stored) as opened:
                member = _member(opened, archive, path)
                # The readline of ZipExtFile is many times slower.
                with io.BufferedReader(opened.open(member), _BUFFER) as stream:  # type: ignore[type-var]
                    yield stream
    except _DAMAGED as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise  # the system's; a damaged zip can lead to places that don't exist (EINVAL)
        raise InputError(
            f"{path} can't be read ({str(error) or type(error).__name__}).", _DOWNLOAD_AGAIN
        ) from error


def _check_file(file: Path) -> None:
    try:
        check_regular(file, file.stat())
    except InputError as error:
        raise InputError(error.problem, "Set `label_vectors` to a file of GloVe vectors.") from None
    except (FileNotFoundError, NotADirectoryError):
        raise MissingError(
            f"There is no file {file} to read GloVe vectors from.",
            f"{home_advice(file)}Download glove.6B.zip (822 MB) from Stanford NLP's GloVe page, "
            "https://nlp.stanford.edu/projects/glove/, put it at data/glove/glove.6B.zip, and set "
            "`label_vectors: data/glove/glove.6B.zip/glove.6B.300d.txt`; it need not be unpacked. "
            "Or set `label_vectors: wordllama`, which needs no download.",
        ) from None


def archive_of(path: Path) -> Path | None:
    """The zip that a path names or leads through; a folder on the way is not a zip."""
    for part in (path, *path.parents):
        if part.suffix.lower() == ".zip" and not (part != path and part.is_dir()):
            return part
    return None


def _member(opened: zipfile.ZipFile, archive: Path, path: Path) -> zipfile.ZipInfo:
    """The member that a path through a zip names, or the only text of a zip."""
    members = {PurePosixPath(info.filename): info for info in opened.infolist()}
    texts = [name for name in members if name.suffix.lower() == ".txt"]
    shown = [f"`label_vectors: {(archive / name).as_posix()}`" for name in texts[:_MOST_NAMED]]
    choices = "; ".join([*shown, "..."] if len(texts) > _MOST_NAMED else shown)
    if path != archive:
        name = PurePosixPath(path.relative_to(archive).as_posix())
        if name in members and not members[name].is_dir():
            return members[name]
        problem = f"has no file {name}"
    elif len(texts) == 1:
        return members[texts[0]]
    else:
        problem = f"contains {len(texts)} text files, and the setting names none of them"
    raise InputError(
        f"{archive} {problem}.",
        f"Choose one: {choices}." if texts else "Use a zip that contains a GloVe text file.",
    )
