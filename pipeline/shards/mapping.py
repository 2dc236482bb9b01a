"""Many files mapped into one stretch of memory, whose rows one operation copies together."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.errors import GmpipeError

_MAP_FIXED = 0x10
"""Of mmap(2), the same on Linux and macOS; the module `mmap` has neither it nor addresses."""

_ALIGNMENT = 1 << 21
"""Where a file of the page cache can be mapped with huge pages, which is a third faster."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
]


class MappedFiles:
    """Files of known sizes, each with its place in one stretch of addresses.

    The stretch is only reserved until `map` puts a file into its place; then the file is closed,
    so that no number of files meets the limit of open ones. The batches of a training touch most
    files of a cache, a few rows each: with an array for each file they would be copied several
    times slower. All goes with the object.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        """Reserve the addresses of N files of these sizes in bytes, of which one is above 0."""
        room = -(-np.array(sizes, dtype=np.int64) // _ALIGNMENT) * _ALIGNMENT
        length = int(room.sum()) + _ALIGNMENT
        self._sizes = tuple(sizes)
        self._memory = mmap.mmap(-1, length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ)
        self._address = np.frombuffer(self._memory, np.uint8).ctypes.data
        self.starts: npt.NDArray[np.int64] = np.cumsum(room) - room + -self._address % _ALIGNMENT
        """(N,) place of each file's first byte."""

    def map(self, number: int, path: Path) -> None:
        """Put the file ``path`` into the place of file ``number``.

        Raises:
            GmpipeError: it can't be opened or mapped, or is of another size.
        """
        size = self._sizes[number]
        place = self._address + int(self.starts[number])
        try:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                found = os.fstat(descriptor).st_size
                if found != size:
                    raise GmpipeError(
                        f"{path}: found {found} bytes; expected {size}: it was changed after its "
                        "folder was opened. Run the command again."
                    )
                mapped = _libc.mmap(
                    place, size, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, descriptor, 0
                )
                if mapped != place:
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            finally:
                os.close(descriptor)
        except OSError as error:
            raise GmpipeError(
                f"{path} can't be mapped into memory: {error.strerror}. See that it is there and "
                "may be read, that its file system allows `mmap`, and that `sysctl "
                "vm.max_map_count` is above the number of files."
            ) from error

    def items(self, size: int) -> npt.NDArray[np.void]:
        """Every stretch of ``size`` bytes by the place of its first byte, without a copy.

        Only those in files that were mapped are of use; the others read as zeros.
        """
        # Each item overlaps the next: they begin a byte apart.
        return np.ndarray(len(self._memory) - size + 1, f"V{size}", self._memory, strides=1)
