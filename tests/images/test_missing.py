"""pipeline.datasets.missing: what lies there instead of a missing image."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from trees import make_listing

from pipeline.datasets.listing import make_manifest
from pipeline.datasets.missing import locate_missing
from pipeline.errors import GmpipeError
from pipeline.settings import TableSettings, VocSettings

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
    assert "drop_missing: true" not in message  # it would leave a split without images


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
    with mock.patch("pipeline.datasets.missing._MOST_LOOKED_AT", 0):
        assert "photos" not in missing_error(root, ["a.jpg", "b.jpg"], [])


# --- what lies there -----------------------------------------------------------------------------


NFC, NFD = (unicodedata.normalize(form, "photos/café/Ångström ü.jpg") for form in ("NFC", "NFD"))


def touch(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


@pytest.mark.parametrize(
    ("listed", "existing", "parts"),
    [
        (["a.jpg", "b.jpg"], ["a.png", "b.png"], ["All 2 ", "a.png", "'a.jpg'", ".png", "rename"]),
        (["a.jpg", "b.jpg"], ["a.JPEG"], ["1 of the 2 ", "a.JPEG", "'a.jpg'", "rename"]),
        (["a.jpg", "b.jpg"], ["b.JPG"], ["1 of the 2 ", "b.JPG", "'b.jpg'", "case"]),
        (["x/a.jpg"], ["y/a.png"], ["x/a.jpg", "y/a.png", "folder"]),
        (["x/a.jpg"], ["y/a.png", "x/a.webp"], ["x/a.webp"]),
        (["a.jpg"], ["a.heic"], ["a.heic", "convert", "JPEG"]),
        (["A"], ["a.jpg"], ["a.jpg", "case", "suffix"]),
        (["a", "b"], ["p/a.jpg", "p/b.jpg"], ["All 2 ", "`prepare.pets.images: p`"]),
        ([NFC.rpartition("/")[2]], [NFD], [f"`prepare.pets.images: {NFD.rpartition('/')[0]}`"]),
        (["a.jpg"], ["a"], ["without a suffix"]),
        (
            ["a.jpg", "b.jpg", "c.jpg"],
            ["a.png", "b.png", "x/c.jpg"],
            ["2 of the 3 ", "1 of the 3 "],
        ),
    ],
)
def test_what_lies_there_is_named(
    tmp_path: Path, listed: list[str], existing: list[str], parts: list[str]
) -> None:
    root = tmp_path / "pets"
    touch(root, *existing)
    missing = [(name, name) for name in listed]
    hint = locate_missing(root, missing, TableSettings(source="table"))
    assert hint is not None
    for part in parts:
        assert part in hint


def test_of_equal_names_that_in_the_same_folder_counts(tmp_path: Path) -> None:
    touch(tmp_path, "x/a.png", "y/a.png", "z/a.png")
    missing = [(path, path) for path in ("y/a.jpg", "x/a.jpg", "z/a.jpg")]
    hint = locate_missing(tmp_path, missing, TableSettings(source="table"))
    assert hint is not None
    assert "All 3 " in hint
    assert "folder" not in hint
    assert f"{tmp_path}/y/a.png" in hint


def test_nothing_that_resembles_an_image_is_not_named(tmp_path: Path) -> None:
    touch(tmp_path, "a.xml", "aa.jpg", "b/c.jpg", ".jpg")
    for missing in ([], [("a", "Annotations/a.jpg")]):
        assert locate_missing(tmp_path, missing, VocSettings(source="voc")) is None


# --- links, several folders, changed names -------------------------------------------------------


def hint_of(root: Path, *listed: str) -> str:
    missing = [(name, name) for name in listed]
    return locate_missing(root, missing, TableSettings(source="table")) or ""


def test_link_that_leads_nowhere_is_named_as_one(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").symlink_to("cache/0a1b")
    hint = hint_of(tmp_path, "a.jpg")
    assert f"{tmp_path}/a.jpg is a link to cache/0a1b" in hint
    assert "case" not in hint


def test_pipe_and_folder_in_the_place_of_a_photograph(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").mkdir()
    assert f"{tmp_path}/a.jpg is not a regular file" in hint_of(tmp_path, "a.jpg")
    assert f"{tmp_path}/b.jpg is a folder" in hint_of(tmp_path, "b.jpg")


def test_dangling_link_does_not_lie_in_another_folder(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x/a.jpg").symlink_to("nowhere")
    assert hint_of(tmp_path, "a.jpg") == ""


def test_photographs_in_several_folders_need_them_in_the_list(tmp_path: Path) -> None:
    touch(tmp_path, "train/a.jpg", "train/b.jpg", "test/c.jpg")
    hint = hint_of(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    for part in ("All 3 ", "'train/a.jpg'", "'a.jpg'", "`images: .`"):
        assert part in hint
    assert "images: train" not in hint


def test_photographs_of_which_one_folder_has_only_some(tmp_path: Path) -> None:
    root = tmp_path / "pets"
    touch(root, "test/c.jpg")
    message = missing_error(root, ["a.jpg", "c.jpg"], ["train/a.jpg"], images="train")
    assert "'test/c.jpg'" in message
    assert "`images: .`" in message


@pytest.mark.parametrize(
    ("listed", "existing"),
    [
        ("Bild 1 PM.jpg", "Bild 1\u202fPM.jpg"),
        ("a b.jpg", "a\u00a0b.jpg"),
        ("a%20b.jpg", "a b.jpg"),
        ("a b.jpg", "a%20b.jpg"),
        ("a.jpg", "a .jpg"),
        ("7.jpg", "007.jpg"),
        ("7", "007.jpg"),
        ("bee.jpg", "ab12cd34-bee.jpg"),
        ("ab12cd34-bee.jpg", "bee.jpg"),
        ("IMG_1.jpg", ".IMG_1.jpg.icloud"),
    ],
)
def test_name_that_a_tool_changed_is_named_if_one_file_has_it(
    tmp_path: Path, listed: str, existing: str
) -> None:
    touch(tmp_path, existing)
    hint = hint_of(tmp_path, listed)
    assert f"{tmp_path / existing}" in hint
    assert f"{listed!r}" in hint
    touch(tmp_path, f"other/{existing}")
    assert hint_of(tmp_path, listed) == ""


def test_image_that_really_is_missing_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "a.JPG", "b.JPG")
    hint = hint_of(tmp_path, "a.jpg", "c.jpg", "b.jpg")
    assert "2 of the 3 " in hint
    assert "'c.jpg' has no similar file" in hint
