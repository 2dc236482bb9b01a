"""Regions made elsewhere: both forms of files, what is wrong with them, and the whole import.

The files are tiny and written by the tests themselves, with `numpy.savez` and `csv`; what was
stored is compared with an independent reading of them.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shutil
import sys
import tracemalloc
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flows import Flow, Outcome
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from pipeline import files as files_module
from pipeline.datasets.manifest import (
    COLUMNS,
    Manifest,
    full_counts,
    read_manifest,
    write_manifest,
)
from pipeline.errors import GmpipeError, MismatchError
from pipeline.files import sha256_file
from pipeline.regions.detector import read_description
from pipeline.settings import Params
from pipeline.shards.failures import read_failures
from pipeline.shards.imports import BottomUpFiles, ImageRegions, NpzFile, region_rows
from pipeline.shards.reader import RegionCache, read_header
from pipeline.shards.schema import RegionRows

Arrays = dict[str, Any]
Line = dict[str, Any]

LABELS = ("cat", "dog", "sun")
COLUMNS_OF_TSV = (
    "image_id",
    "height",
    "width",
    "objects",
    "objects_conf",
    "attributes",
    "attributes_conf",
    "count",
    "boxes",
    "features",
)


# Files -------------------------------------------------------------------------------------------


def make_arrays(images: int = 9, places: int = 4, size: int = 6, seed: int = 0) -> Arrays:
    """Arrays of a sound npz: ids `000100` and on, counts 1, 2, ... in turn, every third a test."""
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.random((images, places, 2, 2)), axis=2).reshape(images, places, 4)
    return {
        "image_id": np.array([f"{100 + image:06d}" for image in range(images)]),
        "features": rng.normal(size=(images, places, size)).astype(np.float16),
        "boxes": corners.astype(np.float32),
        "scores": rng.random((images, places)).astype(np.float32),
        "classes": rng.integers(0, 80, (images, places)).astype(np.int16),
        "count": (np.arange(images) % places + 1).astype(np.int16),
        "size_wh": rng.integers(100, 600, (images, 2)).astype(np.int32),
        "split": np.where(np.arange(images) % 3 == 2, "test", "train"),
        "labels": rng.integers(-1, 2, (images, len(LABELS))).astype(np.int8),
        "label_names": np.array(LABELS),
    }


def write_npz(folder: Path, **changes: Any) -> Path:
    """A sound npz but for the changes; None leaves an array out."""
    folder.mkdir(exist_ok=True)
    path = folder / "made.npz"
    arrays = {**make_arrays(), **changes}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def encoded(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def make_lines(images: int = 9, size: int = 6, seed: int = 0) -> list[Line]:
    """Columns of sound lines, by name; `n` is no column, but the number of regions.

    The ids end in 100 and on; images are 200 x 100, counts 1, 2, 3, 4 in turn.
    """
    rng = np.random.default_rng(seed)
    lines: list[Line] = []
    for image in range(images):
        n = image % 4 + 1
        corners = np.sort(rng.random((n, 2, 2)), axis=1).reshape(n, 4) * [199, 99, 199, 99]
        lines.append(
            {
                "image_id": f"COCO_train2014_{100 + image:012d}",
                "height": 100,
                "width": 200,
                "objects": rng.integers(0, 1600, n),
                "objects_conf": rng.random(n).astype(np.float32),
                "attributes": rng.integers(0, 400, n),
                "attributes_conf": rng.random(n).astype(np.float32),
                "count": n,
                "boxes": corners.astype(np.float32),
                "features": rng.normal(size=(n, size)).astype(np.float32),
            }
        )
    return lines


def write_tsv(path: Path, lines: Sequence[Line], end: str = "\n") -> Path:
    """As the published scripts write it: csv's writer, base64."""
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS_OF_TSV, delimiter="\t", lineterminator=end)
        for line in lines:
            writer.writerow(
                {k: encoded(v) if isinstance(v, np.ndarray) else v for k, v in line.items()}
            )
    return path


def changed_line(place: int, **changes: Any) -> list[Line]:
    lines = make_lines()
    lines[place] |= changes
    return lines


# What is stored of an image ----------------------------------------------------------------------


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=6), st.integers(1, 7))
def test_the_best_regions_are_stored_in_descending_order(scores: list[float], regions: int) -> None:
    """Scores tie; every other number of a region tells its place in the file."""
    n = len(scores)
    features = np.arange(n * 3).reshape(n, 3) / 4
    boxes = np.arange(n)[:, None] / 16 + np.array([0, 0.25, 0.5, 0.5])
    image = ImageRegions("here", features, boxes, np.array(scores), np.arange(n) * 100)
    rows = region_rows([image], ["a"], regions=regions, feature_size=3, feature_dtype="float16")
    rows.check()
    best = sorted(range(n), key=lambda region: -scores[region])[:regions]  # stable
    assert (rows.image_id.tolist(), rows.count.tolist()) == ([b"a"], [len(best)])
    columns = (rows.scores[0], rows.features[0], rows.boxes[0], rows.classes[0])
    found = list(zip(*(column.tolist() for column in columns), strict=True))
    assert found[: len(best)] == [
        (scores[r], features[r].tolist(), boxes[r].tolist(), r * 100 + 1) for r in best
    ]


def test_regions_of_equal_scores_stay_in_the_order_of_the_file() -> None:
    """Enough of them that numpy's default order would not."""
    n = 100
    image = ImageRegions(
        "here",
        np.arange(n, dtype=np.float32)[:, None],
        np.zeros((n, 4)),
        np.arange(n) % 2,
        np.zeros(n, np.int64),
    )
    rows = region_rows([image], ["a"], regions=n, feature_size=1, feature_dtype="float16")
    assert rows.features.ravel().tolist() == [*range(1, n, 2), *range(0, n, 2)]


def one_region(**changes: Any) -> ImageRegions:
    """An image of two regions, the better one last."""
    sound = {
        "features": np.array([[1, 2], [3, 4]], np.float32),
        "boxes": np.array([[0, 0, 1, 1], [0, 0.5, 0.5, 1]], np.float32),
        "scores": np.array([0.25, 0.5], np.float32),
        "classes": np.array([0, 7], np.int64),
    }
    return ImageRegions("line 1", **{**sound, **changes})


