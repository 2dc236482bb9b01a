"""Files are written whole or not at all, a folder has one writer, and JSON has one spelling."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from builders import Stopped, tree
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import AccessError, BusyError, NoSpaceError
from pipeline.files import (
    begin_turn,
    canonical_json,
    folder_lock,
    in_turn,
    naming_access_errors,
    replacing,
    replacing_folder,
    sha256_file,
    sha256_json,
    write_json,
)

ROOT = Path(__file__).resolve().parents[1]


# Replacing a file --------------------------------------------------------------------------------


def test_a_file_is_replaced_when_the_block_ends_well(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with replacing(path) as temporary:
        assert temporary.parent == path.parent
        assert temporary.name.endswith(".tmp")
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert tree(tmp_path) == {"file.txt": "new"}


def test_the_folder_of_a_new_file_is_created(tmp_path: Path) -> None:
    with replacing(tmp_path / "a" / "b" / "file.txt") as temporary:
        temporary.write_text("new")
    assert tree(tmp_path) == {"a": None, "a/b": None, "a/b/file.txt": "new"}


@pytest.mark.parametrize("before", [{}, {"file.txt": "old"}])
def test_a_stopped_block_changes_nothing(tmp_path: Path, before: dict[str, str]) -> None:
    for name, text in before.items():
        (tmp_path / name).write_text(text)

    def stop_half_way() -> None:
        with replacing(tmp_path / "file.txt") as temporary:
            temporary.write_text("half of the n")
            raise Stopped

    with pytest.raises(Stopped):
        stop_half_way()
    assert tree(tmp_path) == before


def test_a_block_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(AccessError), replacing(path):
        pass
    assert tree(tmp_path) == {"file.txt": "old"}


def test_links_in_place_are_not_written_through(tmp_path: Path) -> None:
    """DVC links outputs to its cache, which must not change."""
    cached = tmp_path / "cached"
    cached.write_text("old")
    for name, link in (("hard", os.link), ("soft", os.symlink)):
        link(cached, tmp_path / name)
        with replacing(tmp_path / name) as temporary:
            temporary.write_text("new")
    assert tree(tmp_path) == {"cached": "old", "hard": "new", "soft": "new"}
    assert not (tmp_path / "soft").is_symlink()


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    with replacing(path) as first, replacing(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert tree(tmp_path) == {"file.txt": "first"}


def test_a_file_is_on_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.txt"
    calls = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        about = os.fstat(descriptor)
        calls.append((stat.S_ISDIR(about.st_mode), about.st_size > 0, path.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert calls[0] == (False, True, False)
    assert [(is_folder, named) for is_folder, _, named in calls[1:]] == [(True, True)]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "full"),
        OSError(errno.EDQUOT, "full"),
        OSError(f"unable to write (errno = {errno.ENOSPC}, error message = 'full')"),  # HDF5's
    ],
)
def test_a_full_disk_is_named_with_what_was_written(tmp_path: Path, error: OSError) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write() -> None:
        with replacing(path) as temporary:
            temporary.write_text("n")
            raise error

    with pytest.raises(NoSpaceError, match=str(path)) as caught:
        write()
    assert caught.value.__cause__ is error
    assert tree(tmp_path) == {"file.txt": "old"}
    with pytest.raises(NoSpaceError, match=r"a\.txt"), naming_access_errors():
        raise OSError(errno.ENOSPC, "full", "a.txt")


# One writer at a time ----------------------------------------------------------------------------

HOLDER = """
import sys
from pathlib import Path
from pipeline.errors import AccessError, BusyError, InputError, NoSpaceError
from pipeline.files import folder_lock
try:
    with folder_lock(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.read()
except BusyError as error:
    print(f"refused: {error}", flush=True)
"""


@contextmanager
def another_process(folder: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A process that holds the lock until its stdin is closed, and the line it printed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    with process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip(), process
        finally:
            process.kill()


def try_lock(folder: Path) -> bool:
    try:
        with folder_lock(folder):
            return True
    except BusyError:
        return False


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with folder_lock(folder), another_process(folder) as (said, _):
        assert said.startswith("refused: ")
        assert str(folder) in said
    with another_process(folder) as (said, _):
        assert said == "held"


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with another_process(folder) as (said, process):
        assert said == "held"
        with (
            pytest.raises(BusyError, match=str(folder)),
            folder_lock(folder),
        ):
            pytest.fail("two processes hold one lock")
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert try_lock(folder)


def test_a_lock_is_released_however_the_block_ends(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with folder_lock(folder):
        assert not try_lock(folder)
    assert try_lock(folder)
    with pytest.raises(Stopped), folder_lock(folder):
        raise Stopped
    assert try_lock(folder)


def test_folders_have_locks_of_their_own(tmp_path: Path) -> None:
    with folder_lock(tmp_path / "one"):
        assert try_lock(tmp_path / "two")
        assert try_lock(tmp_path / "one" / "deeper")
        assert not try_lock(tmp_path / "one")


def test_a_lock_lies_beside_its_folder(tmp_path: Path) -> None:
    """DVC hashes the folder and deletes it before it runs a stage."""
    folder = tmp_path / "deep" / "out"
    with folder_lock(folder):
        assert not folder.exists()
        with replacing_folder(folder) as temporary:
            (temporary / "file.txt").write_text("new")
        assert tree(folder) == {"file.txt": "new"}
        assert not try_lock(folder)


# Hashes and JSON ---------------------------------------------------------------------------------

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    # A small alphabet, so that keys are sorted by more than their first letter.
    | st.text('ab\n"ö', max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text('ab\n"ö', max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


def reordered(value: Any) -> Any:
    """The same value with the keys of every dict in reverse order."""
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(value)}
    return [reordered(item) for item in value] if isinstance(value, list) else value


@given(value=json_values)
def test_json_has_one_spelling(value: Any) -> None:
    spelt = canonical_json(value)
    assert json.loads(spelt) == value
    assert canonical_json(reordered(value)) == spelt
    assert canonical_json(json.loads(spelt)) == spelt
    assert spelt.isascii()
    assert "\n" not in spelt


def test_the_spelling_is_fixed() -> None:
    value = {"b": [1, 2.5, None, True], "a": {"ö": "x y"}}
    spelt = '{"a":{"\\u00f6":"x y"},"b":[1,2.5,null,true]}'
    assert canonical_json(value) == spelt
    assert sha256_json(value) == hashlib.sha256(spelt.encode()).hexdigest()


@pytest.mark.parametrize(
    ("one", "other"), [(1, 1.0), (1, "1"), ([1, 2], [2, 1]), ({}, []), (None, False), ("a", "A")]
)
def test_other_values_have_other_hashes(one: Any, other: Any) -> None:
    assert sha256_json(one) != sha256_json(other)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [{"x": float("-inf")}]])
def test_json_can_not_hold_these_numbers(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(value)
    path = tmp_path / "file.json"
    path.write_text("old")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, value)
    assert tree(tmp_path) == {"file.json": "old"}


def test_json_is_written_indented(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.json"
    write_json(path, {"b": 1, "a": [2]})
    text = path.read_text()
    assert json.loads(text) == {"b": 1, "a": [2]}
    assert text.startswith('{\n  "b": 1,')
    assert text.endswith("}\n")


@pytest.mark.parametrize("content", [b"", b"abc", bytes(range(256)) * 5000])
def test_a_files_hash_is_that_of_its_bytes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    assert sha256_file(path) == hashlib.sha256(content).hexdigest()


# Turns -------------------------------------------------------------------------------------------


def test_a_worker_writes_only_in_the_turn_of_its_own_run(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    first = begin_turn(folder)
    with in_turn(folder, first), in_turn(folder, first):  # workers share a turn
        pass
    second = begin_turn(folder)
    assert second != first
    with (
        pytest.raises(BusyError, match=str(folder)),
        in_turn(folder, first),
    ):
        raise AssertionError
    with in_turn(folder, second):
        pass
    assert not folder.exists()  # the lock lies beside it


def test_a_run_waits_for_the_workers_of_the_one_before(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    turn = begin_turn(folder)
    worker = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from pathlib import Path; from pipeline.files import in_turn\n"
            "with in_turn(Path(sys.argv[1]), sys.argv[2]): print('in', flush=True); time.sleep(60)",
            str(folder),
            turn,
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert worker.stdout is not None
    assert worker.stdout.readline() == "in\n"
    with pytest.raises(BusyError, match=f"{folder}.* 0 s"):
        begin_turn(folder, patience=0)
    with in_turn(folder, turn):  # the turn is still theirs
        pass
    worker.kill()  # a lock goes with its process
    worker.communicate()
    assert begin_turn(folder, patience=0) != turn
