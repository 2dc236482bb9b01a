"""An npz of regions is read as numpy reads it; one that breaks its form is refused and named."""

from __future__ import annotations

import io
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from refusals import refused
from region_files import Arrays, make_arrays, write_npz

from pipeline.errors import InputError
from pipeline.shards.imports import NpzFile, region_rows


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("slots", [1, 4])
def test_an_npz_is_read_as_numpy_reads_it(
    tmp_path: Path, save: Callable[..., None], slots: int
) -> None:
    arrays = make_arrays(slots=slots)
    path = tmp_path / "a.npz"
    save(path, **arrays, something_else=np.zeros(3))
    reports: list[tuple[int, int]] = []
    source = NpzFile.open(path, lambda *bytes_read: reports.append(bytes_read))
    with np.load(path) as npz:
        assert source.image_ids == npz["image_id"].tolist()
        assert source.counts.tolist() == npz["count"].tolist()
        assert source.sizes.tolist() == npz["size_wh"].tolist()
        assert source.splits == npz["split"].tolist()
        assert source.labels.tolist() == npz["labels"].tolist()
        assert source.label_names == tuple(npz["label_names"].tolist())
        assert source.feature_size == npz["features"].shape[2]
        for wanted in (range(9), [1], range(0, 9, 2), []):
            images = list(source.read(np.array(wanted)))
            for row, image in zip(wanted, images, strict=True):
                n = npz["count"][row]
                assert source.image_ids[row] in image.where
                for name in ("features", "boxes", "scores", "classes"):
                    assert getattr(image, name).tolist() == npz[name][row, :n].tolist()
    assert {total for _, total in reports} == {sum(read for read, _ in reports)}


@pytest.mark.parametrize(
    "changes",
    [
        {"features": np.float64, "boxes": np.float16, "scores": ">f8"},
        {"classes": np.uint8, "count": np.int64, "size_wh": np.uint16, "labels": np.int64},
        {"image_id": np.bytes_, "split": np.bytes_, "label_names": np.bytes_},
        {"image_id": ">U6", "split": ">U9", "label_names": "S7", "labels": ">i2"},
        {"features": ">f4", "boxes": ">f8", "classes": ">i8", "count": ">u2", "size_wh": ">i4"},
    ],
)
def test_other_types_of_the_same_kind_give_the_same_values(tmp_path: Path, changes: Any) -> None:
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


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_in_fortrans_order_are_read(tmp_path: Path, save: Callable[..., None]) -> None:
    arrays, path = make_arrays(), tmp_path / "a.npz"
    first = NpzFile.open(write_npz(tmp_path))
    save(path, **{name: np.asfortranarray(array) for name, array in arrays.items()})
    other = NpzFile.open(path)
    np.testing.assert_array_equal(other.labels, arrays["labels"])
    np.testing.assert_array_equal(other.sizes, arrays["size_wh"])
    for chosen in ([0, 1, 2, 3, 4, 5, 6, 7, 8], [2, 5]):
        images = zip(first.read(np.array(chosen)), other.read(np.array(chosen)), strict=True)
        for a, b in images:
            for name in ("features", "boxes", "scores", "classes"):
                np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


