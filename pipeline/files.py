"""Files that are written whole or not at all, and folders with one writer at a time."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import fnmatch
import glob
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipeline.errors import AccessError, BusyError, InputError, NoSpaceError

_log = logging.getLogger(__name__)

_TAG = "[0-9a-f]" * 8
"""Matches what is unique in the name of a temporary file, for `glob`."""

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_RIGHTS = "Give your user the right to read and write it, and run the same command again."
_NEXT_STEPS = {
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: "The file system is read-only: choose another folder, or mount it for writing.",
    errno.ENOENT: "Check the name, and run the same command again.",
    errno.ENAMETOOLONG: "Use a shorter name: file systems take at most 255 bytes for each name.",
    errno.EISDIR: "Name a file instead of a folder.",
    errno.ENOTDIR: "Part of the path is a file; name a folder there.",
    errno.ELOOP: "Remove the link that leads back to itself.",
    errno.EMFILE: "Allow more open files, for instance with `ulimit -n 4096`.",
    errno.EIO: "The disk has a fault: check it, and run the same command again.",
    errno.ESTALE: "The network share has changed: mount it again, and run the same command again.",
}
_REFUSALS = {
    *(errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM),
    *(errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.EBUSY),
}
"""Errors of reading that the file is not to blame for."""
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def access_error(error: OSError, path: Path | None = None) -> AccessError:
    """Put an error of the operating system into words: path, reason and next step.

    Args:
        error: as the system, h5py or pyarrow raised it.
        path: what was read or written; None if only the error can name it.
    """
    # copytree and rmtree collect errors: (source, destination, message) each.
    if isinstance(error, shutil.Error) and error.args and isinstance(error.args[0], list):
        source, _, message = error.args[0][0]
        return _in_words(_number_in(str(message)), str(message), str(path or source))
    number = error.errno or _number_in(str(error))
    return _in_words(number, error.strerror or str(error), _name_in(error, path))


def _name_in(error: OSError, path: Path | None) -> str:
    """The name of what could not be read or written; empty if nobody knows it."""
    named = error.filename2 or error.filename
    if named is None and (quoted := re.search(r"name = '(.*?)'", str(error))):
        named = quoted[1]  # h5py puts the name, and the system's error number, into its message
    if path is None:
        return "" if named is None else os.fsdecode(named)
    # The temporary name of ``path`` means nothing to the user.
    temporary = (f"{path}.", str(path.with_name(f".{path.name}.")))
    if named is None or os.fsdecode(named).startswith(temporary):
        return str(path)
    return os.fsdecode(named)


def _number_in(message: str) -> int | None:
    number = re.search(r"errno = (\d+),|\[Errno (\d+)\]", message)
    return int(number[1] or number[2]) if number else None


def _in_words(number: int | None, reason: str, path: str) -> AccessError:
    if number in _NO_SPACE:
        where = f" while writing {path}" if path else ""
        return NoSpaceError(
            f"no space left on the device{where} ({reason}). Everything that was finished before "
            "is complete and kept.",
            "Make space, and run the same command again.",
        )
    if number is not None and path:
        reason = os.strerror(number)
    remedy = _NEXT_STEPS.get(number or 0, "Solve this, and run the same command again.")
    return AccessError(f"{path}: {reason}." if path else f"{reason}.", remedy)


@contextmanager
def naming_access_errors(path: Path | None = None) -> Iterator[None]:
    """Raise the `AccessError` of an `OSError` in the block.

    Args:
        path: what is written in the block; None if only the error can name it.

    Raises:
        NoSpaceError: the disk, or the user's share of it, is full.
        AccessError: the system refuses something else.
    """
    try:
        yield
    except OSError as error:
        raise access_error(error, path) from error


def raise_if_refused(error: Exception, path: Path) -> None:
    """Raise the `AccessError` of an error that says nothing about what a file holds.

    For code that takes a parser's errors for damage. Parsers and decompressors raise an `OSError`
    as well, without a number or with that of a bad argument.
    """
    if isinstance(error, OSError) and error.errno in _REFUSALS:
        raise access_error(error, path) from error


def exists(path: Path) -> bool:
    """Whether there is something at ``path``.

    Raises:
        OSError: the system can't say, for instance in a folder that this user may not enter. (Some
            of Python's functions say then that there is nothing.)
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def home_advice(path: Path) -> str:
    """A sentence for messages on a missing file if its path begins with `~`, else empty."""
    if path.parts[:1] != ("~",):
        return ""
    whole = Path(os.environ.get("HOME", "/home/NAME"), *path.parts[1:])
    return f"Write the whole path, `{whole}`, without `~`. "


