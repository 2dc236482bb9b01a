"""The stage `prepare`: what it writes, what it leaves alone, and missing images."""

from __future__ import annotations

import csv
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Literal
from unittest import mock

import numpy as np
import pytest
from checkouts import IMAGES, Checkout, make_checkout
from PIL import Image
from trees import VOC_TEST, VOC_TRAIN, VocObject, draw_image, voc_xml

from pipeline.datasets.manifest import Manifest, full_counts, read_boxes, write_manifest


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return make_checkout(tmp_path / "checkout")


# --- what is written -----------------------------------------------------------------------------


def test_devkit_becomes_manifest_and_boxes(checkout: Checkout) -> None:
    line = checkout.prepare()
    assert line.startswith("data/voc/prepared: ")
    for part in ("3 train", "1 unlabelled", "2 test", "20 labels"):
        assert part in line
    assert checkout.prepared() == ["boxes.parquet", "manifest.parquet"]
    manifest = checkout.manifest()
    assert (manifest.dataset, manifest.split_name) == ("voc", "official")
    assert manifest.image_ids("train") == list(VOC_TRAIN)
    assert manifest.image_ids("test") == list(VOC_TEST)
    assert manifest.counts == {
        # 000005 has a difficult cat: ignored is not unlabelled.
        "train": {"listed": 3, "missing": 0, "unlabelled": 1, "images": 3},
        "test": {"listed": 2, "missing": 0, "unlabelled": 0, "images": 2},
    }
    assert "settings" in manifest.sources
    boxes = read_boxes(checkout / "data/voc/prepared/boxes.parquet", ["000001", "000005"])
    np.testing.assert_array_equal(boxes.images["000001"].boxes, [[0, 0, 0.5, 0.5]])
    assert len(boxes.images["000005"].boxes) == 0


def test_class_lists_give_no_boxes(checkout: Checkout) -> None:
    checkout.prepare()
    checkout.params(voc={"labels": "lists"})
    assert "unchanged" not in checkout.prepare()
    assert checkout.prepared() == ["manifest.parquet"]
    assert "unchanged" in checkout.prepare()


def test_unlabelled_images_are_left_out_on_request(checkout: Checkout) -> None:
    checkout.params(coco={"drop_unlabelled": True})
    line = checkout.prepare("coco")
    for part in ("3 train (1 unlabelled", "1 test (1 unlabelled", "3 labels"):
        assert part in line
    manifest = checkout.manifest("coco")
    assert manifest.image_ids("train") == ["30", "9", "400"]
    assert manifest.counts["test"] == {"listed": 2, "missing": 0, "unlabelled": 1, "images": 1}


@pytest.mark.parametrize(
    ("name", "year", "train", "test"),
    [("voc2007", "2007", 240, 160), ("coco", "2014", 16, 16), ("coco", "2017", 16, 16)],
)
def test_real_samples(
    shared: Path, tmp_path: Path, name: str, year: str, train: int, test: int
) -> None:
    """COCO's files are named as in 2017, so its sample is a tree of either year."""
    checkout = Checkout(tmp_path / "checkout")
    dataset = name[:3] if name == "voc2007" else name
    (checkout / "data").mkdir(parents=True)
    source, root = shared / f"data/{name}-sample", checkout / "data" / dataset
    for path in source.rglob("*"):  # folders of its own, with links to the files
        copy = root / str(path.relative_to(source)).replace("2014", year)
        if path.is_dir():
            copy.mkdir(parents=True)
        else:
            copy.symlink_to(path)
    splits = {"train": f"train{year}", "test": f"val{year}"}
    checkout.params(**({"coco": splits} if name == "coco" else {}))
    line = checkout.prepare(dataset)
    assert f"{train} train" in line
    assert f"{test} test" in line
    manifest = checkout.manifest(dataset)
    for row in manifest.table.to_pylist():
        with Image.open(root / row["path"]) as image:
            assert image.size == (row["width"], row["height"])
    code, lines = checkout.check(dataset)
    assert code == 0
    assert "missing: 0" in lines
    assert "unreadable: 0" in lines
    before = checkout.everything()
    assert "unchanged" in checkout.prepare(dataset)
    assert checkout.everything() == before


# --- missing images ------------------------------------------------------------------------------