def stored(image: ImageRegions, feature_dtype: str = "float16") -> RegionRows:
    return region_rows([image], ["a"], regions=2, feature_size=2, feature_dtype=feature_dtype)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": np.array([[1, 2], [3, np.nan]])}, r"features\[1\]\[1\] is nan; .*finite"),
        ({"scores": np.array([np.inf, 0])}, r"scores\[0\] is inf; .*finite"),
        ({"scores": np.array([0, 1e300])}, r"scores\[1\] is 1e\+300; .*finite"),
        ({"boxes": np.array([[0, 0, 1, 1], [0, np.nan, 1, 1]])}, r"boxes\[1\]\[1\] is nan"),
        ({"boxes": np.array([[0, 0, 1, 1], [0, 0, 1.5, 1]])}, r"boxes\[1\] is .*1\.5.*\[0, 1\]"),
        ({"boxes": np.array([[-0.5, 0, 1, 1], [0, 0, 1, 1]])}, r"boxes\[0\] is .*-0\.5.*\[0, 1\]"),
        ({"boxes": np.array([[0, 0, 1, 1], [0.5, 0, 0.25, 1]])}, r"boxes\[1\].* x0 <= x1"),
        ({"boxes": np.array([[0, 1, 1, 0.5], [0, 0, 1, 1]])}, r"boxes\[0\].* y0 <= y1"),
        (
            {"classes": np.array([-1, 3])},
            r"classes\[0\] is -1; expected a class id from 0 to 32766",
        ),
        ({"classes": np.array([0, 32767])}, r"classes\[1\] is 32767; expected a class id"),
    ],
)
def test_a_region_that_can_not_be_is_named(changes: Any, message: str) -> None:
    with pytest.raises(GmpipeError, match=rf"^line 1: {message}.*import it again\.$"):
        stored(one_region(**changes))


def test_a_feature_too_large_for_the_type_is_told_with_the_one_that_holds_it() -> None:
    image = one_region(features=np.array([[1, 2], [3, 70000]], np.float32))
    with pytest.raises(
        GmpipeError, match=r"^line 1: features\[1\]\[1\] is 70000\.0; .*65504.*dtype` to float32"
    ):
        stored(image)
    assert stored(image, "float32").features.tolist() == [[[3, 70000], [1, 2]]]
    with pytest.raises(GmpipeError, match=r"features\[0\]\[0\] is 1e\+39; .*Scale the features"):
        stored(one_region(features=np.array([[1e39, 2], [3, 4]])), "float32")


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "uint64"])
def test_the_last_class_of_a_narrow_type_has_a_next_one(dtype: str) -> None:
    last = min(np.iinfo(dtype).max, 32766)
    found = stored(one_region(classes=np.array([last, 0], dtype))).classes
    assert found.tolist() == [[1, last + 1]]


# npz ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("places", [1, 4])
def test_an_npz_is_read_as_numpy_reads_it(
    tmp_path: Path, save: Callable[..., None], places: int
) -> None:
    arrays = make_arrays(places=places)
    path = tmp_path / "a.npz"
    save(path, **arrays, something_else=np.zeros(3))
    told: list[tuple[int, int]] = []
    source = NpzFile.open(path, lambda *bytes_read: told.append(bytes_read))
    with np.load(path) as npz:
        assert source.image_ids == npz["image_id"].tolist()
        assert source.counts.tolist() == npz["count"].tolist()
        assert source.sizes.tolist() == npz["size_wh"].tolist()
        assert source.splits == npz["split"].tolist()
        assert source.labels.tolist() == npz["labels"].tolist()
        assert source.label_names == tuple(npz["label_names"].tolist())
        assert source.feature_size == npz["features"].shape[2]
        for wanted in (range(9), [1], range(0, 9, 2), []):
            found = list(source.read(np.array(wanted)))
            for place, image in zip(wanted, found, strict=True):
                n = npz["count"][place]
                assert source.image_ids[place] in image.where
                for name in ("features", "boxes", "scores", "classes"):
                    assert getattr(image, name).tolist() == npz[name][place, :n].tolist()
    assert {total for _, total in told} == {sum(read for read, _ in told)}


@pytest.mark.parametrize(
    "changes",
    [
        {"features": np.float64, "boxes": np.float16, "scores": ">f8"},
        {"classes": np.uint8, "count": np.int64, "size_wh": np.uint16, "labels": np.int64},
        {"image_id": np.bytes_, "split": np.bytes_, "label_names": np.bytes_},
        {"image_id": ">U6", "split": ">U9", "label_names": "S7", "labels": ">i2"},
    ],
)
def test_other_types_of_the_same_kind_say_the_same(tmp_path: Path, changes: Any) -> None:
    arrays = make_arrays()
    arrays["boxes"] = arrays["boxes"].astype(np.float16)  # so that all types hold them
    first = NpzFile.open(write_npz(tmp_path, **arrays))
    before = list(first.read(np.arange(9)))
    other = NpzFile.open(
        write_npz(tmp_path, **arrays | {k: arrays[k].astype(v) for k, v in changes.items()})
    )
    for name in ("image_ids", "splits", "label_names"):
        assert getattr(other, name) == getattr(first, name)
    for name in ("counts", "sizes", "labels"):
        np.testing.assert_array_equal(getattr(other, name), getattr(first, name))
    for a, b in zip(before, other.read(np.arange(9)), strict=True):
        for name in ("features", "boxes", "scores", "classes"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_what_lies_beyond_the_count_is_not_looked_at(tmp_path: Path) -> None:
    arrays = make_arrays()
    arrays["features"][0, 1:] = np.nan
    arrays["classes"][0, 1:] = -1
    source = NpzFile.open(write_npz(tmp_path, **arrays))
    found = region_rows(
        source.read(np.array([0])),
        ["a"],
        regions=4,
        feature_size=source.feature_size,
        feature_dtype="float16",
    )
    found.check()
    assert found.count.tolist() == [1]


def test_labels_are_no_part_of_what_decides_the_regions(tmp_path: Path) -> None:
    first = NpzFile.open(write_npz(tmp_path))
    for name, value in (("labels", -make_arrays()["labels"]), ("size_wh", np.ones((9, 2), int))):
        other = NpzFile.open(write_npz(tmp_path, **{name: value}))
        assert other.sha256 == first.sha256
        assert other.manifest_sources != first.manifest_sources
    for name in ("image_id", "features", "boxes", "scores", "classes", "count"):
        value = make_arrays()[name][::-1]
        assert NpzFile.open(write_npz(tmp_path, **{name: value})).sha256 != first.sha256


def put(name: str, place: Any, value: Any) -> Arrays:
    array = make_arrays()[name]
    array = array.astype(object).astype(f"U{len(str(value))}") if array.dtype.kind == "U" else array
    array[place] = value
    return {name: array}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boxes": None}, r"array `boxes` is missing; there are \['classes', .*expected the arr"),
        ({"features": np.zeros((9, 4, 6), int)}, r"`features`: dtype is int64; expected floats"),
        ({"classes": np.zeros((9, 4))}, r"`classes`: dtype is float64; expected integers"),
        ({"image_id": np.arange(9)}, r"`image_id`: dtype is int64; expected text"),
        ({"image_id": np.array(["a", 1], object)}, r"`image_id`: dtype is object; expected text"),
        ({"features": np.zeros((9, 4))}, r"`features`: shape is \(9, 4\); expected \(N, M, d\)"),
        ({"features": np.zeros((9, 4, 0))}, r"`features`: shape is \(9, 4, 0\); .*none of them 0"),
        ({"boxes": np.zeros((9, 4, 5))}, r"`boxes`: shape is \(9, 4, 5\); .* 4 = 4, as in xyxy"),
        ({"scores": np.zeros((8, 4))}, r"`scores`: shape .* N = 9, as in image_id"),
        ({"classes": np.zeros((9, 5), int)}, r"`classes`: shape .* M = 4, as in features"),
        ({"label_names": np.array(["a", "b"])}, r"`label_names`: shape .* C = 3, as in labels"),
        (
            {"features": np.asfortranarray(make_arrays()["features"])},
            r"`features`: order is the order of Fortran; .*numpy\.ascontiguousarray",
        ),
        (put("image_id", 2, ""), r"row 2 \(''\): image_id is empty"),
        (put("image_id", 2, "000100"), r"row 2 \('000100'\): .* once, and it is row 0 already"),
        (put("split", 3, "valid"), r"row 3 \('000103'\): split is 'valid'; expected train or test"),
        ({"split": np.array(["train"] * 9)}, r"split is nowhere 'test'; expected images of train"),
        (put("count", 4, 5), r"row 4 \('000104'\): count is 5; expected 0 to 4"),
        (put("count", 4, -1), r"row 4 \('000104'\): count is -1; expected 0 to 4"),
        (put("size_wh", (5, 1), 0), r"row 5 \('000105'\): size_wh\[1\] is 0; expected 1 to"),
        (put("labels", (6, 2), 2), r"row 6 \('000106'\): labels\[2\] is 2; expected -1 to 1"),
        (put("labels", (6, 2), -2), r"row 6 \('000106'\): labels\[2\] is -2; expected -1 to 1"),
        ({"image_id": np.array([b"\xff"] * 9)}, r"`image_id`: text is not Unicode"),
        ({"image_id": np.array(["\ud800"] * 9)}, r"`image_id`: text is not Unicode"),
        (
            {"label_names": np.frombuffer(b"\xff\xff\xff\x00" * 3, "<U1")},
            r"`label_names`: text is not Unicode",
        ),
    ],
)
def test_an_npz_that_breaks_its_form_is_told_where(
    tmp_path: Path, changes: Any, message: str
) -> None:
    path = write_npz(tmp_path, **changes)
    with pytest.raises(GmpipeError, match=rf"^{re.escape(str(path))}.*{message}.*\.$"):
        NpzFile.open(path)


