"""pipeline.datasets.disk: which files listed paths mean."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from refusals import refused

from pipeline.datasets.disk import Disk, find_files
from pipeline.errors import AccessError, InputError

names = st.sampled_from(["a.jpg", "b.jpg", "c", "ü ß.png", "漢.jpg"])
paths = st.builds("/".join, st.tuples(st.sampled_from(["x", "x/y", "z", "."]), names)) | names


@given(existing=st.sets(paths), wanted=st.lists(paths))
@hypothesis_settings(max_examples=40)
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


# --- names that mean a file ----------------------------------------------------------------------

NFC, NFD = (unicodedata.normalize(form, "photos/café/Ångström ü.jpg") for form in ("NFC", "NFD"))


def touch(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


@pytest.mark.parametrize(("listed", "existing"), [(NFC, NFD), (NFD, NFC), (NFC, NFC), (NFD, NFD)])
def test_a_name_in_another_unicode_form_is_found(
    tmp_path: Path, listed: str, existing: str
) -> None:
    """Names of folders too. The path is that on disk, so that the file can be opened."""
    assert NFC != NFD
    touch(tmp_path, existing)
    assert Disk(tmp_path).find(listed) == existing
    assert Disk(tmp_path).find("photos/other.jpg") is None


def test_of_two_forms_that_exist_the_listed_one_is_taken(tmp_path: Path) -> None:
    touch(tmp_path, NFC, NFD)
    assert [*map(Disk(tmp_path).find, [NFC, NFD])] == [NFC, NFD]
    folder, name = NFD.rpartition("/")[0], NFC.rpartition("/")[2]
    assert Disk(tmp_path).find(f"{folder}/{name}") == NFD  # what is in that folder


def test_two_other_forms_of_a_name_are_refused(tmp_path: Path) -> None:
    names = [unicodedata.normalize(form, "\u00e9\u00e9.jpg") for form in ("NFC", "NFD")]
    touch(tmp_path, *names)
    with refused(InputError, "'\u00e9e\u0301.jpg'", *names):
        Disk(tmp_path).find("\u00e9e\u0301.jpg")


@pytest.mark.parametrize(
    ("listed", "existing", "found"),
    [
        ("photos/00", ["photos/00.jpg"], "photos/00.jpg"),
        ("00", ["00.JPEG", "00.txt", "000.jpg"], "00.JPEG"),
        ("v1.2", ["v1.2.png"], "v1.2.png"),
        ("00", ["00", "00.jpg"], "00"),
        ("00", ["00.xml"], None),
        ("00", ["photos/00.jpg"], None),
        ("00.jpg", ["00.png"], None),
        ("../00", ["00.jpg"], None),
        ("00\0", ["00.jpg"], None),
    ],
)
def test_a_name_without_suffix_means_the_only_photograph(
    tmp_path: Path, listed: str, existing: list[str], found: str | None
) -> None:
    touch(tmp_path, *existing)
    assert Disk(tmp_path).find(listed) == found


def test_a_name_that_can_be_two_photographs_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "photos/00.jpg", "photos/00.png")
    with refused(InputError, str(tmp_path), "'photos/00'", "photos/00.jpg", "photos/00.png"):
        Disk(tmp_path).find("photos/00")