def test_missing_images_are_an_error_unless_they_are_left_out(checkout: Checkout) -> None:
    for image_id in ("000012", "000001", "000005"):
        (checkout / f"{IMAGES}/{image_id}.jpg").unlink()
    checkout.refused(
        *("3 of 5", "voc", "'000001'", f"{IMAGES}/000001.jpg"),
        *("`prepare.voc.drop_missing: true`", "params.yaml", "missing.csv"),
    )
    assert not (checkout / "data/voc/prepared").exists()
    checkout.params(voc={"drop_missing": True})
    line = checkout.prepare()
    for part in ("1 train (2 missing, 1 unlabelled)", "1 test (1 missing)", "20 labels"):
        assert part in line
    assert checkout.manifest().table.column("image_id").to_pylist() == ["2008_000003", "000004"]
    assert checkout.manifest().counts == {
        "train": {"listed": 3, "missing": 2, "unlabelled": 1, "images": 1},
        "test": {"listed": 2, "missing": 1, "unlabelled": 0, "images": 1},
    }
    with (checkout / "data/voc/prepared/missing.csv").open(newline="") as stream:
        rows = list(csv.reader(stream))
    folder = IMAGES.removeprefix("data/voc/")
    assert rows == [
        ["image_id", "path"],
        *([image_id, f"{folder}/{image_id}.jpg"] for image_id in ("000001", "000012", "000005")),
    ]


def test_missing_image_without_labels_counts_as_missing(checkout: Checkout) -> None:
    (checkout / f"{IMAGES}/2008_000003.jpg").unlink()
    checkout.params(voc={"drop_missing": True, "drop_unlabelled": True})
    checkout.prepare()
    assert checkout.manifest().counts["train"] == {
        "listed": 3,
        "missing": 1,
        "unlabelled": 0,
        "images": 2,
    }


def test_split_without_any_image_left_is_refused(checkout: Checkout) -> None:
    for image_id in VOC_TEST:
        (checkout / f"{IMAGES}/{image_id}.jpg").unlink()
    checkout.params(voc={"drop_missing": True})
    checkout.refused("voc", "2 ", "'test'", "2 are missing", "data/voc", "`prepare.voc`")


def test_folder_or_dead_link_in_place_of_an_image_is_missing(checkout: Checkout) -> None:
    path = checkout / f"{IMAGES}/000001.jpg"
    path.unlink()
    path.mkdir()
    checkout.refused("1 of 5", "'000001'")
    path.rmdir()
    path.symlink_to("nowhere.jpg")
    checkout.refused("1 of 5", "'000001'")


def test_missing_image_folder_does_not_suggest_to_drop_all(checkout: Checkout) -> None:
    shutil.rmtree(checkout / IMAGES)
    assert "drop_missing" not in checkout.refused("5 of 5", "'000001'")
    (checkout / IMAGES).write_text("a file")
    checkout.refused("5 of 5", "'000001'")


# --- what is not written again -------------------------------------------------------------------


def change_a_label(checkout: Checkout) -> None:
    path = checkout / "data/voc/VOCdevkit/VOC2007/Annotations/000004.xml"
    path.write_text(voc_xml([VocObject("cow")]))


def swap_the_splits(checkout: Checkout) -> None:
    lists = checkout / "data/voc/VOCdevkit/VOC2007/ImageSets/Main"
    (lists / "trainval.txt").rename(lists / "x")
    (lists / "test.txt").rename(lists / "trainval.txt")
    (lists / "x").rename(lists / "test.txt")


def damage(name: str) -> Callable[[Checkout], None]:
    def change(checkout: Checkout) -> None:
        path = checkout / f"data/voc/prepared/{name}"
        path.write_bytes(path.read_bytes()[:-5])

    return change


@pytest.mark.parametrize(
    "change",
    [
        change_a_label,
        swap_the_splits,
        damage("manifest.parquet"),
        damage("boxes.parquet"),
        lambda checkout: (checkout / "data/voc/prepared/missing.csv").write_text("\n\n"),
        lambda checkout: (checkout / "data/voc/prepared/boxes.parquet").unlink(),
        lambda checkout: (checkout / "data/voc/prepared/missing.csv").unlink(),
        lambda checkout: (checkout / f"{IMAGES}/000012.jpg").unlink(),
        lambda checkout: draw_image(checkout / f"{IMAGES}/000001.jpg"),
        lambda checkout: checkout.params(voc={"drop_missing": True, "drop_unlabelled": True}),
    ],
)
def test_manifest_is_written_only_after_a_change(
    checkout: Checkout, change: Callable[[Checkout], object]
) -> None:
    checkout.params(voc={"drop_missing": True})
    (checkout / f"{IMAGES}/000001.jpg").unlink()
    first = checkout.prepare()
    before = checkout.everything()
    again = checkout.prepare()
    assert "unchanged" in again
    assert first.removeprefix("data/voc/prepared: ") in again
    assert checkout.everything() == before
    change(checkout)
    folder = checkout / "data/voc/prepared"
    inode = folder.stat().st_ino
    assert "unchanged" not in checkout.prepare()
    assert folder.stat().st_ino != inode
    assert "unchanged" in checkout.prepare()


