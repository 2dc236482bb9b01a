"""pipeline.datasets.listing: what all data sets of files share, from a listing to a manifest."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from refusals import refused
from trees import draw_image

from pipeline.datasets.listing import (
    Listing,
    find_files,
    hash_sources,
    is_current,
    make_manifest,
    read_lines,
)
from pipeline.datasets.manifest import COLUMNS
from pipeline.errors import AccessError, GmpipeError, InputError, MissingError
from pipeline.settings import TableSettings


def make_listing(rows: Sequence[dict[str, Any]]) -> Listing:
    """A listing of these images, by turns in train and test, each with the label `cat`."""
    filled = [
        {"split": ("train", "test")[number % 2], "labels": [0], "ignored": [], **row}
        for number, row in enumerate(rows)
    ]
    return Listing(("cat",), "own", {}, pa.Table.from_pylist(filled, schema=COLUMNS))


# --- the manifest of the images that exist -------------------------------------------------------


@pytest.mark.parametrize("path", ["../x.jpg", "/etc/passwd", "a/../../x.jpg", "a\\x.jpg"])
@pytest.mark.parametrize("drop", [False, True])
def test_path_outside_the_root_is_refused_before_any_folder_is_read(
    tmp_path: Path, path: str, drop: bool
) -> None:
    settings = TableSettings(source="table", drop_missing=drop)
    listing = make_listing([{"image_id": "a", "path": "a.jpg"}, {"image_id": "b", "path": path}])
    with (
        mock.patch("os.scandir", side_effect=AssertionError),
        refused(InputError, "row 1 ('b')", repr(path)),
    ):
        make_manifest(listing, "pets", tmp_path, settings)


def test_rows_that_are_left_out_are_checked_too(tmp_path: Path) -> None:
    settings = TableSettings(source="table", drop_missing=True)
    rows = [{"image_id": name, "path": f"{name}.jpg"} for name in ("a", "b", "c", "a")]
    for name in "ab":
        draw_image(tmp_path / f"{name}.jpg")
    with refused(InputError, "row 3 ('a')", "row 0"):
        make_manifest(make_listing(rows), "pets", tmp_path, settings)
    manifest, missing = make_manifest(make_listing(rows[:3]), "pets", tmp_path, settings)
    assert missing.column("image_id").to_pylist() == ["c"]
    assert is_current(manifest, ["c.jpg"], tmp_path, settings)
    assert not is_current(manifest, [], tmp_path, settings)
    assert not is_current(manifest, ["c.jpg"], tmp_path, TableSettings(source="table"))


# --- where missing images are --------------------------------------------------------------------


def missing_error(
    root: Path, listed: Sequence[str], existing: Sequence[str], **changes: Any
) -> str:
    """The error of a table that lists some images where other files exist."""
    for path in existing:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    settings = TableSettings.model_validate({"source": "table", **changes})
    rows = [{"image_id": name, "path": str(Path(settings.images) / name)} for name in listed]
    with pytest.raises(GmpipeError) as caught:
        make_manifest(make_listing(rows), "pets", root, settings)
    return str(caught.value)


@pytest.mark.parametrize(
    ("listed", "existing", "changes", "location", "parts"),
    [
        (["a.jpg", "b.jpg"], ["photos/a.jpg"], {}, "photos/a.jpg", ["images: photos`"]),
        (["x/a.jpg", "b.jpg"], ["c/d/x/a.jpg"], {}, "c/d/x/a.jpg", ["images: c/d`"]),
        (["a.jpg", "b.jpg"], ["a.jpg"], {"images": "x"}, "a.jpg", ["images: .`"]),
        (["a.jpg", "b.jpg"], ["y/a.jpg"], {"images": "x"}, "y/a.jpg", ["images: y`"]),
        (["a.jpg", "b.jpg"], ["p/B.JPG"], {}, "p/B.JPG", ["images: p`"]),
        (["a.jpg", "x/b.jpg"], ["a.jpg", "x/b.JPG"], {}, "x/b.JPG", ["'x/b.jpg'", "case"]),
        (["a.jpg", "x/b.jpg"], ["X/b.jpg"], {}, "X/b.jpg", ["'x/b.jpg'", "case"]),
        (["a.jpg", "x/b.jpg"], ["y/b.jpg"], {}, "y/b.jpg", ["path", "file"]),
        (["ba.jpg", "b.jpg"], ["y/a.jpg", "c.jpg"], {}, None, []),
    ],
)
@pytest.mark.parametrize("drop", [False, True])
def test_missing_image_is_looked_for_in_other_folders(
    tmp_path: Path,
    listed: list[str],
    existing: list[str],
    changes: dict[str, str],
    location: str | None,
    parts: list[str],
    drop: bool,
) -> None:
    root = tmp_path / "pets"
    root.mkdir()
    message = missing_error(root, listed, existing, drop_missing=drop, **changes)
    if location is None:
        assert not any(f"{root}/{path}" in message for path in existing)
    else:
        assert f" {root}/{location}" in message
    for part in parts:
        assert part in message
    if parts and parts[0].startswith("images: "):
        assert f"`prepare.pets.{parts[0]}" in message
    some_exist = not changes and existing[0] == listed[0]
    assert ("drop_missing: true" in message) == (not drop and some_exist)


def test_links_to_folders_are_followed_without_endless_loops(tmp_path: Path) -> None:
    root = tmp_path / "pets"
    (tmp_path / "far").mkdir()
    (tmp_path / "far/b.jpg").touch()
    root.mkdir()
    (root / "again").symlink_to(root)
    (root / "photos").symlink_to(tmp_path / "far")
    message = missing_error(root, ["a.jpg", "b.jpg"], [])
    assert f"{root}/photos/b.jpg" in message
    assert "`prepare.pets.images: photos`" in message
    with mock.patch("pipeline.datasets.listing._MOST_LOOKED_AT", 0):
        assert "photos" not in missing_error(root, ["a.jpg", "b.jpg"], [])


# --- files and folders ---------------------------------------------------------------------------

names = st.sampled_from(["a.jpg", "b.jpg", "c", "ü ß.png", "漢.jpg"])
paths = st.builds("/".join, st.tuples(st.sampled_from(["x", "x/y", "z", "."]), names)) | names


@given(existing=st.sets(paths), wanted=st.lists(paths))
@hypothesis_settings(max_examples=40, deadline=None)
def test_find_files_agrees_with_the_file_system(
    tmp_path_factory: pytest.TempPathFactory, existing: set[str], wanted: list[str]
) -> None:
    root = tmp_path_factory.mktemp("files")
    for path in existing:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    wanted += ["x", "x/y", "none/a.jpg", "x/a\0b", "x\0/a"]
    expected = ["\0" not in path and (root / path).is_file() for path in wanted]
    assert find_files(root, wanted).tolist() == expected


def test_every_folder_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with mock.patch("os.scandir", wraps=os.scandir) as scandir:
        find_files(tmp_path, ["x/a", "x/b", "c", "x/d", "gone/e", "gone/f"])
    assert scandir.call_count == 3


def test_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with (
        mock.patch("os.scandir", side_effect=PermissionError(13, "Permission denied")),
        refused(AccessError, str(tmp_path / "x"), "Permission denied"),
    ):
        find_files(tmp_path, ["x/a"])


def test_hash_of_a_folder_covers_names_and_contents(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    hashes = set()
    for contents in (
        {"a": "1"},
        {"a": "2"},
        {"b": "1"},
        {"a": "1", "b": "1"},
        {"b": "1", "a": "2"},
    ):
        for path in folder.iterdir():
            path.unlink()
        for name, content in contents.items():
            (folder / name).write_text(content)
        hashes |= set(hash_sources(tmp_path, ["x"]).values())
    assert len(hashes) == 5


def test_read_lines_keeps_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(b"\r\n a b \r\n\n\tc")
    assert read_lines(path, "") == [(2, "a b"), (4, "c")]
    path.write_bytes(b"a\nb\nc\xff\n")
    with refused(InputError, "list.txt, line 3: ", "UTF-8", "Do that."):
        read_lines(path, "Do that.")
    with refused(MissingError, "other.txt", "Do that."):
        read_lines(tmp_path / "other.txt", "Do that.")
