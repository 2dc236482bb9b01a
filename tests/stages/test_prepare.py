"""pipeline.datasets.listing and .check, and the stage `prepare`: as the command line shows them."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from ruamel.yaml import YAML
from trees import (
    SIZE,
    VOC_TEST,
    VOC_TRAIN,
    VocObject,
    draw_image,
    make_coco,
    make_voc,
    voc_xml,
)

from pipeline.datasets.check import check_files, similar_labels
from pipeline.datasets.listing import (
    Listing,
    find_files,
    hash_sources,
    is_current,
    make_manifest,
    read_lines,
    unit_boxes,
)
from pipeline.datasets.manifest import (
    COLUMNS,
    Manifest,
    full_counts,
    read_boxes,
    read_manifest,
    write_manifest,
)
from pipeline.errors import GmpipeError
from pipeline.settings import TableSettings
from stages.cli.main import main

IMAGES = "data/voc/VOCdevkit/VOC2007/JPEGImages"


@dataclass(frozen=True)
class Checkout:
    """A folder that gmpipe runs in, with the data sets `voc`, `coco`, `brought` and `demo`."""

    folder: Path

    def __truediv__(self, path: str) -> Path:
        return self.folder / path

    def params(self, **prepare: Any) -> None:
        """Write params.yaml; ``prepare`` changes the blocks of data sets."""
        blocks: dict[str, dict[str, Any]] = {
            "voc": {"source": "voc"},
            "coco": {"source": "coco"},
            "brought": {"source": "imported"},
            "demo": {"source": "scenes", "train": 10, "test": 2, "size": 64},
        }
        for name, changes in prepare.items():
            blocks[name].update(changes)
        raw = {
            "datasets": ["voc"],
            "variants": ["full"],
            "seeds": [0],
            "prepare": blocks,
            "detector": {name: {"source": "torchvision"} for name in blocks},
            "extract": {name: {} for name in blocks},
            "train": {name: {} for name in blocks},
        }
        with (self / "params.yaml").open("w") as stream:
            YAML(typ="safe").dump(raw, stream)

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """`gmpipe prepare ARGUMENTS` in this process: exit code, stdout, stderr."""
        out, err, code = io.StringIO(), io.StringIO(), 0
        with (
            contextlib.chdir(self.folder),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            mock.patch.object(sys, "argv", ["gmpipe", "prepare", *arguments]),
        ):
            try:
                main()
            except SystemExit as end:
                code = int(end.code or 0)
        assert "Traceback" not in err.getvalue()
        return code, out.getvalue(), err.getvalue()

    def prepare(self, dataset: str = "voc") -> str:
        """The first line that a run prints; labels follow."""
        code, out, err = self.run("--dataset", dataset)
        assert code == 0, err
        return out[: out.index("\n") + 1]

    def refused(self, pattern: str, dataset: str = "voc", *options: str) -> None:
        code, out, err = self.run("--dataset", dataset, *options)
        assert (code, out) == (1, "")
        assert re.search(pattern, err[err.index("Error: ") :]), err

    def check(self, dataset: str = "voc") -> tuple[int, list[str]]:
        """Exit code and lines of a check, which writes nothing."""
        before = self.everything()
        code, out, err = self.run("--dataset", dataset, "--check")
        assert self.everything() == before
        assert "image/s" in err
        return code, out.splitlines()

    def everything(self) -> dict[str, tuple[int, bytes]]:
        """Time and content of every file, and of folders their time."""
        return {
            str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
            for path in sorted(self.folder.rglob("*"))
        }

    def manifest(self, dataset: str = "voc") -> Manifest:
        return read_manifest(self / f"data/{dataset}/prepared/manifest.parquet")

    def prepared(self, dataset: str = "voc") -> list[str]:
        return sorted(path.name for path in (self / f"data/{dataset}/prepared").iterdir())


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    """With a devkit of five images, and COCO's tree of six."""
    made = Checkout(tmp_path / "checkout")
    make_voc(made / "data/voc")
    make_coco(made / "data/coco")
    made.params()
    return made


# --- what is written -----------------------------------------------------------------------------


def test_a_devkit_becomes_manifest_and_boxes(checkout: Checkout) -> None:
    said = checkout.prepare()
    assert said == "data/voc/prepared: 3 train (1 unlabelled), 2 test, 20 labels\n"
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