def matching(folder: Path, pattern: str) -> list[Path]:
    """List what in ``folder`` has a name like ``pattern``, sorted; nothing if there is no folder.

    Raises:
        OSError: the folder can't be listed. (`Path.glob` takes it for an empty one.)
    """
    try:
        return sorted(path for path in folder.iterdir() if fnmatch.fnmatch(path.name, pattern))
    except (FileNotFoundError, NotADirectoryError):
        return []


def check_writable(folder: Path, names: Iterable[str] = ()) -> None:
    """Make a folder, and check that it takes files, before hours are spent on what goes there.

    Args:
        folder: of the files.
        names: of the files, in whose place there may be no folder.

    Raises:
        AccessError: the system refuses to write.
        InputError: there is a folder in place of a file.
    """
    with naming_access_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        for name in names:
            if (folder / name).is_dir():
                raise InputError(f"{folder / name} is a folder. Expected a file.", "Move it away.")


@contextmanager
def open_regular(path: Path) -> Iterator[BufferedReader]:
    """Open a regular file for reading. (A named pipe would wait for its writer for ever.)

    Raises:
        InputError: it is a folder, a named pipe, a socket or a device.
        OSError: the system can't open it.
    """
    check_regular(path, path.stat())  # a socket can't even be opened
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        check_regular(path, os.fstat(descriptor))
        stream = os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise
    with stream:
        try:
            yield stream
        except OSError as error:
            if error.errno is not None and error.filename is None:  # reading names no file
                error.filename = str(path)
            raise


def check_regular(path: Path, status: os.stat_result) -> None:
    """Refuse what is no regular file, given its status.

    Raises:
        InputError: it is a folder, a named pipe, a socket or a device.
    """
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "no file")
        raise InputError(f"{path} is {kind}. Expected a file.", "Name a file instead.")


def read_bytes(path: Path) -> bytes:
    """Read a regular file.

    Raises:
        InputError, OSError: as `open_regular`.
    """
    with open_regular(path) as stream:
        return stream.read()


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open_regular(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex sha256 of a JSON value. The order of keys does not matter."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def canonical_json(value: Any) -> str:
    """The one spelling of a JSON value that hashes are computed from."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, and rename it to ``path`` if the block succeeds.

    The file is fsynced before the rename and its folder after it, so that a file whose name lacks
    ``.tmp`` is whole even after a crash. Outputs may be hard links into DVC's cache, so they are
    never opened for writing in place.

    Raises:
        NoSpaceError: the disk is full.
        AccessError: the system refuses to write.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with naming_access_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            size = temporary.stat().st_size
            temporary.replace(path)
            fsync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    _log.info("wrote %s, %d bytes", path, size)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, and replace ``folder`` with it if the block succeeds.

    The two exchange their names, and what was ``folder`` is removed after that. The caller holds
    the folder's lock. What a killed process left is tidied up first, see `tidy`.

    Raises:
        NoSpaceError: the disk is full.
        AccessError: the system refuses to write.
    """
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    with naming_access_errors():
        folder.parent.mkdir(parents=True, exist_ok=True)
        tidy(folder)
        temporary.mkdir()
    try:
        with naming_access_errors(folder):
            yield temporary
            if not os.path.lexists(folder):
                temporary.replace(folder)
            elif not _exchanged(temporary, folder):
                _exchange_in_steps(temporary, folder)
            fsync_folder(folder.parent)
        _log.info("wrote the folder %s", folder)
    finally:
        _remove(temporary)


_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux's fcntl.h and fs.h
_renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)  # glibc has it since 2.28


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two names at once, so that each of them exists at any moment.

    Returns:
        Whether that was done: some file systems, such as NFS, can't do it.
    """
    names = (_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other))
    return _renameat2 is not None and _renameat2(*names, _RENAME_EXCHANGE) == 0


def _exchange_in_steps(temporary: Path, folder: Path) -> None:
    """Exchange two names where `_exchanged` can't. For a moment there is no ``folder``."""
    former = temporary.with_suffix(".old")
    try:
        folder.replace(former)
        temporary.replace(folder)
    finally:
        if not os.path.lexists(folder) and os.path.lexists(former):
            former.replace(folder)
    former.replace(temporary)


