"""The photographs of the page: which files they are, their pictures, and what is said of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.report.photographs import (
    LONGEST_SIDE,
    about_photographs,
    with_its_suffix,
    write_pictures,
)


def test_pictures_are_small_upright_and_only_of_what_can_be_read(tmp_path: Path) -> None:
    wide, turned, broken, missing = (tmp_path / f"{n}.jpg" for n in range(4))
    Image.new("RGB", (1000, 500), "red").save(wide)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("RGB", (60, 30), "red").save(turned, exif=exif)
    broken.write_bytes(wide.read_bytes()[:300])
    done: list[int] = []
    sizes = write_pictures(
        [wide, turned, broken, missing], tmp_path / "pictures", threads=2, on_images=done.append
    )
    assert sizes.tolist() == [[LONGEST_SIDE, LONGEST_SIDE // 2], [30, 60], [0, 0], [0, 0]]
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["0.jpg", "1.jpg"]
    for number in (0, 1):
        with Image.open(tmp_path / f"pictures/{number}.jpg") as picture:
            assert picture.size == tuple(sizes[number])
    assert sum(done) == 4


def test_photographs_of_imported_regions_have_any_suffix(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    (folder / "a").mkdir(parents=True)
    found = {"1": "1.jpg", "2": "2.png", "a/3.v2": "a/3.v2.JPEG", "4.png": "4.png", "5": "5.jpg"}
    for name in found.values():
        (folder / name).touch()
    (folder / "5.png").touch()
    for image_id, name in found.items():
        assert with_its_suffix(folder / f"{image_id}.jpg") == folder / name
    (folder / "6.txt").touch()
    assert with_its_suffix(folder / "6.jpg") == folder / "6.jpg"


def test_all_photographs_are_there(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "1.png", tmp_path / "b" / "2.png"]
    readable = np.ones(2, np.bool_)
    about = about_photographs(paths, readable, None)
    assert about.problem == ""
    assert f"{tmp_path}." in about.origin
    assert f"{tmp_path}/a." in about_photographs(paths[:1], readable[:1], None).origin
    assert f"{tmp_path}." in about_photographs(paths[:1], readable[:1], tmp_path).origin


def test_missing_and_broken_photographs_are_named(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number:06d}.jpg" for number in range(2000)]
    readable = np.arange(2000) < 1
    for path in paths[:3]:
        path.touch()  # the first can be read, the second and third are broken
    about = about_photographs(paths, readable, tmp_path)
    assert f"{tmp_path}." in about.origin
    for said in ("1,997 of 2,000", str(paths[3]), "2 of 2,000", str(paths[1])):
        assert said in about.problem
    assert f"{tmp_path}/<id>.jpg" in about.problem
    assert "<id>" not in about_photographs(paths, readable, None).problem
    assert "<id>" not in about_photographs(paths[:3], readable[:3], tmp_path).problem
    assert about_photographs(paths[3:], readable[3:], tmp_path).origin == ""