MULTI_HOT = np.random.default_rng(3).random((9, 3)) < 0.4


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, bool])
def test_labels_without_a_negative_are_multi_hot(
    tmp_path: Path, dtype: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """As `neither`, the zeros would leave nothing to learn: no label has a negative."""
    source = NpzFile.open(write_npz(tmp_path, labels=MULTI_HOT.astype(dtype)))
    assert source.labels.dtype == np.int8
    np.testing.assert_array_equal(source.labels, np.where(MULTI_HOT, 1, -1))
    notes = [record.getMessage() for record in caplog.records]
    if dtype is bool:  # which can mean nothing else
        assert notes == []
    else:
        (note,) = notes
        assert "made.npz, `labels`" in note
        assert "multi-hot" in note


def test_labels_that_may_be_coded_otherwise_are_noted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    labels = MULTI_HOT.astype(np.int8)
    labels[0] = -1, -1, 1
    source = NpzFile.open(write_npz(tmp_path, labels=labels))
    np.testing.assert_array_equal(source.labels, labels)
    (note,) = [record.getMessage() for record in caplog.records]
    assert f" {(labels == 0).sum()} times" in note
    assert " 2 times" in note
    advised = np.where(labels == 1, 1, -1 - labels)
    assert "`numpy.where(labels == 1, 1, -1 - labels)`" in note
    assert (advised[labels == 0] == -1).all()
    assert (advised[labels == -1] == 0).all()
    caplog.clear()
    labels = np.where(MULTI_HOT, 1, -1)
    labels[0, 0] = 0
    NpzFile.open(write_npz(tmp_path, labels=labels))
    NpzFile.open(write_npz(tmp_path, labels=np.ones((9, 3), int)))
    assert not caplog.records


def test_a_mark_of_byte_order_is_no_part_of_a_text(tmp_path: Path) -> None:
    names = np.array(["\ufeffcat", "dog", "sun"])
    assert NpzFile.open(write_npz(tmp_path, label_names=names)).label_names == ("cat", "dog", "sun")


def test_labels_that_look_alike_are_the_same(tmp_path: Path) -> None:
    names = np.array(["cafe\u0301 ", "dog\u200b", "\u00a0sun"])
    listed = NpzFile.open(write_npz(tmp_path, label_names=names)).label_names
    assert listed == ("caf\u00e9", "dog", "sun")
    names = np.array(["cafe\u0301", "dog", "caf\u00e9 "])
    with refused(
        InputError, "`label_names`", "entry 2", repr(str(names[2])), "entry 0", repr(str(names[0]))
    ):
        NpzFile.open(write_npz(tmp_path, label_names=names))
    with refused(InputError, "`label_names`", "entry 1", "empty"):
        NpzFile.open(write_npz(tmp_path, label_names=np.array(["cat", " \u200b", "dog"])))


def test_what_lies_beyond_the_count_is_ignored(tmp_path: Path) -> None:
    arrays = make_arrays()
    arrays["features"][0, 1:] = np.nan
    arrays["classes"][0, 1:] = -1
    source = NpzFile.open(write_npz(tmp_path, **arrays))
    rows = region_rows(
        source.read(np.array([0])),
        ["a"],
        regions=4,
        feature_size=source.feature_size,
        feature_dtype="float16",
    )
    rows.check()
    assert rows.count.tolist() == [1]


def test_labels_do_not_decide_the_regions(tmp_path: Path) -> None:
    first = NpzFile.open(write_npz(tmp_path))
    for name, value in (("labels", -make_arrays()["labels"]), ("size_wh", np.ones((9, 2), int))):
        other = NpzFile.open(write_npz(tmp_path, **{name: value}))
        assert other.sha256 == first.sha256
        assert other.manifest_sources != first.manifest_sources
    for name in ("image_id", "features", "boxes", "scores", "classes", "count"):
        value = make_arrays()[name][::-1]
        assert NpzFile.open(write_npz(tmp_path, **{name: value})).sha256 != first.sha256


def put(name: str, index: Any, value: Any) -> Arrays:
    """One array of the sound ones, with another value at ``index``."""
    array = make_arrays()[name]
    array = array.astype(object).astype(f"U{len(str(value))}") if array.dtype.kind == "U" else array
    array[index] = value
    return {name: array}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boxes": None}, r"`boxes`.*'classes'"),
        (
            {"features": np.zeros((9, 4, 6), int)},
            r"`features`.*int64.*float.*features=features\.astype\(numpy\.float32\)",
        ),
        (
            {"classes": np.zeros((9, 4))},
            r"`classes`.*float64.*integer.*classes=classes\.astype\(numpy\.int64\)",
        ),
        (
            {"image_id": np.arange(9)},
            r"`image_id`.*int64.*text.*image_id=image_id\.astype\(str\)",
        ),
        (
            {"image_id": np.array(["a", 1], object)},
            r"`image_id`.*object.*text.*unpickled.*image_id=image_id\.astype\(str\)",
        ),
        (
            {"features": np.array([np.zeros((n, 6)) for n in (1, 2)], object)},
            r"`features`.*object.*zeros.*`count`",
        ),
        (
            {"labels": make_arrays()["labels"].astype(np.float32)},
            r"`labels`.*float32.*1 \(positive\), -1 \(negative\).*labels\.astype\(numpy\.int64\)",
        ),
        ({"labels": np.zeros(9, int)}, r"`labels`.*\(9,\).*`label_names`.*-1 \(negative\)"),
        ({"features": np.zeros((9, 4))}, r"`features`.*\(9, 4\).*\(N, M, d\)"),
        ({"features": np.zeros((9, 4, 0))}, r"`features`.*\(9, 4, 0\).*\(N, M, d\)"),
        ({"boxes": np.zeros((9, 4, 5))}, r"`boxes`.*\(9, 4, 5\).*xyxy"),
        ({"scores": np.zeros((8, 4))}, "`scores`.*N = 9.*image_id"),
        ({"classes": np.zeros((9, 5), int)}, "`classes`.*M = 4.*features"),
        ({"label_names": np.array(["a", "b"])}, "`label_names`.*C = 3.*labels"),
        (put("image_id", 2, ""), r"row 2 \(''\).*image_id"),
        (put("image_id", 2, "000100"), r"row 2 \('000100'\).*row 0"),
        (put("split", 3, "valid"), r"row 3 \('000103'\).*split.*'valid'.*train.*test"),
        ({"split": np.array(["train"] * 9)}, "split.*'test'"),
        (put("count", 4, 5), r"row 4 \('000104'\).*count.*5.*0 to 4"),
        (put("count", 4, -1), r"row 4 \('000104'\).*count.*-1.*0 to 4"),
        (put("size_wh", (5, 1), 0), r"row 5 \('000105'\).*size_wh\[1\].*0.*1 to"),
        (put("labels", (6, 2), 2), r"row 6 \('000106'\).*labels\[2\].* 2;.*-1 \(negative\)"),
        (put("labels", (6, 2), -2), r"row 6 \('000106'\).*labels\[2\].*-2;.*-1 \(negative\)"),
        ({"image_id": np.array([b"\xff"] * 9)}, "`image_id`.*Unicode"),
        ({"image_id": np.array(["\ud800"] * 9)}, "`image_id`.*Unicode"),
        (
            {"label_names": np.frombuffer(b"\xff\xff\xff\x00" * 3, "<U1")},
            "`label_names`.*Unicode",
        ),
    ],
)
def test_an_npz_that_breaks_its_form_is_refused_with_the_array_and_the_row(
    tmp_path: Path, changes: Any, message: str
) -> None:
    path = write_npz(tmp_path, **changes)
    with pytest.raises(InputError, match=rf"^{re.escape(str(path))}.*{message}"):
        NpzFile.open(path)