def test_a_damaged_npz_is_named_and_never_misread(tmp_path: Path) -> None:
    """Bits flipped and tails cut off: what is still read is what was written."""
    path = write_npz(tmp_path)
    whole = path.read_bytes()
    first = NpzFile.open(path)
    features = [image.features.tolist() for image in first.read(np.arange(9))]
    rng = np.random.default_rng(0)
    errors: list[str] = []
    for attempt in range(120):
        damaged = bytearray(whole)
        if attempt % 2:
            damaged = damaged[: rng.integers(len(whole))]
        else:
            damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            source = NpzFile.open(path)
            assert [image.features.tolist() for image in source.read(np.arange(9))] == features
            assert source.sha256 == first.sha256
            assert source.manifest_sources == first.manifest_sources
        except GmpipeError as error:
            errors.append(str(error))
    assert len(errors) > 90
    assert [text for text in errors if str(path) not in text] == []


def test_what_is_no_npz_is_named(tmp_path: Path) -> None:
    cases: Sequence[tuple[str, bytes, str]] = (
        ("empty.npz", b"", "damaged, or no npz"),
        ("text.npz", b"version https://git-lfs.github.com/spec/v1", "damaged, or no npz"),
    )
    for name, content, message in cases:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(GmpipeError, match=rf"{name} can't be read: {message}"):
            NpzFile.open(tmp_path / name)
    with pytest.raises(GmpipeError, match=r"absent\.npz can't be read \(No such file.*Correct"):
        NpzFile.open(tmp_path / "absent.npz")
    with pytest.raises(GmpipeError, match="is a folder, or no plain file"):
        NpzFile.open(tmp_path)


def test_an_array_larger_than_its_member_is_refused_before_it_is_read(tmp_path: Path) -> None:
    """A header may declare anything; no memory is taken for it."""
    path = write_npz(tmp_path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    huge = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        huge, {"descr": "<U8", "fortran_order": False, "shape": (10**12,)}
    )
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, huge.getvalue() if name == "image_id.npy" else content)
    with pytest.raises(GmpipeError, match=r"`image_id`: size is \d+ bytes; expected 320000000"):
        NpzFile.open(path)


# TSV ---------------------------------------------------------------------------------------------