def tidy(folder: Path) -> None:
    """Move back or remove what a killed writer of ``folder`` left. The caller holds its lock.

    That is the former folder, if the process was killed while the two exchanged their names step by
    step, and temporary folders and files.
    """
    name = glob.escape(folder.name)
    for former in folder.parent.glob(f".{name}.{_TAG}.old"):
        if os.path.lexists(folder):
            _remove(former)
        else:
            former.replace(folder)
    for leftover in folder.parent.glob(f".{name}.{_TAG}.tmp"):
        _remove(leftover)
    remove_temporaries(folder)


def remove_temporaries(folder: Path, name: str = "*") -> None:
    """Remove the temporary files that killed processes left of files in ``folder``.

    Args:
        folder: whose files nobody else writes now.
        name: of the files; a pattern of `glob`.
    """
    for leftover in folder.glob(f"{name}.{_TAG}.tmp"):
        leftover.unlink(missing_ok=True)


def _remove(path: Path) -> None:
    """Remove a folder, or the file or link that is in its place. What can't be removed is left."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def fsync_folder(folder: Path) -> None:
    """Flush the names of the files in ``folder`` to disk, unless this user may not list it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # the files are written, and only a crash could lose their names
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the operating system's lock on an output folder. It is released when the process ends.

    The lock file lies beside the folder, not in it, since the folder is an output that DVC hashes
    and may delete.

    Raises:
        BusyError: another process is writing to ``folder``.
        AccessError: the system refuses to make the lock.
    """
    path = folder.parent / f".{folder.name}.lock"
    lock = FileLock(path)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise BusyError(
            f"{folder} is being written by another gmpipe process, perhaps one that a killed run "
            "left behind.",
            "Wait for it to finish, or end it, and run this command again.",
        ) from None
    except OSError as error:
        raise access_error(error, path) from error
    try:
        yield
    finally:
        lock.release()


def begin_turn(folder: Path, *, patience: float = 60) -> str:
    """End the turn of the run that wrote to ``folder`` before, and begin a new one.

    A killed process can leave workers behind that still write. They write only `in_turn`, so this
    waits for what they are writing, and refuses what they begin later. The caller holds
    `folder_lock`.

    Args:
        folder: the output folder.
        patience: seconds to wait for earlier workers.

    Returns:
        the name of the turn, for `in_turn`.

    Raises:
        BusyError: workers of an earlier run are still writing.
    """
    path = _turn_file(folder)
    deadline = time.monotonic() + patience
    with path.open("a+") as stream:
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise BusyError(
                        f"{folder}: workers of an earlier run are still writing after "
                        f"{patience:.0f} s.",
                        "End them (with Dask: restart the cluster's workers), and run this command "
                        "again.",
                    ) from None
                time.sleep(0.2)
        turn = uuid.uuid4().hex
        stream.truncate(0)
        stream.write(turn)
    return turn


@contextmanager
def in_turn(folder: Path, turn: str) -> Iterator[None]:
    """Write to ``folder`` in the block, as a worker of the run that began ``turn``.

    Raises:
        BusyError: another run has begun its turn since.
    """
    with _turn_file(folder).open() as stream:
        fcntl.flock(stream, fcntl.LOCK_SH)
        if stream.read() != turn:
            raise BusyError(
                f"{folder}: another run has started writing to this folder, so this one stops.",
                "Wait for the other run.",
            )
        yield


def _turn_file(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.workers.lock"
