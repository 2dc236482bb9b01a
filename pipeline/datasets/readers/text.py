"""Lines of the text files that data sets are read from."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

from pipeline.datasets.listing import open_source
from pipeline.errors import InputError
from pipeline.formats.encodings import not_utf8

FIX_FILE = "Fix the file, then prepare the data set again."


def text_lines(file: Path, remedy: str) -> Iterator[str]:
    """Yield the lines of a UTF-8 text with their ends; decompressed if the name ends in ``.gz``.

    Raises:
        MissingError, OSError: as `open_source`.
        InputError: as `open_source`, or the file can't be decompressed, or is not UTF-8; names the
            line and the encoding.
    """
    number = 0
    try:
        with open_source(file, remedy) as stored, _plain(stored, file.suffix == ".gz") as stream:
            for line in stream:
                number += 1
                if number == 1 and (wrong := not_utf8(file, number, line)):
                    raise wrong
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(file, number, error.object) or error from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(
            f"{file} can't be read beyond line {number}: {error}.", FIX_FILE
        ) from error


def _plain(stream: BufferedReader, compressed: bool) -> BufferedReader | gzip.GzipFile:
    return gzip.GzipFile(fileobj=stream) if compressed else stream