def test_lists_give_no_boxes(checkout: Checkout) -> None:
    checkout.prepare()
    checkout.params(voc={"labels": "lists"})
    assert "unchanged" not in checkout.prepare()
    assert checkout.prepared() == ["manifest.parquet"]
    assert "unchanged" in checkout.prepare()


def test_unlabelled_images_are_left_out_where_wanted(checkout: Checkout) -> None:
    checkout.params(coco={"drop_unlabelled": True})
    said = checkout.prepare("coco")
    assert said == (
        "data/coco/prepared: 3 train (1 unlabelled and left out), "
        "1 test (1 unlabelled and left out), 3 labels\n"
    )
    manifest = checkout.manifest("coco")
    assert manifest.image_ids("train") == ["30", "9", "400"]
    assert manifest.counts["test"] == {"listed": 2, "missing": 0, "unlabelled": 1, "images": 1}


@pytest.mark.parametrize(("name", "train", "test"), [("voc2007", 240, 160), ("coco", 16, 16)])
def test_the_real_samples(shared: Path, tmp_path: Path, name: str, train: int, test: int) -> None:
    checkout = Checkout(tmp_path / "checkout")
    dataset = name[:3] if name == "voc2007" else name
    (checkout / "data").mkdir(parents=True)
    source, root = shared / f"data/{name}-sample", checkout / "data" / dataset
    for path in source.rglob("*"):  # links to files, in folders of its own
        place = root / path.relative_to(source)
        if path.is_dir():
            place.mkdir(parents=True)
        else:
            place.symlink_to(path)
    checkout.params()
    said = checkout.prepare(dataset)
    assert f"{train} train" in said
    assert f"{test} test" in said
    manifest = checkout.manifest(dataset)
    for row in manifest.table.to_pylist():
        with Image.open(root / row["path"]) as image:
            assert image.size == (row["width"], row["height"])
    code, lines = checkout.check(dataset)
    assert code == 0
    assert lines[-1] == "Every image is there and can be read."
    before = checkout.everything()
    assert "unchanged" in checkout.prepare(dataset)
    assert checkout.everything() == before


# --- missing images ------------------------------------------------------------------------------


def test_missing_images_are_an_error_unless_they_are_left_out(checkout: Checkout) -> None:
    for image_id in ("000012", "000001", "000005"):
        (checkout / f"{IMAGES}/{image_id}.jpg").unlink()
    checkout.refused(
        r"3 of 5 images that voc lists are missing; the first is '000001'\. Put it at data/voc/"
        r"VOCdevkit/VOC2007/JPEGImages/000001\.jpg and the others likewise, or set "
        r"`prepare\.voc\.drop_missing: true`.* listed in missing\.csv"
    )
    assert not (checkout / "data/voc/prepared").exists()
    checkout.params(voc={"drop_missing": True})
    said = checkout.prepare()
    assert (
        said
        == "data/voc/prepared: 1 train (2 missing, 1 unlabelled), 1 test (1 missing), 20 labels\n"
    )
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


def test_a_missing_and_unlabelled_image_counts_as_missing(checkout: Checkout) -> None:
    (checkout / f"{IMAGES}/2008_000003.jpg").unlink()
    checkout.params(voc={"drop_missing": True, "drop_unlabelled": True})
    checkout.prepare()
    assert checkout.manifest().counts["train"] == {
        "listed": 3,
        "missing": 1,
        "unlabelled": 0,
        "images": 2,
    }


def test_a_split_without_any_image_left_is_an_error(checkout: Checkout) -> None:
    for image_id in VOC_TEST:
        (checkout / f"{IMAGES}/{image_id}.jpg").unlink()
    checkout.params(voc={"drop_missing": True})
    checkout.refused(
        r"voc: of 2 listed images of the split 'test' none is left; 2 are missing below data/voc "
        r"and 0 have no label\. Put the images there, or change `prepare\.voc`"
    )


def make_pets(root: Path, listed: Sequence[str], there: Sequence[str], **changes: Any) -> str:
    """The error of a table that lists images of which others are there."""
    for path in there:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    source = TableSettings.model_validate({"source": "table", **changes})
    rows = [{"image_id": name, "path": str(Path(source.images) / name)} for name in listed]
    with pytest.raises(GmpipeError) as caught:
        make_manifest(make_listing(rows), "pets", root, source)
    return str(caught.value)


