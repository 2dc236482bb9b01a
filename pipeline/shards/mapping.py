"""Many files mapped into one stretch of memory, so that one operation copies rows of all."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.errors import AccessError, DamagedError, InputError, MissingError
from pipeline.files import open_regular

_MAP_FIXED = 0x10
"""A flag of mmap(2), the same on Linux and macOS. Python's `mmap` has neither it nor addresses."""

_ALIGNMENT = 1 << 21
"""At such addresses, files in the page cache can be mapped with huge pages: a third faster."""

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
    """Files of known sizes, each with its own range in one stretch of addresses.

    A range is only reserved until `map` puts its file there. The file is closed then, so that the
    number of files can't reach the limit of open ones. The batches of a training touch most files
    of a cache, for a few rows each: with one array per file, copying them would be several times
    slower. The maps are released with the object.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        """Reserve the addresses of N files of these sizes in bytes, of which one is above 0."""
        room = -(-np.array(sizes, dtype=np.int64) // _ALIGNMENT) * _ALIGNMENT
        length = int(room.sum()) + _ALIGNMENT
        self._sizes = tuple(sizes)
        self._memory = mmap.mmap(-1, length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ)
        self._address = np.frombuffer(self._memory, np.uint8).ctypes.data
        self.starts: npt.NDArray[np.int64] = np.cumsum(room) - room + -self._address % _ALIGNMENT
        """(N,) position of each file's first byte."""

    def map(self, number: int, path: Path) -> None:
        """Map the file ``path`` to the range of file ``number``.

        Raises:
            DamagedError: its size is not the one given, or it is no regular file.
            MissingError: there is no such file.
            AccessError, OSError: it can't be opened or mapped.
        """
        size = self._sizes[number]
        address = self._address + int(self.starts[number])
        try:
            with open_regular(path) as stream:
                actual = os.fstat(stream.fileno()).st_size
                if actual != size:
                    raise DamagedError(
                        f"{path}: found {actual} bytes; expected {size}. It was changed after its "
                        "folder was opened.",
                        "Run the command again.",
                    )
                mapped = _libc.mmap(
                    address, size, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, stream.fileno(), 0
                )
                if mapped != address:
                    raise AccessError(
                        f"{path} can't be mapped into memory: {os.strerror(ctypes.get_errno())}.",
                        "Check that its file system allows `mmap`, and that `sysctl "
                        "vm.max_map_count` is above the number of files.",
                    )
        except FileNotFoundError:
            raise MissingError(
                f"{path}: there is no such shard.", "Write its rows again."
            ) from None
        except InputError as error:  # it is no regular file
            remedy = "Move it away, and write its rows again."
            raise DamagedError(error.problem, remedy) from error

    def items(self, size: int) -> npt.NDArray[np.void]:
        """All stretches of ``size`` bytes, indexed by the position of their first byte; no copy.

        Only those in mapped files are useful. The others read as zeros.
        """
        # Each item overlaps the next, which begins one byte later.
        return np.ndarray(len(self._memory) - size + 1, f"V{size}", self._memory, strides=1)