def read_tsv(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """Independent of the importer, and as the users of these files commonly read them."""
    kinds = {"objects": np.int64, "objects_conf": np.float32}
    kinds |= {"boxes": np.float32, "features": np.float32}
    csv.field_size_limit(sys.maxsize)
    images = {}
    with path.open() as stream:
        for item in csv.DictReader(stream, COLUMNS_OF_TSV, delimiter="\t"):
            n = int(item["count"])
            arrays = {
                name: np.frombuffer(base64.b64decode(item[name]), kind)
                for name, kind in kinds.items()
            }
            arrays["features"] = arrays["features"].reshape(n, -1)
            width, height = int(item["width"]), int(item["height"])
            arrays["boxes"] = arrays["boxes"].reshape(n, 4) / [width, height, width, height]
            images[item["image_id"]] = arrays
    return images


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("cut", [False, True])
def test_a_tsv_is_read_as_others_read_it(tmp_path: Path, end: str, cut: bool) -> None:
    path = write_tsv(tmp_path / "a.tsv", make_lines(), end)
    if cut:  # without the last end of line
        path.write_bytes(path.read_bytes()[: -len(end)])
    source = BottomUpFiles.open([path])
    expected = read_tsv(path)
    assert [line.file_id for line in source.lines] == list(expected)
    assert source.counts.tolist() == [len(image["objects"]) for image in expected.values()]
    assert source.feature_size == 6
    for place in ([0, 1, 2, 3, 4, 5, 6, 7, 8], [3], [0, 8]):
        for line, image in zip(place, source.read(np.array(place)), strict=True):
            wanted = expected[source.lines[line].file_id]
            assert image.features.tolist() == wanted["features"].tolist()
            assert image.scores.tolist() == wanted["objects_conf"].tolist()
            assert image.classes.tolist() == wanted["objects"].tolist()
            np.testing.assert_allclose(image.boxes, wanted["boxes"], rtol=1e-12)


def test_several_tsvs_are_read_as_one(tmp_path: Path) -> None:
    lines = make_lines()
    whole = BottomUpFiles.open([write_tsv(tmp_path / "all.tsv", lines)])
    parts = [write_tsv(tmp_path / f"{n}.tsv", lines[n * 3 : n * 3 + 3]) for n in range(3)]
    told: list[tuple[int, int]] = []
    source = BottomUpFiles.open(parts, lambda *bytes_read: told.append(bytes_read))
    assert source.sha256 == whole.sha256 == sha256_file(tmp_path / "all.tsv")
    assert source.counts.tolist() == whole.counts.tolist()
    assert source.lines[4].where == f"{parts[1]}, line 2 ('COCO_train2014_000000000104')"
    places = np.array([1, 2, 3, 8])
    for a, b in zip(source.read(places), whole.read(places), strict=True):
        assert a.features.tolist() == b.features.tolist()
    assert {total for _, total in told} == {sum(read for read, _ in told)}


def test_boxes_are_clipped_within_a_pixel_and_refused_beyond(tmp_path: Path) -> None:
    boxes = np.array([[-0.5, 0, 200.5, 101]], np.float32)
    path = write_tsv(tmp_path / "a.tsv", changed_line(4, boxes=boxes))
    (image,) = BottomUpFiles.open([path]).read(np.array([4]))
    assert image.boxes.tolist() == [[0, 0, 1, 1]]
    for box in ([0, 0, 202, 100], [0, 0, 200, 102], [-2, 0, 100, 100], [0, -2, 100, 100]):
        lines = changed_line(4, boxes=np.array([box], np.float32))
        source = BottomUpFiles.open([write_tsv(path, lines)])
        with pytest.raises(GmpipeError, match=r"line 5 .*boxes\[0\] is .* image of 200 x 100"):
            list(source.read(np.array([4])))


LINE = r"a\.tsv, line 5 \('COCO_train2014_000000000104'\): "


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 0}, LINE + r"height is b'0'; expected a whole number, 1 or more"),
        ({"width": "1e2"}, LINE + r"width is b'1e2'; expected a whole number"),
        ({"count": -1}, LINE + r"count is b'-1'; expected a whole number, 0 or more"),
        ({"count": 10**12}, LINE + "count is b'10000000000.*expected a whole number"),
        ({"count": 2}, LINE + "object ids is 8 bytes; expected 16 bytes, since the count is 2"),
        ({"objects": np.zeros(1, np.int32)}, LINE + "object ids is 4 bytes; expected 8 bytes"),
        ({"objects_conf": np.zeros(1)}, LINE + "object confidences is 8 bytes; expected 4"),
        ({"boxes": np.zeros((1, 5), np.float32)}, LINE + "boxes is 20 bytes; expected 16"),
        ({"features": np.zeros(7, np.float32)}, LINE + "feature size is 7; expected 6, as in"),
        ({"features": np.zeros(0, np.float32)}, LINE + "features is 0 bytes; expected 1 times 4"),
        ({"features": np.zeros(5, np.int8)}, LINE + "features is 5 bytes; expected 1 times 4"),
        ({"image_id": make_lines()[1]["image_id"]}, r"line 5 .* once, and it is .*a\.tsv, line 2 "),
        ({"features": "\t"}, r"a\.tsv, line 5: number of columns is 11; expected 10, .*id, height"),
    ],
)
def test_a_line_that_breaks_the_form_is_told_before_any_is_used(
    tmp_path: Path, changes: Any, message: str
) -> None:
    path = write_tsv(tmp_path / "a.tsv", changed_line(4, **changes))
    path.write_text(path.read_text().replace('"\t"', "\t"))  # csv quotes a tab
    with pytest.raises(GmpipeError, match=message + r".*import it again\.$"):
        BottomUpFiles.open([path])


def test_base64_that_is_none_is_named(tmp_path: Path) -> None:
    sound = encoded(make_lines()[4]["features"])
    for damaged in ("!" + sound[1:], sound[:4] + "=" + sound[5:], f"{sound[:-4]}é{sound[-2:]}"):
        path = write_tsv(tmp_path / "a.tsv", changed_line(4, features=damaged))
        with pytest.raises(GmpipeError, match=LINE + "features is damaged .*expected base64"):
            list(BottomUpFiles.open([path]).read(np.arange(9)))


def test_a_tsv_cut_off_anywhere_is_told_or_has_fewer_lines(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "a.tsv", make_lines())
    whole = path.read_bytes()
    expected = [image.features.tolist() for image in BottomUpFiles.open([path]).read(np.arange(9))]
    errors: list[str] = []
    for length in np.random.default_rng(0).integers(len(whole), size=100):
        path.write_bytes(whole[:length])
        try:
            source = BottomUpFiles.open([path])
            found = [image.features.tolist() for image in source.read(np.arange(len(source.lines)))]
        except GmpipeError as error:
            errors.append(str(error))
        else:
            assert found == expected[: len(found)]
            assert whole[:length].rstrip(b"\n").count(b"\n") == len(found) - 1
    assert [text for text in errors if "a.tsv" not in text] == []
    assert len(errors) > 90


def test_what_is_no_tsv_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    cases = (
        (b"", "number of regions is 0"),
        (b"\n\r\n\n", "number of regions is 0"),
        (b"\xff\t1\t1\t\t\t\t\t0\t\t\n", r"line 1: id is .*expected UTF-8"),
        (b"\x89PNG\r\n\x1a\n", "line 1: number of columns is 1"),
    )
    for content, message in cases:
        path.write_bytes(content)
        with pytest.raises(GmpipeError, match=message):
            BottomUpFiles.open([path])
    with pytest.raises(GmpipeError, match=r"absent\.tsv can't be read \(No such file.*Correct"):
        BottomUpFiles.open([tmp_path / "absent.tsv"])
    with pytest.raises(GmpipeError, match="is a folder, or no plain file"):
        BottomUpFiles.open([tmp_path])


def test_a_line_without_end_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "a.tsv", make_lines())
    with (
        mock.patch("pipeline.shards.imports._LONGEST_LINE", 300),
        pytest.raises(
            GmpipeError, match=r"line 3: line is 300 bytes or longer; .* Name the TSV of"
        ),
    ):
        BottomUpFiles.open([path])


def sizes_of(manifest_ids: Sequence[str]) -> list[tuple[int | None, int | None]]:
    return [(None, None)] * len(manifest_ids)