@pytest.mark.parametrize(
    ("listed", "there", "changes", "clue"),
    [
        (
            ["a.jpg", "b.jpg"],
            ["photos/a.jpg"],
            {},
            "photos/a.jpg: set `prepare.pets.images: photos`",
        ),
        (["x/a.jpg", "b.jpg"], ["c/d/x/a.jpg"], {}, "c/d/x/a.jpg: set `prepare.pets.images: c/d`"),
        (["a.jpg", "b.jpg"], ["a.jpg"], {"images": "x"}, "a.jpg: set `prepare.pets.images: .`"),
        (["a.jpg", "b.jpg"], ["y/a.jpg"], {"images": "x"}, "y/a.jpg: set `prepare.pets.images: y`"),
        (["a.jpg", "b.jpg"], ["p/B.JPG"], {}, "p/B.JPG: set `prepare.pets.images: p`"),
        (
            ["a.jpg", "x/b.jpg"],
            ["a.jpg", "x/b.JPG"],
            {},
            "x/b.JPG, listed as 'x/b.jpg': correct upper and lower case in the list, or in the",
        ),
        (["a.jpg", "x/b.jpg"], ["X/b.jpg"], {}, "X/b.jpg, listed as 'x/b.jpg': correct upper and"),
        (
            ["a.jpg", "x/b.jpg"],
            ["y/b.jpg"],
            {},
            "y/b.jpg: correct the path in the list, or move the file",
        ),
        (["ba.jpg", "b.jpg"], ["y/a.jpg", "c.jpg"], {}, None),
    ],
)
@pytest.mark.parametrize("drop", [False, True])
def test_a_missing_image_is_looked_for_elsewhere(
    tmp_path: Path,
    listed: list[str],
    there: list[str],
    changes: dict[str, str],
    clue: str | None,
    drop: bool,
) -> None:
    root = tmp_path / "pets"
    root.mkdir()
    message = make_pets(root, listed, there, drop_missing=drop, **changes)
    if clue is None:
        assert "There is" not in message
    else:
        assert f" There is {root}/{clue}" in message
    assert ("drop_missing: true" in message) == (not drop and not changes and there[0] == listed[0])


def test_a_linked_folder_is_looked_through_and_no_circle_is_endless(tmp_path: Path) -> None:
    root = tmp_path / "pets"
    (tmp_path / "far").mkdir()
    (tmp_path / "far/b.jpg").touch()
    root.mkdir()
    (root / "again").symlink_to(root)
    (root / "photos").symlink_to(tmp_path / "far")
    message = make_pets(root, ["a.jpg", "b.jpg"], [])
    assert f"There is {root}/photos/b.jpg: set `prepare.pets.images: photos`." in message
    with mock.patch("pipeline.datasets.listing._MOST_LOOKED_AT", 0):
        assert "There is" not in make_pets(root, ["a.jpg", "b.jpg"], [])


def test_a_folder_in_an_image_s_place_is_no_image(checkout: Checkout) -> None:
    path = checkout / f"{IMAGES}/000001.jpg"
    path.unlink()
    path.mkdir()
    checkout.refused("1 of 5 images that voc lists are missing; the first is '000001'")
    path.rmdir()
    path.symlink_to("nowhere.jpg")
    checkout.refused("1 of 5 images that voc lists are missing")


def test_an_image_folder_that_is_not_there(checkout: Checkout) -> None:
    shutil.rmtree(checkout / IMAGES)
    checkout.refused(
        r"5 of 5 images that voc lists are missing; .* and the others likewise\.$"  # no dropping
    )
    (checkout / IMAGES).write_text("a file")
    checkout.refused("5 of 5 images that voc lists are missing")


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
def test_only_a_change_is_written(checkout: Checkout, change: Callable[[Checkout], object]) -> None:
    checkout.params(voc={"drop_missing": True})
    (checkout / f"{IMAGES}/000001.jpg").unlink()
    first = checkout.prepare()
    before = checkout.everything()
    counts = first.removeprefix("data/voc/prepared: ").strip()
    assert checkout.prepare() == f"data/voc/prepared ({counts}): unchanged\n"
    assert checkout.everything() == before
    change(checkout)
    folder = checkout / "data/voc/prepared"
    inode = folder.stat().st_ino
    assert "unchanged" not in checkout.prepare()
    assert folder.stat().st_ino != inode
    assert "unchanged" in checkout.prepare()


