"""The TSV of bottom-up-attention is read as others read it; a damaged line is refused and named."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from refusals import refused
from region_files import Line, changed_line, encoded, make_lines, read_tsv, write_tsv

from pipeline.errors import InputError
from pipeline.files import sha256_file
from pipeline.shards.imports import BottomUpFiles


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
    for chosen in ([0, 1, 2, 3, 4, 5, 6, 7, 8], [3], [0, 8]):
        for line, image in zip(chosen, source.read(np.array(chosen)), strict=True):
            wanted = expected[source.lines[line].file_id]
            assert image.features.tolist() == wanted["features"].tolist()
            assert image.scores.tolist() == wanted["objects_conf"].tolist()
            assert image.classes.tolist() == wanted["objects"].tolist()
            np.testing.assert_allclose(image.boxes, wanted["boxes"], rtol=1e-12)


def test_several_tsvs_are_read_as_one(tmp_path: Path) -> None:
    lines = make_lines()
    whole = BottomUpFiles.open([write_tsv(tmp_path / "all.tsv", lines)])
    parts = [write_tsv(tmp_path / f"{n}.tsv", lines[n * 3 : n * 3 + 3]) for n in range(3)]
    reports: list[tuple[int, int]] = []
    source = BottomUpFiles.open(parts, lambda *bytes_read: reports.append(bytes_read))
    assert source.sha256 == whole.sha256 == sha256_file(tmp_path / "all.tsv")
    assert source.counts.tolist() == whole.counts.tolist()
    assert source.lines[4].where == f"{parts[1]}, line 2 ('COCO_train2014_000000000104')"
    chosen = np.array([1, 2, 3, 8])
    for a, b in zip(source.read(chosen), whole.read(chosen), strict=True):
        assert a.features.tolist() == b.features.tolist()
    assert {total for _, total in reports} == {sum(read for read, _ in reports)}


def test_boxes_are_clipped_within_a_pixel_and_refused_beyond(tmp_path: Path) -> None:
    boxes = np.array([[-0.5, 0, 200.5, 101]], np.float32)
    path = write_tsv(tmp_path / "a.tsv", changed_line(4, boxes=boxes))
    (image,) = BottomUpFiles.open([path]).read(np.array([4]))
    assert image.boxes.tolist() == [[0, 0, 1, 1]]
    for box in ([0, 0, 202, 100], [0, 0, 200, 102], [-2, 0, 100, 100], [0, -2, 100, 100]):
        lines = changed_line(4, boxes=np.array([box], np.float32))
        source = BottomUpFiles.open([write_tsv(path, lines)])
        with pytest.raises(InputError, match=r"line 5 .*boxes\[0\].*200 x 100"):
            list(source.read(np.array([4])))


LINE = r"a\.tsv, line 5 \('COCO_train2014_000000000104'\): "


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 0}, LINE + "height.*b'0'"),
        ({"width": "1e2"}, LINE + "width.*b'1e2'"),
        ({"count": -1}, LINE + "count.*b'-1'"),
        ({"count": 10**12}, LINE + "count.*b'10000000000"),
        ({"count": 2}, LINE + "object ids.*8 bytes.*16 bytes.*2"),
        ({"objects": np.zeros(1, np.int32)}, LINE + "object ids.*4 bytes.*8 bytes"),
        ({"objects_conf": np.zeros(1)}, LINE + "object confidences.*8 bytes.*4 bytes"),
        ({"boxes": np.zeros((1, 5), np.float32)}, LINE + "boxes.*20 bytes.*16 bytes"),
        ({"features": np.zeros(7, np.float32)}, LINE + "feature size.*7.*6"),
        (
            {"features": np.zeros(6, np.float16)},
            LINE + "feature size.*3.*6.*half.*float16.*astype",
        ),
        ({"features": np.zeros(6, np.float64)}, LINE + "feature size.*12.*6.*twice.*astype"),
        ({"features": np.zeros(0, np.float32)}, LINE + "features.*0 bytes"),
        ({"features": np.zeros(5, np.int8)}, LINE + "features.*5 bytes"),
        ({"image_id": make_lines()[1]["image_id"]}, r"line 5 .*a\.tsv, line 2 "),
        ({"features": "\t"}, r"a\.tsv, line 5: .*11.*10.*id, height"),
    ],
)
def test_a_line_that_breaks_the_form_is_refused_before_any_is_used(
    tmp_path: Path, changes: Any, message: str
) -> None:
    path = write_tsv(tmp_path / "a.tsv", changed_line(4, **changes))
    path.write_text(path.read_text().replace('"\t"', "\t"))  # csv quotes a tab
    with pytest.raises(InputError, match=message):
        BottomUpFiles.open([path])


def test_damaged_base64_is_named(tmp_path: Path) -> None:
    sound = encoded(make_lines()[4]["features"])
    for damaged in ("!" + sound[1:], sound[:4] + "=" + sound[5:], f"{sound[:-4]}é{sound[-2:]}"):
        path = write_tsv(tmp_path / "a.tsv", changed_line(4, features=damaged))
        with pytest.raises(InputError, match=LINE + "features.*base64"):
            list(BottomUpFiles.open([path]).read(np.arange(9)))


def test_a_tsv_that_is_cut_off_is_refused_or_has_fewer_lines(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "a.tsv", make_lines())
    whole = path.read_bytes()
    expected = [image.features.tolist() for image in BottomUpFiles.open([path]).read(np.arange(9))]
    errors: list[str] = []
    for length in np.random.default_rng(0).integers(len(whole), size=100):
        path.write_bytes(whole[:length])
        try:
            source = BottomUpFiles.open([path])
            every = np.arange(len(source.lines))
            features = [image.features.tolist() for image in source.read(every)]
        except InputError as error:
            errors.append(str(error))
        else:
            assert features == expected[: len(features)]
            assert whole[:length].rstrip(b"\n").count(b"\n") == len(features) - 1
    assert [text for text in errors if "a.tsv" not in text] == []
    assert len(errors) > 90


def test_what_is_not_a_tsv_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    for content, message in (
        (b"", r"a\.tsv"),
        (b"\n\r\n\n", r"a\.tsv"),
        (b"\xff\t1\t1\t\t\t\t\t0\t\t\n", "line 1: id.*UTF-8"),
        (
            b"\t".join([b"img_id", b"img_h", b"img_w", *[b"x"] * 7]),
            "line 1 .*header.*img_h.*Delete",
        ),
        (b"1\t2\t3\t0\t\t\n", r"line 1: .*6.*10.*scores.*npz"),
        (b"\x89PNG\r\n\x1a\n", "line 1: .*1.*10"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            BottomUpFiles.open([path])
    with pytest.raises(InputError, match=r"absent\.tsv.*No such file"):
        BottomUpFiles.open([tmp_path / "absent.tsv"])
    with pytest.raises(InputError, match=f"{re.escape(str(tmp_path))}.*folder"):
        BottomUpFiles.open([tmp_path])


def test_a_line_without_end_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "a.tsv", make_lines())
    with (
        mock.patch("pipeline.shards.imports.bottom_up._LONGEST_LINE", 300),
        pytest.raises(InputError, match=r"line 3: .*300 bytes"),
    ):
        BottomUpFiles.open([path])


def lines_with(change: Callable[[np.ndarray], np.ndarray]) -> list[Line]:
    lines = make_lines()
    for line in lines:
        line["features"] = change(line["features"])
    return lines


@pytest.mark.parametrize("change", [lambda x: x, lambda x: np.maximum(x, 0)])
def test_features_of_float16_that_could_be_float32_are_noted(
    tmp_path: Path, change: Callable[[np.ndarray], np.ndarray], caplog: pytest.LogCaptureFixture
) -> None:
    """Their bytes are read as float32 in any case, and the sizes of all arrays agree."""
    lines = lines_with(lambda x: change(x.clip(-3, 3)).astype("<f2"))
    path = write_tsv(tmp_path / "a.tsv", lines)
    source = BottomUpFiles.open([path])
    assert source.feature_size == 3
    assert len(list(source.read(np.arange(9)))) == 9
    (note,) = [record.getMessage() for record in caplog.records]
    for part in (str(path), " 3 numbers", "like float16", " 6.", "features.astype(numpy.float32)"):
        assert part in note


@pytest.mark.parametrize(
    ("dtype", "name", "stored"),
    [("<f2", "float16", 6), ("<f8", "float64", 6), (">f4", "big-endian float32", 6)],
)
def test_features_of_another_type_that_are_no_float32_are_refused_in_one_error(
    tmp_path: Path, dtype: str, name: str, stored: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_tsv(tmp_path / "a.tsv", lines_with(lambda x: (9 * x).astype(dtype)))
    with refused(InputError, str(path), name, f"{stored} numbers", "features.astype(numpy.float32"):
        BottomUpFiles.open([path])
    assert not caplog.records


def test_a_later_line_of_another_type_is_named_with_the_type(tmp_path: Path) -> None:
    lines = lines_with(lambda x: x.clip(-3, 3).astype("<f2"))
    lines[4]["features"] = np.full((1, 6), 40, "<f2")
    path = write_tsv(tmp_path / "a.tsv", lines)
    with mock.patch("pipeline.shards.imports.bottom_up._SAMPLE", 10):
        source = BottomUpFiles.open([path])
    with refused(InputError, "line 5", "float16", "features.astype(numpy.float32)"):
        list(source.read(np.arange(9)))


def test_boxes_of_another_form_are_named_with_what_converts_them(tmp_path: Path) -> None:
    corners = np.array([[20, 10, 30, 40], [150, 80, 190, 90]])
    shares = (corners / [200, 100, 200, 100]).astype("<f4")
    sides = np.hstack([corners[:, :2], corners[:, 2:] - corners[:, :2]]).astype("<f4")
    for boxes, parts in (
        (shares, ["in [0, 1]", "[width, height, width, height]"]),
        (sides, ["boxes[0]", "x, y, width, height", "`boxes[:, 2:] += boxes[:, :2]`"]),
    ):
        path = write_tsv(tmp_path / "a.tsv", changed_line(1, boxes=boxes))
        source = BottomUpFiles.open([path])
        with refused(InputError, "line 2", "200 x 100", *parts):
            list(source.read(np.arange(9)))


def test_features_of_the_right_type_are_not_noted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes: list[Callable[[np.ndarray], np.ndarray]] = [
        lambda x: x,
        lambda x: np.maximum(x, 0),
        lambda x: x.astype(np.float16).astype(np.float32),
        lambda x: np.exp(9 * x),  # of many sizes
        np.zeros_like,
        np.ones_like,
    ]
    for change in changes:
        BottomUpFiles.open([write_tsv(tmp_path / "a.tsv", lines_with(change))])
    assert not caplog.records


def test_a_mark_of_byte_order_is_no_part_of_the_first_id(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "a.tsv", make_lines())
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    source = BottomUpFiles.open([path])
    assert source.lines[0].file_id == "COCO_train2014_000000000100"
    assert len(list(source.read(np.arange(9)))) == 9