@pytest.mark.parametrize(
    ("manifest_ids", "places"),
    [
        (["COCO_train2014_000000000101", "COCO_train2014_000000000100"], [1, 0, -1]),
        (["102", "100"], [1, -1, 0]),
        (["x/000102", "x/000100a", "y"], [-1, -1, 0]),
        (["a100", "b100", "c101"], [-1, 2, -1]),  # two ids end in 100
        (["a100", "COCO_train2014_000000000100"], [1, -1, -1]),  # the same id goes first
        (["1002", "2100", ""], [-1, -1, -1]),
    ],
)
def test_lines_are_matched_by_id_or_else_by_number(
    tmp_path: Path, manifest_ids: list[str], places: list[int]
) -> None:
    source = BottomUpFiles.open([write_tsv(tmp_path / "a.tsv", make_lines(3))])
    assert source.match(manifest_ids, sizes_of(manifest_ids)).tolist() == places


def test_ids_without_a_number_are_matched_as_they_are(tmp_path: Path) -> None:
    lines = make_lines(3)
    for line, name in zip(lines, ("cat", "0", "dog"), strict=True):
        line["image_id"] = name
    source = BottomUpFiles.open([write_tsv(tmp_path / "a.tsv", lines)])
    for ids, places in ((["dog", "x000"], [-1, 1, 0]), (["bird", "x000"], [-1, 1, -1])):
        assert source.match(ids, sizes_of(ids)).tolist() == places


def test_two_lines_of_one_image_are_named(tmp_path: Path) -> None:
    lines = changed_line(2, image_id="000100")
    source = BottomUpFiles.open([write_tsv(tmp_path / "a.tsv", lines)])
    with pytest.raises(
        GmpipeError, match=r"line 3 \('000100'\): this is image '100', as .*line 1 .*Delete one"
    ):
        source.match(["100"], [(200, 100)])


def test_a_number_of_an_image_of_another_size_is_named(tmp_path: Path) -> None:
    source = BottomUpFiles.open([write_tsv(tmp_path / "a.tsv", make_lines())])
    for size in ((200, 100), (None, None), (None, 7)):
        assert source.match(["101"], [size])[1] == 0
    with pytest.raises(
        GmpipeError, match=r"line 2 .*image '101', but its size is 200 x 100; expected 100 x 200"
    ):
        source.match(["101"], [(100, 200)])
    assert source.match(["COCO_train2014_000000000101"], [(100, 200)])[1] == 0


# Memory ------------------------------------------------------------------------------------------


def peak(run: Callable[[], object]) -> int:
    """Bytes that Python and numpy hold at most while ``run`` runs, beyond what they hold before."""
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_files_are_read_as_streams(tmp_path: Path) -> None:
    """Files of 20 MB; a chunk, a line or an image at a time takes 2."""
    lines = make_lines(1, size=40_000) * 100
    for number, line in enumerate(lines):
        lines[number] = {**line, "image_id": str(number)}
    tsv = write_tsv(tmp_path / "a.tsv", lines)
    npz = tmp_path / "a.npz"
    np.savez(npz, **make_arrays(300, places=2, size=16_000))
    for path in (tsv, npz):
        assert path.stat().st_size > 19e6

    def drain(source: NpzFile | BottomUpFiles) -> None:
        for _ in source.read(np.arange(len(source.counts))):
            pass

    bottom_up: list[BottomUpFiles] = []
    assert peak(lambda: bottom_up.append(BottomUpFiles.open([tsv]))) < 4e6
    assert peak(lambda: drain(bottom_up[0])) < 4e6
    arrays: list[NpzFile] = []
    assert peak(lambda: arrays.append(NpzFile.open(npz))) < 4e6
    assert peak(lambda: drain(arrays[0])) < 4e6


# The command -------------------------------------------------------------------------------------

PARAMS: dict[str, Any] = {
    "datasets": ["tiny"],
    "variants": ["full"],
    "seeds": [0],
    "prepare": {"tiny": {"source": "imported"}, "listed": {"source": "table"}},
    "detector": {"tiny": {"source": "imported"}, "listed": {"source": "imported"}},
    "extract": {
        "tiny": {"regions": 3, "rows_per_shard": 2},
        "listed": {"regions": 3, "rows_per_shard": 2},
    },
    "train": {
        name: {"network": {"latent_size": 8, "neighbors": 2}, "epochs": 1, "batch_size": 4}
        for name in ("tiny", "listed")
    },
}


class Checkout(Flow):
    """A folder that gmpipe runs in; arguments may be paths."""

    def gmpipe(self, *arguments: object) -> Outcome:
        return super().gmpipe(*map(str, arguments))

    def ok(self, *arguments: object) -> str:
        return super().ok(*map(str, arguments))

    def refused(self, pattern: str, *arguments: object) -> None:
        """A command must fail with a message that matches, and write nothing."""
        before = self.outputs()
        assert self.gmpipe(*arguments).refused(pattern)
        assert self.outputs() == before

    def outputs(self) -> dict[str, bytes]:
        """What data/ and cache/ hold, but for locks."""
        found = self.bytes("data") | self.bytes("cache")
        return {name: content for name, content in found.items() if not name.endswith(".lock")}

    def cache(self, dataset: str = "tiny") -> RegionCache:
        return RegionCache.open(self / f"cache/{dataset}")


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    folder = tmp_path / "checkout"
    folder.mkdir()
    with (folder / "params.yaml").open("w") as stream:
        YAML().dump(json.loads(json.dumps(PARAMS)), stream)
    return Checkout(folder)


def write_listed(
    checkout: Checkout, image_ids: Sequence[str], sizes: Sequence[tuple[int, int]] | None = None
) -> None:
    """A manifest of `listed`, every third image a test, the labels in turn."""
    rows = [
        {
            "image_id": image_id,
            "path": f"{image_id}.jpg",
            "split": "test" if place % 3 == 2 else "train",
            "labels": [place % 3],
            "ignored": [],
            "width": None if sizes is None else sizes[place][0],
            "height": None if sizes is None else sizes[place][1],
        }
        for place, image_id in enumerate(image_ids)
    ]
    table = pa.Table.from_pylist(rows, schema=COLUMNS)
    manifest = Manifest("listed", "own", LABELS, {}, full_counts(table), table)
    write_manifest(checkout / "data/listed/prepared/manifest.parquet", manifest)


