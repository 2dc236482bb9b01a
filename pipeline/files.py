"""Files that are written whole or not at all, and folders with one writer at a time."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipeline.errors import BusyError, NoSpaceError

_log = logging.getLogger(__name__)

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def naming_a_full_disk(path: Path | None = None) -> Iterator[None]:
    """Raise a `NoSpaceError` for an `OSError` in the block that means that the disk is full.

    Args:
        path: what is written in the block; None if only the error can name it.

    Raises:
        NoSpaceError: the disk, or the user's share of it, is full.
        OSError: any other, as it was raised.
    """
    try:
        yield
    except OSError as error:
        # HDF5 puts the system's error number only into its message.
        numbers = [n for n in _NO_SPACE if error.errno == n or f"errno = {n}," in str(error)]
        if not numbers:
            raise
        written = path or error.filename
        where = f" while writing {written}" if written else ""
        raise NoSpaceError(
            f"no space left on the device{where} ({error}). Everything that was finished before "
            "is complete and kept.",
            "Make space, and run the same command again.",
        ) from error


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as stream:
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
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with naming_a_full_disk(path):
            yield temporary
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            size = temporary.stat().st_size
            temporary.replace(path)
            fsync_folder(path.parent)
        _log.info("wrote %s, %d bytes", path, size)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, and replace ``folder`` with it if the block succeeds.

    The caller holds the folder's lock.

    Raises:
        NoSpaceError: the disk is full.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in folder.parent.glob(f".{folder.name}.*.tmp"):  # of a killed process
        shutil.rmtree(leftover)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir()
    try:
        with naming_a_full_disk(folder):
            yield temporary
            if folder.exists():
                shutil.rmtree(folder)
            temporary.replace(folder)
            fsync_folder(folder.parent)
        _log.info("wrote the folder %s", folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def fsync_folder(folder: Path) -> None:
    """Flush the names of the files in ``folder`` to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
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
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BusyError(
            f"{folder} is being written by another gmpipe process, perhaps one that a killed run "
            "left behind.",
            "Wait for it to finish, or end it, and run this command again.",
        ) from None
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
