"""pipeline.datasets.listing: what all data sets of files share, from a listing to a manifest."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
from refusals import refused
from trees import draw_image, make_listing

from pipeline.datasets.listing import (
    as_on_disk,
    hash_sources,
    is_current,
    make_manifest,
    read_lines,
)
from pipeline.errors import InputError, MissingError
from pipeline.settings import TableSettings

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


@pytest.mark.parametrize("again", ["photos/00", "./photos/00.jpg", "photos//00.jpg"])
def test_file_of_two_images_is_refused(tmp_path: Path, again: str) -> None:
    """Listed with and without its suffix, or in another spelling of its path."""
    draw_image(tmp_path / "photos/00.jpg")
    listed = {"a": "photos/01.jpg", "b": "photos/00.jpg", "c": again}
    rows = [{"image_id": image_id, "path": path} for image_id, path in listed.items()]
    with refused(InputError, "'b' (test)", "'c' (train)", "photos/00.jpg"):
        as_on_disk(tmp_path, make_listing(rows))


# --- files and folders ---------------------------------------------------------------------------


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
    path.write_bytes(b"\xef\xbb\xbfa\nb\n")
    assert read_lines(path, "") == [(1, "a"), (2, "b")]
    path.write_bytes(b"a\rb\r\rc")
    assert read_lines(path, "") == [(1, "a"), (2, "b"), (4, "c")]
    path.write_bytes(b"a\nb\nc\xff\n")
    with refused(InputError, "list.txt, line 3: ", "UTF-8", "'cÿ'", "`iconv ", "Do that."):
        read_lines(path, "Do that.")
    path.write_bytes("a\nb\n".encode("utf-16"))
    with refused(InputError, "list.txt, line 1: ", "`iconv -f UTF-16 "):
        read_lines(path, "")
    with refused(MissingError, "other.txt", "Do that."):
        read_lines(tmp_path / "other.txt", "Do that.")