def test_a_damaged_npz_is_named_and_never_misread(tmp_path: Path) -> None:
    """With bits flipped or the end cut off, whatever is still read is what was written."""
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
        except InputError as error:
            errors.append(str(error))
    assert len(errors) > 90
    assert [text for text in errors if str(path) not in text] == []


def test_what_is_not_an_npz_is_named(tmp_path: Path) -> None:
    for name, content in (
        ("empty.npz", b""),
        ("text.npz", b"version https://git-lfs.github.com/spec/v1"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name}.*npz"):
            NpzFile.open(tmp_path / name)
    with pytest.raises(InputError, match=r"absent\.npz.*No such file"):
        NpzFile.open(tmp_path / "absent.npz")
    with pytest.raises(InputError, match=f"{re.escape(str(tmp_path))}.*folder"):
        NpzFile.open(tmp_path)


def test_an_array_larger_than_its_member_is_refused_before_it_is_read(tmp_path: Path) -> None:
    """A header may declare any size; no memory is allocated for it."""
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
    with pytest.raises(InputError, match=r"`image_id`.*\d+ bytes.*320000000"):
        NpzFile.open(path)


# --- made to do damage ---------------------------------------------------------------------------


@pytest.mark.parametrize("header", ["{\n", "[" * 5000 + "\n", "9" * 5000 + "\n", "(" * 150 + "\n"])
@pytest.mark.parametrize("name", ["image_id", "features", "label_names"])
def test_a_header_that_is_none(tmp_path: Path, name: str, header: str) -> None:
    path = write_npz(tmp_path, **{name: None})
    with zipfile.ZipFile(path, "a") as archive:
        member = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()
        archive.writestr(f"{name}.npy", member)
    with refused(InputError, str(path)):
        NpzFile.open(path)


def test_texts_and_labels_have_limits(tmp_path: Path) -> None:
    ids = make_arrays()["image_id"].astype("S20000")
    with refused(InputError, "made.npz", "`image_id`", "S20000", "16384 bytes"):
        NpzFile.open(write_npz(tmp_path, image_id=ids))
    count = 2**15 + 1
    labels = np.ones((len(ids), count), np.int8)
    names = np.array([f"label{number}" for number in range(count)])
    with refused(InputError, "made.npz", "labels", str(count), str(2**15)):
        NpzFile.open(write_npz(tmp_path, labels=labels, label_names=names))


def test_boxes_of_another_form_are_named_with_the_lines_that_convert_them(tmp_path: Path) -> None:
    arrays = make_arrays()
    boxes, size_wh = arrays["boxes"].astype(float), arrays["size_wh"]
    start, side = boxes[..., :2], boxes[..., 2:] - boxes[..., :2]
    scale = np.tile(size_wh, 2)[:, None]
    sides = np.concatenate([start, side], axis=-1)
    centres = np.concatenate([start + side / 2, side], axis=-1)
    for wrong, form in (
        (boxes * scale, "in pixels"),
        ((boxes * scale).round(), "in pixels"),
        (sides, "x, y, width, height"),
        (sides * scale, "x, y, width, height in pixels"),
        (centres, "centre"),
        (centres * scale, "centre, width, height in pixels"),
    ):
        path = write_npz(tmp_path, boxes=wrong.astype(np.float32))
        with pytest.raises(InputError) as caught:
            NpzFile.open(path)
        assert "`boxes`" in str(caught.value)
        assert form in caught.value.problem
        lines = caught.value.remedy.split("`")[1]
        names = {"numpy": np, "boxes": wrong, "size_wh": size_wh}
        exec(lines, names)
        np.testing.assert_allclose(names["boxes"], boxes, atol=0.01)
        NpzFile.open(write_npz(tmp_path, boxes=names["boxes"].clip(0, 1).astype(np.float32)))


def test_single_wrong_boxes_are_left_to_their_region(tmp_path: Path) -> None:
    boxes = make_arrays()["boxes"]
    for number in (300, np.inf, np.nan):
        boxes[3, 0] = [0.1, 0.1, number, 200]
        source = NpzFile.open(write_npz(tmp_path, boxes=boxes))
        assert source.counts[3] == 4