def test_the_unchanged_are_not_read_again(checkout: Checkout) -> None:
    checkout.prepare()
    with mock.patch.dict("stages.prepare._READERS", clear=True):
        assert "unchanged" in checkout.prepare()


def test_what_fails_leaves_the_last_one_alone(checkout: Checkout) -> None:
    checkout.prepare()
    before = checkout.everything()
    path = checkout / "data/voc/VOCdevkit/VOC2007/Annotations/000004.xml"
    content = path.read_bytes()
    path.write_text("<annotation>")
    checkout.refused(r"000004\.xml is no VOC annotation")
    assert checkout.everything().keys() == before.keys()
    path.write_bytes(content)
    assert "unchanged" in checkout.prepare()


def test_a_manifest_of_another_name_is_written_anew(checkout: Checkout) -> None:
    checkout.prepare()
    shutil.move(checkout / "data/voc", checkout / "data/brought")
    checkout.params(brought={"source": "voc"})
    assert "unchanged" not in checkout.prepare("brought")
    assert checkout.manifest("brought").dataset == "brought"


def test_scenes_are_counted_and_checked_too(checkout: Checkout) -> None:
    checkout.refused("there is no manifest at .*gmpipe prepare", "demo", "--check")
    assert checkout.prepare("demo") == "data/demo/prepared: 10 train, 2 test, 18 labels\n"
    before = checkout.everything()
    assert "unchanged" in checkout.prepare("demo")
    assert checkout.everything() == before
    assert checkout.check("demo")[0] == 0
    (checkout / "data/demo/prepared/images/train-00002.png").unlink()
    code, lines = checkout.check("demo")
    assert code == 1
    assert lines[-1] == (
        "To do: delete data/demo/prepared and run `gmpipe prepare --dataset demo`."
    )
    assert "unchanged" not in checkout.prepare("demo")


# --- imported manifests --------------------------------------------------------------------------


def test_an_imported_data_set_brings_its_manifest(checkout: Checkout) -> None:
    remedy = r"Run `gmpipe import-regions FILE --dataset brought` to write it\."
    message = rf"there is no manifest at data/brought/prepared/manifest\.parquet: .*{remedy}"
    checkout.refused(message, "brought")
    checkout.refused(message, "brought", "--check")
    checkout.prepare()
    voc = checkout.manifest()
    path = checkout / "data/brought/prepared/manifest.parquet"
    counts = full_counts(voc.table)
    write_manifest(path, Manifest("brought", "own", voc.vocabulary, {}, counts, voc.table))
    before = checkout.everything()
    assert checkout.prepare("brought") == (
        "data/brought/prepared: imported, 3 train (1 unlabelled), 2 test, 20 labels\n"
    )
    assert checkout.everything() == before
    code, out, err = checkout.run("--dataset", "brought", "--check")
    assert (code, err) == (0, "")
    assert out.splitlines()[:2] == [
        "brought: 3 train (1 unlabelled), 2 test, 20 labels; its regions are imported, and no "
        "photograph is needed",
        "label          train    test",
    ]
    path.write_bytes(path.read_bytes()[:-9])
    checkout.refused(rf"manifest\.parquet is not a whole Parquet file .*{remedy}", "brought")


# --- the check -----------------------------------------------------------------------------------


def test_a_check_of_sound_images(checkout: Checkout) -> None:
    code, lines = checkout.check()
    assert code == 0
    assert lines[:8] == [
        "voc: 5 images are listed",
        "missing: 0",
        "unreadable: 0",
        "duplicates, with an image in train and one in test: 0",
        "duplicates within a split: 0",
        "unlabelled: 1",
        "  2008_000003 (train), VOCdevkit/VOC2007/JPEGImages/2008_000003.jpg",
        "label          train    test",
    ]
    assert lines[-1] == "Every image is there and can be read."