def test_unchanged_sources_are_not_parsed_again(checkout: Checkout) -> None:
    """Nor is a table, although notes on it are printed each time."""
    root = checkout / "data/brought"
    draw_image(root / "a.jpg")
    draw_image(root / "b.jpg", 1)
    (root / "labels.csv").write_text("image,split,cat,dog\na.jpg,train,1,0\nb.jpg,test,0,1\n")
    checkout.params(brought={"source": "table"})
    for dataset, note in (("voc", ""), ("brought", "`prepare.brought.labels`")):
        assert note in checkout.run("--dataset", dataset)[1]
        with mock.patch.dict("stages.prepare._READERS", clear=True):
            _, out, _ = checkout.run("--dataset", dataset)
        assert "unchanged" in out
        assert note in out


def test_failure_keeps_the_last_manifest(checkout: Checkout) -> None:
    checkout.prepare()
    before = checkout.everything()
    path = checkout / "data/voc/VOCdevkit/VOC2007/Annotations/000004.xml"
    content = path.read_bytes()
    path.write_text("<annotation>")
    checkout.refused("000004.xml")
    assert checkout.everything().keys() == before.keys()
    path.write_bytes(content)
    assert "unchanged" in checkout.prepare()


def test_manifest_of_another_data_set_is_replaced(checkout: Checkout) -> None:
    checkout.prepare()
    shutil.move(checkout / "data/voc", checkout / "data/brought")
    checkout.params(brought={"source": "voc"})
    assert "unchanged" not in checkout.prepare("brought")
    assert checkout.manifest("brought").dataset == "brought"


# --- imported manifests --------------------------------------------------------------------------


def test_imported_data_set_has_its_manifest_already(checkout: Checkout) -> None:
    command = "`gmpipe import-regions FILE --dataset brought`"
    path = checkout / "data/brought/prepared/manifest.parquet"
    name = "data/brought/prepared/manifest.parquet"
    checkout.refused(name, command, dataset="brought")
    checkout.refused(name, command, dataset="brought", options=("--check",))
    checkout.prepare()
    voc = checkout.manifest()
    counts = full_counts(voc.table)
    write_manifest(path, Manifest("brought", "own", voc.vocabulary, {}, counts, voc.table))
    before = checkout.everything()
    line = checkout.prepare("brought")
    for part in ("data/brought/prepared", "3 train", "1 unlabelled", "2 test", "20 labels"):
        assert part in line
    assert checkout.everything() == before
    code, out, err = checkout.run("--dataset", "brought", "--check")
    assert (code, err) == (0, "")
    assert "brought: 3 train (1 unlabelled), 2 test, 20 labels" in out
    assert out.splitlines()[1].split() == ["label", "train", "test"]
    path.write_bytes(path.read_bytes()[:-9])
    checkout.refused("manifest.parquet", "Parquet", command, dataset="brought")


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_photographs_are_found_under_another_form_of_their_names(
    tmp_path: Path, form: Literal["NFC", "NFD"]
) -> None:
    """The manifest has the paths on disk, and the ids of the table."""
    checkout = Checkout(tmp_path)
    name = unicodedata.normalize(form, "fiancé.jpg")
    other = unicodedata.normalize("NFD" if form == "NFC" else "NFC", name)
    root = checkout / "data/coco"
    draw_image(root / f"photos/{name}", 1)
    draw_image(root / "photos/00.jpg", 2)
    table = f"image,labels,split\nphotos/{other},cat,train\nphotos/00,cat,test\n"
    (root / "labels.csv").write_text(table)
    checkout.params(coco={"source": "table"})
    assert checkout.check("coco")[0] == 0
    notes = []
    for options in ((), (), ("--check",)):
        _, out, _ = checkout.run("--dataset", "coco", *options)
        notes.append([line for line in out.splitlines() if "2 of 2 listed paths" in line])
    assert len(notes[0]) == 1
    assert notes == [notes[0]] * 3
    rows = checkout.manifest("coco").table.to_pylist()
    assert [row["path"] for row in rows] == [f"photos/{name}", "photos/00.jpg"]
    assert [row["image_id"] for row in rows] == [f"photos/{other}", "photos/00"]
    assert "unchanged" in checkout.prepare("coco")
