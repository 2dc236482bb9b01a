"""Texts that people bring: which encoding a file has, and which of two texts are one."""

from __future__ import annotations

import codecs
import re
import unicodedata
from pathlib import Path

from pipeline.errors import InputError

_UNSEEN = dict.fromkeys(map(ord, "\u200b\u200e\u200f\u2060\ufeff"))
"""Characters without a width that say nothing: zero-width blank, marks of direction, byte order."""

_BLANKS = dict.fromkeys(map(ord, "\u00a0\u2007\u202f"), " ")
"""Blanks that only forbid a line break."""

# Joiners mean something between letters only.
_ENDS = re.compile(r"^[\s\u200c\u200d]+|[\s\u200c\u200d]+$")


def plain_text(text: str) -> str:
    """Give all texts that look alike the same form.

    The form is Unicode's NFC, in which `é` is one character. (On macOS it is often two: `e` and an
    accent.) Invisible characters are removed, non-breaking blanks become blanks, and blanks at the
    ends are removed.
    """
    return _ENDS.sub("", unicodedata.normalize("NFC", text.translate(_UNSEEN | _BLANKS)))


_FORMATS = {
    b"PK\x03\x04": (
        "is a zip archive, as spreadsheets (.xlsx, .ods) are",
        "Open it in a spreadsheet and save it as `CSV UTF-8`, or unpack it.",
    ),
    b"\xd0\xcf\x11\xe0": (
        "is a document of an old Microsoft Office, as .xls files are",
        "Open it in a spreadsheet and save it as `CSV UTF-8`.",
    ),
    b"\x1f\x8b": (
        "is compressed with gzip",
        "Run `gunzip -c {name} > {stem}-plain{suffix}` in its folder and use the new file.",
    ),
    b"PAR1": (
        "is a Parquet file",
        "Rename it to {stem}.parquet, and name it so in params.yaml.",
    ),
}
"""The first bytes of a format -> what a file of it is, and what to do."""


def _other_format(file: Path, start: bytes) -> InputError | None:
    for magic, (what, remedy) in _FORMATS.items():
        if start.startswith(magic):
            names = {"name": file.name, "stem": file.stem, "suffix": file.suffix}
            return InputError(f"{file} {what}, expected text.", remedy.format(**names))
    return None


def not_utf8(file: Path, number: int, line: bytes) -> InputError | None:
    """Say what encoding a line has that is not UTF-8.

    Args:
        file: the file of the line.
        number: of the line, from 1.
        line: its bytes.

    Returns:
        the error to raise; None if the line is UTF-8.
    """
    if number == 1 and (other := _other_format(file, line)):
        return other
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        found, name = f"the byte {line[0]:#04x} is not UTF-8. The file is UTF-16", "UTF-16"
    elif number == 1 and b"\0" in line:
        found = "there are null bytes between the letters. The file is UTF-16"
        name = "UTF-16LE" if line[1:2] == b"\0" else "UTF-16BE"
    else:
        try:
            line.decode()
            return None
        except UnicodeDecodeError as error:
            byte = line[error.start]
        shown = line.decode("cp1252", errors="replace").strip()
        found = f"the byte {byte:#04x} is not UTF-8. As Windows-1252, the line is {shown[:200]!r}"
        name = "WINDOWS-1252"
    return InputError(
        f"{file}, line {number}: {found}.",
        "Save the file as UTF-8 text (in a spreadsheet: `CSV UTF-8`), or run "
        f"`iconv -f {name} -t UTF-8 {file.name} > {file.stem}-utf8{file.suffix}` in its folder and "
        "use the new file. Then prepare the data set again.",
    )
