"""Errors of the operating system are put into words, and only regular files are read."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from pipeline.errors import AccessError, InputError, NoSpaceError
from pipeline.files import naming_access_errors, read_bytes


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(errno.EACCES, "denied", "a.txt"), ("a.txt: Permission denied", "right")),
        (OSError(errno.EROFS, "?", b"b.txt"), ("b.txt: Read-only file system", "read-only")),
        (OSError(errno.ENAMETOOLONG, "?", "c" * 300), ("c" * 300, "255 bytes")),
        (OSError(errno.EIO, "?", "from.tmp", None, "to.txt"), ("to.txt: ", "disk")),
        (  # h5py's
            OSError("can't open (name = 'd.h5', errno = 13, error message = 'Permission denied')"),
            ("d.h5: Permission denied", "right"),
        ),
        (shutil.Error([("e.txt", "f.txt", "[Errno 13] Permission denied")]), ("e.txt", "right")),
        (OSError("nothing is known"), ("nothing is known", "again")),
    ],
)
def test_an_error_of_the_system_has_path_reason_and_next_step(
    error: OSError, words: tuple[str, ...]
) -> None:
    with pytest.raises(AccessError) as caught, naming_access_errors():
        raise error
    assert not isinstance(caught.value, NoSpaceError)
    for word in words:
        assert word in str(caught.value)


def test_a_full_disk_during_a_copy_is_named() -> None:
    error = shutil.Error([("a", "b", f"[Errno {errno.ENOSPC}] No space left on device: 'b'")])
    with pytest.raises(NoSpaceError), naming_access_errors():
        raise error


def test_a_temporary_name_is_not_shown(tmp_path: Path) -> None:
    path, folder = tmp_path / "a.txt", tmp_path / "out"
    for shown, temporary in ((path, f"{path}.12345678.tmp"), (folder, tmp_path / ".out.1.tmp/x")):
        with pytest.raises(AccessError, match=f"^{shown}: ") as caught, naming_access_errors(shown):
            raise PermissionError(errno.EACCES, "denied", str(temporary))
        assert "tmp" not in str(caught.value).removeprefix(str(tmp_path))
    with pytest.raises(AccessError, match=r"^other\.txt: "), naming_access_errors(path):
        raise PermissionError(errno.EACCES, "denied", "other.txt")


# Reading -----------------------------------------------------------------------------------------


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)  # reading it would wait for ever
    with pytest.raises(InputError, match="named pipe"):
        read_bytes(path)
    with pytest.raises(InputError, match="folder"):
        read_bytes(tmp_path)
    with pytest.raises(InputError, match="device"):
        read_bytes(Path("/dev/zero"))
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("file")
    assert read_bytes(tmp_path / "link") == b"abc"
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path / "absent")
