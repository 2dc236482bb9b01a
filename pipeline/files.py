"""Writing whole files or none, and one writer to a folder at a time."""

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

from pipeline.errors import BusyError, GmpipeError

_log = logging.getLogger(__name__)

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

NO_SPACE = (
    "no space left on the device{where} ({error}). What was finished before is whole and stays; "
    "make space and run the same command again."
)


def is_no_space(error: OSError) -> bool:
    """Whether an error says that the disk, or the user's share of it, is full."""
    # HDF5 puts the system's error number into its message only.
    return error.errno in _NO_SPACE or any(f"errno = {n}," in str(error) for n in _NO_SPACE)


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex sha256 of a JSON value, independent of the order of keys."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def canonical_json(value: Any) -> str:
    """The one spelling of a JSON value that hashes are taken over."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it into place when the block ends well.

    The file is fsynced before the rename and its folder after it, so that a name without
    ``.tmp`` is a whole file even after a crash. Outputs may be hard links into DVC's cache, so
    they are never opened for writing in place.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
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
    """Yield a temporary folder beside ``folder``; put it in its place when the block ends well.

    The caller holds the folder's lock.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in folder.parent.glob(f".{folder.name}.*.tmp"):  # of a killed process
        shutil.rmtree(leftover)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        if folder.exists():
            shutil.rmtree(folder)
        temporary.replace(folder)
        fsync_folder(folder.parent)
        _log.info("wrote the folder %s", folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def fsync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the operating system's lock on an output folder; it goes when the process does.

    The lock file lies beside the folder, not in it: the folder is an output that DVC hashes and
    may delete.

    Raises:
        BusyError: another process writes into ``folder``.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BusyError(
            f"{folder} is being written by another gmpipe process. A killed `dvc repro` can leave "
            "its child running: wait for it to finish, or end it, and run this command again."
        ) from None
    try:
        yield
    finally:
        lock.release()


def begin_turn(folder: Path, *, patience: float = 60) -> str:
    """End the turn of whoever wrote into ``folder`` before, and begin one.

    A killed process can leave workers behind that still write. They do so `in_turn` only, so they
    are waited for here, and what they begin later is refused. The caller holds `folder_lock`.

    Args:
        patience: seconds to wait for them.

    Returns:
        the turn's name, for `in_turn`.

    Raises:
        GmpipeError: they did not end.
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
                    raise GmpipeError(
                        f"workers of an earlier run still write into {folder} after {patience:.0f} "
                        "s. End them (with Dask: restart the cluster's workers), and run this "
                        "command again."
                    ) from None
                time.sleep(0.2)
        turn = uuid.uuid4().hex
        stream.truncate(0)
        stream.write(turn)
    return turn


@contextmanager
def in_turn(folder: Path, turn: str) -> Iterator[None]:
    """Write into ``folder`` as a worker of the run that began ``turn``.

    Raises:
        GmpipeError: another run has begun its turn since.
    """
    with _turn_file(folder).open() as stream:
        fcntl.flock(stream, fcntl.LOCK_SH)
        if stream.read() != turn:
            raise GmpipeError(
                f"another run writes into {folder} by now. This one ends; wait for the other."
            )
        yield


def _turn_file(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.workers.lock"