@pytest.mark.parametrize("drop", [False, True])
def test_a_check_of_broken_images(checkout: Checkout, drop: bool) -> None:
    checkout.params(voc={"drop_missing": drop})
    train = {f"{number:06d}": [VocObject("cat")] for number in range(1, 11)}
    shutil.rmtree(checkout / "data/voc")
    make_voc(checkout / "data/voc", train, {"000020": [], "000021": [VocObject("dog")]})
    images = checkout / IMAGES
    (images / "000001.jpg").unlink()
    whole = (images / "000002.jpg").read_bytes()
    (images / "000002.jpg").write_bytes(whole[:-20])
    (images / "000003.jpg").write_text("a photograph, believe me\n")
    (images / "000004.jpg").write_bytes(b"")
    (images / "000005.jpg").write_bytes(whole[:100])
    shutil.copy(images / "000006.jpg", images / "000020.jpg")
    shutil.copy(images / "000007.jpg", images / "000008.jpg")
    code, lines = checkout.check()
    assert code == 1
    folder = "VOCdevkit/VOC2007/JPEGImages"
    text = "\n".join(lines)
    assert lines[:4] == [
        "voc: 12 images are listed",
        "missing: 1",
        f"  000001 (train), {folder}/000001.jpg",
        "unreadable: 4",
    ]
    assert re.search(rf"^  000002 \(train\), {folder}/000002\.jpg: image file is trunc", text, re.M)
    assert f"  000003 (train), {folder}/000003.jpg: the file is of no image format" in text
    assert f"  000004 (train), {folder}/000004.jpg: the file is empty" in text
    assert re.search(rf"^  000005 \(train\), {folder}/000005\.jpg: .", text, re.M)
    assert (
        "duplicates, with an image in train and one in test: 2\n"
        f"  000006 (train), {folder}/000006.jpg = 000020 (test), {folder}/000020.jpg\n"
        "duplicates within a split: 2\n"
        f"  000007 (train), {folder}/000007.jpg = 000008 (train), {folder}/000008.jpg\n"
        "unlabelled: 1\n"
        f"  000020 (test), {folder}/000020.jpg\n"
    ) in text
    assert lines[-1] == (
        "To do: put the missing images below data/voc, or leave them out: "
        "`prepare.voc.drop_missing: true` in params.yaml; mend the unreadable images, "
        "or go on without them: `extract.voc.max_failures: 4` in params.yaml."
    )


def test_one_unreadable_image_fails_a_check(checkout: Checkout) -> None:
    (checkout / f"{IMAGES}/000004.jpg").write_text("no photograph")
    code, lines = checkout.check()
    assert code == 1
    assert lines[1:3] == ["missing: 0", "unreadable: 1"]
    assert lines[-1] == (
        "To do: mend the unreadable images, or go on without them: "
        "`extract.voc.max_failures: 1` in params.yaml."
    )


def test_a_check_names_the_first_few(checkout: Checkout) -> None:
    train = {f"{number:06d}": [VocObject("cat")] for number in range(1, 10)}
    shutil.rmtree(checkout / "data/voc")
    make_voc(checkout / "data/voc", train, {"000020": [], "000021": []})
    content = (checkout / f"{IMAGES}/000001.jpg").read_bytes()
    for image_id in train:
        (checkout / f"{IMAGES}/{image_id}.jpg").write_bytes(content)
    _, lines = checkout.check()
    [group] = [line for line in lines if " = " in line]
    assert "duplicates within a split: 9" in lines
    assert group.count(" = ") == 5
    assert group.endswith(" = 4 more")
    shutil.rmtree(checkout / IMAGES)
    code, lines = checkout.check()
    assert code == 1
    assert lines[1] == "missing: 11"
    assert lines[6].startswith("  000005 (train)")
    assert lines[7] == "  and 6 more"
    assert lines[-1] == "To do: put the missing images below data/voc."


def make_check(root: Path, contents: dict[str, bytes]) -> Any:
    """A check of files with these contents: of all but the last in train."""
    rows = [
        {
            "image_id": name,
            "path": f"i/{name}",
            "split": "train" if place < len(contents) - 1 else "test",
            "labels": [0],
            "ignored": [],
        }
        for place, name in enumerate(contents)
    ]
    (root / "i").mkdir(parents=True)
    for name, content in contents.items():
        (root / "i" / name).write_bytes(content)
    table = pa.Table.from_pylist(rows, schema=COLUMNS)
    manifest = Manifest("pets", "own", ("cat",), {}, full_counts(table), table)
    seen: list[int] = []
    found = check_files(manifest, root, seen.append)
    assert sum(seen) == found.images == len(contents)
    return found