def assert_stored(cache: RegionCache, images: Mapping[str, Any], regions: int) -> None:
    """The cache holds the best regions of just these images, each with its own numbers."""
    assert sorted(cache.ids) == sorted(images)
    rows = cache.gather(np.arange(len(cache)))
    assert not rows.view.any()
    for row, image_id in enumerate(cache.ids):
        image = images[image_id]
        order = sorted(range(len(image["scores"])), key=lambda i: -image["scores"][i])[:regions]
        n = len(order)
        assert rows.count[row] == n
        for place, region in enumerate(order):
            features = image["features"][region].astype(cache.feature_dtype)
            assert (rows.features[row, place] == features).all()
            np.testing.assert_allclose(rows.boxes[row, place], image["boxes"][region], atol=1e-6)
            assert rows.scores[row, place] == np.float32(image["scores"][region])
            assert rows.classes[row, place] == image["classes"][region] + 1
        assert not rows.features[row, n:].any()


def images_of(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """What an npz says, by image; images without regions are left out."""
    with np.load(path) as npz:
        arrays = {name: npz[name] for name in npz}
    return {
        str(image_id): {
            name: arrays[name][place, : arrays["count"][place]]
            for name in ("features", "boxes", "scores", "classes")
        }
        for place, image_id in enumerate(arrays["image_id"])
        if arrays["count"][place]
    }


def tsv_images_of(path: Path, name: Callable[[str], str]) -> dict[str, dict[str, np.ndarray]]:
    return {
        name(image_id): {**image, "scores": image["objects_conf"], "classes": image["objects"]}
        for image_id, image in read_tsv(path).items()
    }


def test_an_npz_becomes_cache_and_manifest_and_a_run(checkout: Checkout, tmp_path: Path) -> None:
    path = write_npz(tmp_path)
    said = checkout.ok("import-regions", path)
    assert "cache/tiny: 9 rows of 3 x 6 float16, 9 of them imported now; the best 3 of up" in said
    assert_stored(checkout.cache(), images_of(path), 3)
    assert len({entry.fingerprint for entry in checkout.cache().shards}) == 5  # of other images
    recipe = checkout.cache().recipe
    assert {name: recipe[name] for name in ("imported_from", "regions", "feature_dtype")} == {
        "imported_from": "npz",
        "regions": 3,
        "feature_dtype": "float16",
    }
    assert sorted(name for name in checkout.outputs() if "cache" in name) == [
        "cache/tiny/index.parquet",
        *(f"cache/tiny/regions-{n:05d}.h5" for n in range(5)),
    ]

    manifest = read_manifest(checkout / "data/tiny/prepared/manifest.parquet")
    arrays = make_arrays()
    assert manifest.dataset == "tiny"
    assert manifest.vocabulary == LABELS
    assert manifest.split_name == "imported"
    for place, row in enumerate(manifest.table.to_pylist()):
        labels = arrays["labels"][place]
        assert row == {
            "image_id": arrays["image_id"][place],
            "path": f"images/{arrays['image_id'][place]}.jpg",
            "split": arrays["split"][place],
            "labels": [n for n in range(3) if labels[n] == 1],
            "ignored": [n for n in range(3) if labels[n] == 0],
            "width": arrays["size_wh"][place, 0],
            "height": arrays["size_wh"][place, 1],
        }

    checkout.ok("detector")
    before = checkout.outputs()
    assert "imported" in checkout.ok("extract", "--replace")
    assert checkout.outputs() == before
    checkout.ok("train")
    checkout.ok("evaluate")
    metrics = json.loads((checkout / "runs/tiny/full-s0/metrics.json").read_text())
    assert metrics["fingerprint"] == checkout.cache().fingerprint
    assert metrics["images"] == 3


def test_tsvs_become_a_cache_and_a_run(checkout: Checkout, tmp_path: Path) -> None:
    lines = make_lines()
    paths = [write_tsv(tmp_path / f"{n}.tsv", lines[n : n + 5]) for n in (0, 5)]
    write_listed(checkout, [str(100 + n) for n in range(8)])
    manifest = checkout.bytes("data")
    said = checkout.ok("import-regions", *paths, "--dataset", "listed")
    assert "cache/listed: 8 rows of 3 x 6 float16, 8 of them imported now; the best 3 of up" in said
    assert "`extract.listed.regions: 4` keeps all; 1 images of 0.tsv, 5.tsv are not in" in said
    expected = tsv_images_of(
        write_tsv(tmp_path / "all.tsv", lines), lambda text: str(int(text[-12:]))
    )
    del expected["108"]
    assert_stored(checkout.cache("listed"), expected, 3)
    assert checkout.bytes("data") == manifest
    checkout.ok("train", "--dataset", "listed")
    assert "mAP" in checkout.ok("evaluate", "--dataset", "listed")


def test_more_regions_than_there_are_are_not_made_up(checkout: Checkout, tmp_path: Path) -> None:
    path = write_npz(tmp_path)
    assert "9 rows of 4 x 6 float32" in checkout.ok(
        "import-regions",
        path,
        "--set=extract.tiny.regions=50",
        "--set=extract.tiny.feature_dtype=float32",
    )
    assert_stored(checkout.cache(), images_of(path), 50)


def test_the_same_import_again_changes_nothing(checkout: Checkout, tmp_path: Path) -> None:
    path = write_npz(tmp_path)
    checkout.ok("import-regions", path)
    every = [p for top in ("data", "cache") for p in (checkout / top).rglob("*") if p.is_file()]
    before = {p: p.stat().st_mtime_ns for p in every if p.suffix != ".lock"}
    assert "9 rows of 3 x 6 float16, 0 of them imported now" in checkout.ok("import-regions", path)
    checkout.ok("import-regions", path, "--replace", "--set", "extract.tiny.rows_per_shard=4")
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_a_corrected_label_costs_no_region(checkout: Checkout, tmp_path: Path) -> None:
    checkout.ok("import-regions", write_npz(tmp_path))
    before = checkout.bytes("cache/tiny")
    labels = make_arrays()["labels"]
    labels[0] = -labels[0]
    said = checkout.ok("import-regions", write_npz(tmp_path, labels=labels))
    assert " 0 of them imported now" in said
    assert checkout.bytes("cache/tiny") == before
    manifest = read_manifest(checkout / "data/tiny/prepared/manifest.parquet")
    assert manifest.table.to_pylist()[0]["labels"] == np.flatnonzero(labels[0] == 1).tolist()


def test_lost_and_damaged_shards_are_imported_again(checkout: Checkout, tmp_path: Path) -> None:
    path = write_npz(tmp_path)
    checkout.ok("import-regions", path)
    before = checkout.outputs()
    (checkout / "cache/tiny/regions-00001.h5").unlink()
    assert "2 of them imported now" in checkout.ok("import-regions", path)
    assert checkout.outputs() == before
    damaged = checkout / "cache/tiny/regions-00002.h5"
    damaged.write_bytes(damaged.read_bytes()[:900])
    checkout.refused(r"regions-00002\.h5.*damaged.*Import again after that", "import-regions", path)
    assert "2 of them imported now" in checkout.ok("import-regions", path, "--replace")
    assert checkout.outputs() == before


def test_an_import_that_ends_at_any_moment_goes_on(checkout: Checkout, tmp_path: Path) -> None:
    """It is ended after each of its renames, and before each, with an unfinished file left.

    There are six: the manifest and its folder, three shards and the index.
    """
    path = write_npz(tmp_path)
    command = ("import-regions", path, "--set", "extract.tiny.rows_per_shard=4")
    checkout.ok(*command)
    whole = checkout.outputs()
    for name in ("pipeline.files.fsync_folder", "pipeline.files.os.fsync"):
        renames = 0
        for moment in range(1, 99):
            shutil.rmtree(checkout / "data")
            shutil.rmtree(checkout / "cache")
            original = files_module.fsync_folder if "folder" in name else files_module.os.fsync
            calls = 0

            def ending(*arguments: Any, moment: int = moment, original: Any = original) -> None:
                nonlocal calls
                calls += 1
                if calls == moment:
                    raise KeyboardInterrupt
                original(*arguments)

            with mock.patch(name, ending):
                outcome = checkout.gmpipe(*command)
            if outcome.code == 0:
                break
            renames += 1
            (checkout / "cache/tiny/regions-00007.h5.0123abcd.tmp").write_bytes(b"unfinished")
            if "cache/tiny/index.parquet" not in checkout.outputs():
                checkout.refused("no index|no manifest", "train")
            checkout.ok(*command)
            assert checkout.outputs() == whole
        assert renames >= 5  # a folder's rename has nothing to flush before it


def test_a_grown_manifest_adds_images_and_a_shrunken_one_drops_them(
    checkout: Checkout, tmp_path: Path
) -> None:
    path = write_tsv(tmp_path / "a.tsv", make_lines())
    command = ("import-regions", path, "--dataset", "listed")
    write_listed(checkout, [str(100 + n) for n in range(6)])
    checkout.ok(*command)
    first = checkout.cache("listed")
    write_listed(checkout, [str(100 + n) for n in range(9)])
    assert "9 rows of 3 x 6 float16, 3 of them imported now" in checkout.ok(*command)
    grown = checkout.cache("listed")
    assert grown.fingerprint != first.fingerprint
    assert [e.sha256 for e in grown.shards][:3] == [e.sha256 for e in first.shards]
    write_listed(checkout, [str(100 + n) for n in (0, 1, 4, 5, 6, 7, 8)])
    assert "7 rows of 3 x 6 float16, 0 of them imported now" in checkout.ok(*command)
    write_listed(checkout, [str(100 + n) for n in (0, 4, 5, 6, 7, 8)])
    assert "6 rows of 3 x 6 float16, 1 of them imported now" in checkout.ok(*command)
    expected = tsv_images_of(path, lambda text: str(int(text[-12:])))
    for gone in ("101", "102", "103"):
        del expected[gone]
    assert_stored(checkout.cache("listed"), expected, 3)


def test_another_file_is_refused_until_it_may_replace(checkout: Checkout, tmp_path: Path) -> None:
    path = write_npz(tmp_path)
    checkout.ok("import-regions", path)
    first = checkout.cache()
    checkout.refused(
        r"regions-00000\.h5 was made with other settings: regions is 3, expected 2.*`--replace`",
        *("import-regions", path, "--set", "extract.tiny.regions=2"),
    )
    other = write_npz(tmp_path / "other", **make_arrays(images=12, seed=1))
    checkout.refused("source_sha256 is .*`--replace` to drop.*restore", "import-regions", other)
    with mock.patch("stages.commands.import_regions.write_shard", side_effect=KeyboardInterrupt):
        assert checkout.gmpipe("import-regions", other, "--replace").code == 130
    assert not (checkout / "cache/tiny/index.parquet").exists()  # of shards that are gone
    checkout.ok("import-regions", path)
    said = checkout.ok("import-regions", other, "--replace")
    assert said.count("It was dropped.") == 5
    assert "12 rows of 3 x 6 float16, 12 of them imported now" in said
    assert_stored(checkout.cache(), images_of(other), 3)
    assert checkout.cache().fingerprint != first.fingerprint
    assert len(read_manifest(checkout / "data/tiny/prepared/manifest.parquet")) == 12


def test_a_file_with_a_wrong_row_replaces_nothing(checkout: Checkout, tmp_path: Path) -> None:
    """It is read to its last row before the shards that are there are dropped."""
    checkout.ok("import-regions", write_npz(tmp_path))
    before = {path: path.read_bytes() for path in (checkout / "cache/tiny").iterdir()}
    manifest = (checkout / "data/tiny/prepared/manifest.parquet").read_bytes()
    arrays = make_arrays(images=12, seed=1)
    arrays["boxes"] = arrays["boxes"].copy()
    arrays["boxes"][11, 0] = (10, 20, 30, 40)
    other = write_npz(tmp_path / "other", **arrays)
    checkout.refused(r"boxes\[0\] is \[10.*expected xyxy in", "import-regions", other, "--replace")
    assert {path: path.read_bytes() for path in (checkout / "cache/tiny").iterdir()} == before
    assert (checkout / "data/tiny/prepared/manifest.parquet").read_bytes() == manifest


def test_images_without_regions_are_listed_where_they_are_allowed(
    checkout: Checkout, tmp_path: Path
) -> None:
    count = make_arrays()["count"]
    count[[3, 4]] = 0
    path = write_npz(tmp_path, count=count)
    checkout.refused(
        "made.npz: 2 of 9 images of tiny have no region there; the first is '000103'.*"
        r"`--set extract\.tiny\.max_failures=2`",
        *("import-regions", path),
    )
    said = checkout.ok("import-regions", path, "--set", "extract.tiny.max_failures=2")
    assert "7 rows" in said
    assert "2 images have no region, see cache/tiny/failures.parquet" in said
    failures = read_failures(checkout / "cache/tiny")
    assert [(f.image_id, f.path) for f in failures.values()] == [
        ("000103", "images/000103.jpg"),
        ("000104", "images/000104.jpg"),
    ]
    assert_stored(checkout.cache(), images_of(path), 3)
    assert len(read_manifest(checkout / "data/tiny/prepared/manifest.parquet")) == 9
    assert "2 images without regions left out" in checkout.ok("train")
    assert "mAP" in checkout.ok("evaluate")

    other = write_npz(tmp_path, count=np.zeros(9, int))
    checkout.refused("count is 0 for all 9 images", "import-regions", other)


def test_images_that_a_tsv_lacks_are_told(checkout: Checkout, tmp_path: Path) -> None:
    none = dict.fromkeys(("objects", "objects_conf", "boxes", "features"), "")
    path = write_tsv(tmp_path / "a.tsv", changed_line(4, count=0, **none)[:5])
    write_listed(checkout, [str(100 + n) for n in range(6)])
    command = ("import-regions", path, "--dataset", "listed")
    checkout.refused(
        "a.tsv: 2 of 6 images of listed have no region there; the first is '104'.*several TSVs",
        *command,
    )
    checkout.ok(*command, "--set", "extract.listed.max_failures=2")
    assert pq.read_table(checkout / "cache/listed/failures.parquet").to_pylist() == [
        {"image_id": str(n), "path": f"{n}.jpg", "reason": "a.tsv has no region of it"}
        for n in (104, 105)
    ]
    assert sorted(checkout.cache("listed").ids) == ["100", "101", "102", "103"]
    path = write_tsv(path, make_lines(4))
    rest = write_tsv(tmp_path / "b.tsv", make_lines()[4:6])
    checkout.ok(*command[:2], rest, *command[2:], "--replace")
    assert not (checkout / "cache/listed/failures.parquet").exists()
    write_listed(checkout, ["7", "8", "9"])
    checkout.refused(
        r"line 1 \('COCO_train2014_000000000100'\): neither .*first image is '7'.*same number",
        *command,
    )


@pytest.mark.parametrize(
    ("setting", "files", "message"),
    [
        ("prepare.tiny.source=scenes", 1, r"prepare\.tiny\.source is scenes, .*expected imported"),
        ("detector.tiny.source=torchvision", 1, r"detector\.tiny\.source is torchvision; expected"),
        ("extract.tiny.views=2", 1, r"extract\.tiny\.views is 2; expected 1.*whole image"),
        ("extract.tiny.regions=3", 2, "found 2 files of npz; expected one.*Name one"),
    ],
)
def test_settings_that_contradict_an_import_are_named(
    checkout: Checkout, tmp_path: Path, setting: str, files: int, message: str
) -> None:
    paths = [write_npz(tmp_path)] * files
    checkout.refused(message, "import-regions", *paths, "--set", setting)


def test_a_tsv_needs_a_manifest_with_labels(checkout: Checkout, tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "a.tsv", make_lines())
    checkout.refused("prepare.tiny.source is imported.*e.g. coco", "import-regions", path)
    checkout.refused(
        "no manifest at data/listed/.*gmpipe prepare", "import-regions", path, "--dataset", "listed"
    )


def test_the_form_is_told_by_the_suffix_or_an_option(checkout: Checkout, tmp_path: Path) -> None:
    path = write_npz(tmp_path)
    plain = path.rename(tmp_path / "regions")
    checkout.refused(
        r"regions: expected files that end in \.npz.*--form npz", "import-regions", plain
    )
    other = write_tsv(tmp_path / "a.tsv", make_lines())
    checkout.refused("Name one form of files", "import-regions", plain, other)
    assert "9 of them imported" in checkout.ok("import-regions", plain, "--form", "npz")


def test_a_data_set_that_is_not_described_gets_its_blocks(
    checkout: Checkout, tmp_path: Path
) -> None:
    for path, source in (
        (write_npz(tmp_path), "imported"),
        (write_tsv(tmp_path / "a.tsv", make_lines()), "coco"),
    ):
        outcome = checkout.gmpipe("import-regions", path, "--dataset", "new")
        assert outcome.refused("--dataset: params.yaml describes tiny, listed, but not 'new'")
        blocks = YAML(typ="safe").load(outcome.err[outcome.err.index("\n\n") :])
        raw = json.loads(json.dumps(PARAMS))
        for section, block in blocks.items():
            raw[section] |= block
        described = Params.model_validate(raw)
        assert described.prepare["new"].source == source
        assert described.detector["new"].source == "imported"
    assert checkout.outputs() == {}


def test_a_folder_that_another_process_writes_is_left_alone(
    checkout: Checkout, tmp_path: Path
) -> None:
    path = write_npz(tmp_path)
    for folder in ("cache/tiny", "data/tiny/prepared"):
        with files_module.folder_lock(checkout / folder):
            outcome = checkout.gmpipe("import-regions", path)
        assert outcome.refused(f"{folder} is being written by another gmpipe process")
        assert checkout.outputs() == {}
    checkout.ok("import-regions", path)


def test_an_imported_detector_says_so_and_is_none(checkout: Checkout) -> None:
    assert "the regions of tiny are imported" in checkout.ok("detector")
    folder = checkout / "data/tiny/detector"
    assert sorted(p.name for p in folder.iterdir()) == ["detector.json", "metrics.json"]
    assert json.loads((folder / "detector.json").read_text())["source"] == "imported"
    with pytest.raises(MismatchError, match=r"detector\.json"):
        read_description(folder)


# Real data ---------------------------------------------------------------------------------------


def test_real_regions_of_voc2007(checkout: Checkout, shared: Path) -> None:
    path = shared / "data/voc2007-regions/regions.npz"
    smaller = ("--set=extract.tiny.regions=10", "--set=extract.tiny.rows_per_shard=500")
    said = checkout.ok("import-regions", path, *smaller)
    assert "1400 rows of 10 x 512 float16" in said
    assert_stored(checkout.cache(), images_of(path), 10)
    manifest = read_manifest(checkout / "data/tiny/prepared/manifest.parquet")
    assert {split: n["images"] for split, n in manifest.counts.items()} == {
        "train": 840,
        "test": 560,
    }
    with np.load(path) as npz:
        labels = npz["labels"][npz["split"] == "test"]
    expected = np.where(labels == 1, 1, np.where(labels == 0, -1, 0))
    np.testing.assert_array_equal(manifest.truth("test"), expected)
    small = "--set=train.tiny.batch_size=100"
    checkout.ok("train", "--variant", "max-pool", small)
    assert "mAP" in checkout.ok("evaluate", "--variant", "max-pool", small)


def test_real_bottom_up_features(checkout: Checkout, shared: Path) -> None:
    path = shared / "data/bottom-up-sample/train2014_obj36.tsv"
    expected = tsv_images_of(path, lambda text: str(int(text[-12:])))
    with path.open() as stream:
        columns = [line.split("\t", 3)[:3] for line in stream]
    ids = [str(int(column[0][-12:])) for column in columns]
    write_listed(checkout, ids, [(int(width), int(height)) for _, height, width in columns])
    said = checkout.ok(
        "import-regions", path, "--dataset", "listed", "--set=extract.listed.regions=40"
    )
    assert "10 rows of 36 x 2048 float16" in said
    cache = checkout.cache("listed")
    assert_stored(cache, expected, 40)
    assert read_header(checkout / "cache/listed/regions-00000.h5").feature_size == 2048
    checkout.ok("train", "--dataset", "listed")
    assert "mAP" in checkout.ok("evaluate", "--dataset", "listed")
