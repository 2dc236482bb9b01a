"""Folders are replaced as a whole, and what killed writers left is tidied up."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from builders import Stopped, tree

from pipeline import files
from pipeline.files import remove_temporaries, replacing_folder, tidy

ROOT = Path(__file__).resolve().parents[1]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "out"
    for text in ("old", "new"):
        with replacing_folder(folder) as temporary:
            assert temporary.parent == folder.parent
            (temporary / f"{text}.txt").write_text(text)
            (temporary / "same.txt").write_text(text)
            assert (folder / "old.txt").exists() == (text == "new")
    assert tree(tmp_path / "deep") == {"out": None, "out/new.txt": "new", "out/same.txt": "new"}


@pytest.mark.parametrize("exists", [True, False])
def test_a_stopped_block_leaves_the_folder_as_it_was(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path / "out"
    if exists:
        folder.mkdir()
        (folder / "file.txt").write_text("old")
    before = tree(tmp_path)

    def stop_half_way() -> None:
        with replacing_folder(folder) as temporary:
            (temporary / "file.txt").write_text("new")
            raise Stopped

    with pytest.raises(Stopped):
        stop_half_way()
    assert tree(tmp_path) == before


def test_a_linked_file_outlives_its_folder(tmp_path: Path) -> None:
    cached, folder = tmp_path / "cached", tmp_path / "out"
    cached.write_text("old")
    folder.mkdir()
    os.link(cached, folder / "file.txt")
    with replacing_folder(folder) as temporary:
        (temporary / "file.txt").write_text("new")
    assert tree(tmp_path) == {"cached": "old", "out": None, "out/file.txt": "new"}


REPLACER = """
import os, sys
from pathlib import Path
from pipeline import files

left = int(sys.argv[3])

def counted(call):
    def until_killed(*arguments):
        global left
        if not left:
            os._exit(9)
        left -= 1
        return call(*arguments)
    return until_killed

if sys.argv[2] == "in steps":
    files._renameat2 = None
for owner, name in ((files, "_exchanged"), (files, "_remove"), (Path, "replace")):
    setattr(owner, name, counted(getattr(owner, name)))
with files.replacing_folder(Path(sys.argv[1])) as temporary:
    (temporary / "file.txt").write_text("new")
"""


@pytest.mark.parametrize(
    ("how", "calls", "left"),
    [
        ("at once", 0, "old"),
        ("at once", 1, "new"),
        ("in steps", 1, "old"),
        ("in steps", 2, "old"),  # there is no folder of this name now
        ("in steps", 3, "new"),
        ("in steps", 4, "new"),
    ],
)
def test_a_kill_during_the_exchange_loses_nothing(
    tmp_path: Path, how: str, calls: int, left: str
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "file.txt").write_text("old")
    command = [sys.executable, "-c", REPLACER, str(folder), how, str(calls)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 9
    assert folder.exists() == ((how, calls) != ("in steps", 2))
    assert "old" in tree(tmp_path).values()

    def fail() -> None:
        with replacing_folder(folder):
            raise Stopped

    with pytest.raises(Stopped):  # even a call that fails restores the folder first
        fail()
    assert tree(tmp_path) == {"out": None, "out/file.txt": left}


@pytest.mark.parametrize("at_once", [True, False])
def test_a_folder_is_replaced_whether_names_can_be_exchanged_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    if not at_once:  # as the C library says it of a file system that can't
        monkeypatch.setattr("pipeline.files._renameat2", lambda *names: -1)
    elif not _exchanges(tmp_path):
        pytest.skip("this file system can't exchange names")
    steps = mock.Mock(wraps=files._exchange_in_steps)
    monkeypatch.setattr(files, "_exchange_in_steps", steps)
    out = tmp_path / "out"
    for text in ("old", "new"):
        with replacing_folder(out) as temporary:
            (temporary / f"{text}.txt").write_text(text)
    assert tree(tmp_path) == {"out": None, "out/new.txt": "new"}
    assert steps.called != at_once
    shutil.rmtree(out)
    out.write_text("a file in its place")
    with replacing_folder(out) as temporary:
        (temporary / "new.txt").write_text("new")
    assert tree(tmp_path) == {"out": None, "out/new.txt": "new"}


def _exchanges(folder: Path) -> bool:
    for name in ("one", "other"):
        (folder / name).mkdir()
    done = files._exchanged(folder / "one", folder / "other")
    for name in ("one", "other"):
        (folder / name).rmdir()
    return done


def test_only_what_killed_writers_left_is_tidied_up(tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "out.old"
    kept = ("file", "file.tmp", "file.0123456.tmp", "file.0123456x.tmp", "0123abcd.old")
    for folder in (out, other, tmp_path / ".out.0123abcd.old", tmp_path / ".out.0123abcd.tmp"):
        folder.mkdir()
        (folder / "file").write_text("kept" if folder in (out, other) else "left")
    for name in kept:
        (out / name).write_text("kept")
    (out / "file.0123abcd.tmp").write_text("left")
    (other / "file.0123abcd.tmp").write_text("kept")
    tidy(out)
    assert tree(tmp_path) == {
        "out": None,
        **{f"out/{name}": "kept" for name in kept},
        "out.old": None,
        "out.old/file": "kept",
        "out.old/file.0123abcd.tmp": "kept",
    }
    remove_temporaries(other, "another")
    assert (other / "file.0123abcd.tmp").exists()
    remove_temporaries(other, "file")
    assert tree(other) == {"file": "kept"}


def test_a_link_to_a_folder_is_replaced_and_its_target_kept(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "file.txt").write_text("kept")
    (tmp_path / "out").symlink_to("target")
    with replacing_folder(tmp_path / "out") as temporary:
        (temporary / "file.txt").write_text("new")
    assert tree(tmp_path / "target") == {"file.txt": "kept"}
    assert tree(tmp_path / "out") == {"file.txt": "new"}
