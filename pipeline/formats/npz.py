"""What the arrays of an npz declare, read before memory is allocated for them.

An npz that a user brings may be damaged, or may have been made to do damage: a header of a few
bytes can ask for terabytes.
"""

from __future__ import annotations

import errno
import lzma
import math
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

from pipeline.errors import InputError

_DAMAGED = (
    EOFError,
    NotImplementedError,  # a compression that Python lacks
    OSError,
    RecursionError,
    RuntimeError,  # encrypted
    SyntaxError,
    TypeError,
    ValueError,
    lzma.LZMAError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What zipfile and numpy raise if a file is damaged."""


@dataclass(frozen=True)
class NpyHeader:
    """What a member of an npz declares.

    Attributes:
        dtype, shape: of the array.
        in_fortran_order: whether the first axis varies fastest.
        offset: byte of the member at which the numbers begin.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    in_fortran_order: bool
    offset: int

    @property
    def size(self) -> int:
        """Bytes of a complete member."""
        return self.offset + math.prod(self.shape) * self.dtype.itemsize


def npy_header(archive: zipfile.ZipFile, name: str) -> NpyHeader:
    """Read the header of the member ``name``.npy, which exists; within `naming_damage`.

    Raises:
        ValueError: the version is unknown, or the shape is none.
        Exception: what zipfile and numpy raise for a damaged header.
    """
    with archive.open(f"{name}.npy") as stream, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Python 2 wrote other headers
        version = npy.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version} of npy, expected 1.0 or 2.0")
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        try:
            shape, in_fortran_order, dtype = read(stream)
        except MemoryError as error:  # Python's parser raises it for many brackets
            raise ValueError(f"the header is no header ({error})") from error
        if not all(type(length) is int and length >= 0 for length in shape):
            raise ValueError(f"the shape {shape}, expected lengths")
        return NpyHeader(dtype, shape, in_fortran_order, stream.tell())


def npy_array(archive: zipfile.ZipFile, name: str) -> npt.NDArray[Any]:
    """Read the member ``name``.npy, whose header was checked; raises as `npy_header`."""
    with archive.open(f"{name}.npy") as stream, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        array: npt.NDArray[Any] = npy.read_array(stream, allow_pickle=False)
        return array


def decoded_texts(array: npt.NDArray[Any]) -> list[str]:
    """The strings of an array (N,) of fixed-width text, of numpy's kinds S (UTF-8) and U.

    A mark of byte order, which the first line of a text file may leave before a string, is dropped.

    Raises:
        UnicodeDecodeError: a text is not Unicode. (numpy itself fails badly on such codes.)
    """
    coding = "utf-8"
    if array.dtype.kind == "U":
        coding = "utf-32-le"
        array = array.astype(array.dtype.newbyteorder("<"))
    width = array.dtype.itemsize
    codes = np.ascontiguousarray(array).view(np.uint8).reshape(len(array), width)
    texts = (code.tobytes().decode(coding).rstrip("\0") for code in codes)
    return [text.removeprefix("\ufeff") for text in texts]


@contextmanager
def naming_damage(path: Path, remedy: str, kind: str = "an npz") -> Iterator[None]:
    """Name the file in an `InputError` for what zipfile and numpy raise if it is damaged.

    Args:
        path: of the file.
        remedy: what to do about it.
        kind: what the file should be.
    """
    try:
        yield
    except _DAMAGED as error:
        # The system's errors pass. A damaged zip can lead to places that don't exist (EINVAL).
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise InputError(
            f"{path} can't be read: it is damaged or not {kind} ({error}).", remedy
        ) from error