def encode(kind: str, seed: int = 0, side: int = 90, **options: Any) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, kind, **options)
    return stream.getvalue()


def test_files_that_only_look_alike_are_no_duplicates(tmp_path: Path) -> None:
    """Of one size, or of one size with the same ends, but another middle."""
    image = encode("BMP")
    assert len(image) > 3 * 4096
    middle = bytearray(image)
    middle[len(image) // 2] ^= 1
    other = bytearray(image)
    other[-1] ^= 1
    contents = {"a": image, "b": bytes(middle), "c": bytes(other), "d": image, "e": bytes(middle)}
    found = make_check(tmp_path, contents)
    groups = [[image.image_id for image in group] for group in found.duplicates]
    assert sorted(groups) == [["a", "d"], ["b", "e"]]
    assert {image.split for image in found.duplicates[1]} == {"train", "test"}


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_what_is_behind_an_image_does_no_harm(tmp_path: Path, kind: str) -> None:
    whole = encode(kind)
    contents = {
        "whole": whole,
        "more": whole + b"\0" * 10_000,
        "cut": whole[: len(whole) // 2],
        "cut-at-the-end": whole[:-100],
        "last": encode(kind, 1),
    }
    found = make_check(tmp_path, contents)
    assert [image.image_id for image, _ in found.unreadable] == ["cut", "cut-at-the-end"]


def test_a_thumbnail_s_end_is_not_the_image_s(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = "\xff\xd9".encode("latin-1") * 30
    whole = encode("JPEG", exif=exif)
    assert whole.count(b"\xff\xd9") > 30
    found = make_check(tmp_path, {"cut": whole[:-3000], "whole": whole})
    assert [image.image_id for image, _ in found.unreadable] == ["cut"]


def test_huge_images_are_told_from_bombs(tmp_path: Path) -> None:
    def header(side: int) -> bytes:
        content = bytearray(encode("BMP", side=4))
        content[18:26] = side.to_bytes(4, "little") * 2
        return bytes(content)

    found = make_check(tmp_path, {"large": header(11_000), "bomb": header(40_000)})
    [(image, reason)] = found.unreadable
    assert image.image_id == "bomb"
    assert re.search("DecompressionBombError: .*1600000000 pixels", reason)


def test_a_check_says_where_missing_images_lie(tmp_path: Path) -> None:
    made = Checkout(tmp_path)
    draw_image(made / "data/coco/photos/a.jpg")
    table = made / "data/coco/labels.csv"
    table.write_text("image,labels,split\na.jpg,cat,train\nb.jpg,cat,test\n")
    made.params(coco={"source": "table"})
    code, lines = made.check("coco")
    assert code == 1
    assert "  a.jpg (train)" in lines
    assert lines[-1] == (
        "To do: put the missing images below data/coco; there is data/coco/photos/a.jpg: set "
        "`prepare.coco.images: photos`."
    )


# --- labels --------------------------------------------------------------------------------------


def said_of(folder: Path, rows: Sequence[str], *options: str, **source: Any) -> list[str]:
    """What a run prints of a table `image,labels,split` of images that are all there."""
    made = Checkout(folder)
    root = made / "data/coco"
    root.mkdir(parents=True)
    for row in rows:
        draw_image(root / row.partition(",")[0])
    (root / "labels.csv").write_text("\n".join(["image,labels,split", *rows]))
    made.params(coco={"source": "table", **source})
    code, out, err = made.run("--dataset", "coco", *options)
    assert code == 0, err
    return out.splitlines()


PETS = ["a.jpg,cat;dog,train", "b.jpg,cat;Dog,train", "c.jpg,cat;sofa,test", "d.jpg,dog,train"]


def test_labels_are_counted_and_what_is_odd_is_noted(tmp_path: Path) -> None:
    expected = [
        "label      train    test",
        "Dog            1       0",
        "cat            2       1",
        "dog            2       0",
        "sofa           0       1",
        "note: labels without an image in test, so not scored: Dog, dog",
        "note: labels with fewer than 2 images in train, so hardly learned: Dog, sofa",
        "note: labels that may be one, spelled in two ways: 'Dog' and 'dog'",
    ]
    first, *rest = said_of(tmp_path / "a", PETS)
    assert first == "data/coco/prepared: 3 train, 1 test, 4 labels"
    assert rest == expected
    with contextlib.chdir(tmp_path / "a"):
        code, out, _ = Checkout(tmp_path / "a").run("--dataset", "coco")
    assert (code, out.splitlines()[1:]) == (0, expected)
    lines = said_of(tmp_path / "b", PETS, "--check")
    assert lines[-9:] == [*expected, "Every image is there and can be read."]
    assert "  a.jpg (train) = b.jpg (train)" in "\n".join(lines)  # a path that is the id: once
    assert said_of(tmp_path / "c", PETS, "--quiet") == []


def test_sound_labels_leave_no_note(tmp_path: Path) -> None:
    rows = [f"{place}.jpg,cat;dog,{'train' if place else 'test'}" for place in range(3)]
    assert said_of(tmp_path, rows)[1:] == [
        "label      train    test",
        "cat            2       1",
        "dog            2       1",
    ]


def test_of_many_labels_the_rarest_are_shown(tmp_path: Path) -> None:
    names = [f"{place:03d}" for place in range(81)]
    rows = [
        f"{image}.jpg,{';'.join(names[: 81 - image])},{'test' if image == 1 else 'train'}"
        for image in range(12)
    ]
    lines = said_of(tmp_path, rows)
    assert lines[1:4] == [
        "label      train    test",
        "080            1       0",
        "079            1       1",
    ]
    assert lines[11:] == [
        "071            9       1",
        "and 71 labels more, each of 11 images at least",
        "note: labels without an image in test, so not scored: 080",
        "note: labels with fewer than 2 images in train, so hardly learned: 079, 080",
    ]


@pytest.mark.parametrize(("mark", "cell"), [("|", "cat|dog"), ("/", "a / b"), (",", '"x, y"')])
def test_a_wrong_separator_is_guessed(tmp_path: Path, mark: str, cell: str) -> None:
    rows = [f"a.jpg,{cell},train", f"b.jpg,{cell},train", f"c.jpg,{cell},test", "d.jpg,z,test"]
    note = (
        f"note: 1 of 1 labels contain '{mark}'. Is that what separates labels? Then set "
        f'`prepare.coco.separator: "{mark}"`.'
    )
    assert said_of(tmp_path / "a", rows[:3])[-1] == note
    assert not any("separat" in line for line in said_of(tmp_path / "b", rows))  # one of two
    assert not any("separat" in line for line in said_of(tmp_path / "c", rows, separator=mark))


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ("dining table", "Dining_Table", True),
        ("t-shirt", "tshirt", True),
        ("dog", "dogs", True),
        ("person", "preson", True),
        ("person", "persan", True),
        ("person", "pesron", True),
        ("person", "erson", True),
        ("cat", "car", False),
        ("boat", "coat", False),
        ("ox", "fox", False),
        ("grade 11", "grade 12", False),
        ("room", "room 2", False),
        ("abcde", "bcdea", False),
        ("person", "prosen", False),
        ("window", "winners", False),
    ],
)
def test_similar_labels(one: str, other: str, alike: bool) -> None:
    for pair in ((one, other), (other, one)):
        assert similar_labels(pair) == ([pair] if alike else [])


def test_thousands_of_labels_are_compared() -> None:
    names = [
        f"{place:05d}".translate(str.maketrans("0123456789", "abcdefghij")) * 3
        for place in range(1 << 13)
    ]
    assert similar_labels([*names, "aaaaaaaaaaaaaaax"]) == [(names[0], "aaaaaaaaaaaaaaax")]


# --- what data sets share ------------------------------------------------------------------------


def make_listing(rows: Sequence[dict[str, Any]]) -> Listing:
    filled = [
        {"split": ("train", "test")[place % 2], "labels": [0], "ignored": [], **row}
        for place, row in enumerate(rows)
    ]
    return Listing(("cat",), "own", {}, pa.Table.from_pylist(filled, schema=COLUMNS))


@pytest.mark.parametrize("path", ["../x.jpg", "/etc/passwd", "a/../../x.jpg", "a\\x.jpg"])
@pytest.mark.parametrize("drop", [False, True])
def test_a_path_that_leaves_the_root_is_refused_before_it_is_looked_at(
    tmp_path: Path, path: str, drop: bool
) -> None:
    source = TableSettings(source="table", drop_missing=drop)
    listing = make_listing([{"image_id": "a", "path": "a.jpg"}, {"image_id": "b", "path": path}])
    with (
        mock.patch("os.scandir", side_effect=AssertionError),
        pytest.raises(GmpipeError, match=r"row 1 \('b'\): the path .* leaves the data set's root"),
    ):
        make_manifest(listing, "pets", tmp_path, source)


def test_a_row_that_would_be_left_out_is_checked_too(tmp_path: Path) -> None:
    source = TableSettings(source="table", drop_missing=True)
    rows = [{"image_id": name, "path": f"{name}.jpg"} for name in ("a", "b", "c", "a")]
    for name in "ab":
        draw_image(tmp_path / f"{name}.jpg")
    with pytest.raises(GmpipeError, match=r"row 3 \('a'\): the image id stands in row 0 already"):
        make_manifest(make_listing(rows), "pets", tmp_path, source)
    manifest, missing = make_manifest(make_listing(rows[:3]), "pets", tmp_path, source)
    assert missing.column("image_id").to_pylist() == ["c"]
    assert is_current(manifest, ["c.jpg"], tmp_path, source)
    assert not is_current(manifest, [], tmp_path, source)
    assert not is_current(manifest, ["c.jpg"], tmp_path, TableSettings(source="table"))


names = st.sampled_from(["a.jpg", "b.jpg", "c", "ü ß.png", "漢.jpg"])
paths = st.builds("/".join, st.tuples(st.sampled_from(["x", "x/y", "z", "."]), names)) | names


@given(present=st.sets(paths), asked=st.lists(paths))
@settings(max_examples=40, deadline=None)
def test_files_are_found_as_the_file_system_says(
    tmp_path_factory: pytest.TempPathFactory, present: set[str], asked: list[str]
) -> None:
    root = tmp_path_factory.mktemp("files")
    for path in present:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    asked += ["x", "x/y", "none/a.jpg", "x/a\0b", "x\0/a"]
    expected = ["\0" not in path and (root / path).is_file() for path in asked]
    assert find_files(root, asked).tolist() == expected


def test_every_folder_is_listed_once(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with mock.patch("os.scandir", wraps=os.scandir) as listed:
        find_files(tmp_path, ["x/a", "x/b", "c", "x/d", "gone/e", "gone/f"])
    assert listed.call_count == 3


def test_a_folder_that_can_t_be_listed_is_named(tmp_path: Path) -> None:
    with (
        mock.patch("os.scandir", side_effect=PermissionError(13, "Permission denied")),
        pytest.raises(GmpipeError, match=r"the folder .*x can't be listed \(Permission denied\)"),
    ):
        find_files(tmp_path, ["x/a"])


def test_a_folder_s_hash_is_of_names_and_contents(tmp_path: Path) -> None:
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


def test_lines_keep_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(b"\r\n a b \r\n\n\tc")
    assert read_lines(path, "") == [(2, "a b"), (4, "c")]
    path.write_bytes(b"a\nb\nc\xff\n")
    with pytest.raises(GmpipeError, match=r"list\.txt, line 3: not UTF-8 text\. Do that\.$"):
        read_lines(path, "Do that.")


def test_unit_boxes_against_plain_arithmetic() -> None:
    pixels = np.array([[5, 5, 10, 10], [-4, 2, 3, 40], [20, 0, 30, 5], [3, 4, 3, 5], [9, 1, 2, 8]])
    sizes = np.array([SIZE] * 5)
    boxes, sound = unit_boxes(pixels.astype(float), sizes)
    assert boxes.dtype == np.float32
    assert sound.tolist() == [True, True, False, False, False]
    np.testing.assert_allclose(boxes[:2], [[0.25, 0.5, 0.5, 1], [0, 0.2, 0.15, 1]], rtol=1e-6)
    for box, fine in zip(boxes, sound, strict=True):
        assert ((box >= 0) & (box <= 1)).all()
        assert fine == (box[0] < box[2] and box[1] < box[3])
