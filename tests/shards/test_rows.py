"""The contract of region rows, their checksums, and the recipe that decides them."""

from __future__ import annotations

import zlib
from dataclasses import replace

import numpy as np
import pytest
from builders import make_rows
from caches import RECIPE, assert_same_rows, changed_rows

from pipeline.errors import InputError, MismatchError
from pipeline.shards.schema import (
    AXES,
    RegionRows,
    check_same_recipe,
    fingerprint,
    row_checksums,
)

# Rows --------------------------------------------------------------------------------------------


def test_sound_rows_pass() -> None:
    make_rows().check()
    make_rows(feature_dtype="float32").check()
    make_rows(1, regions=1).check()
    make_rows(whole=True).check()
    make_rows(whole=True, feature_dtype="float32").check()
    make_rows().take([]).check()
    rows = make_rows()
    replace(rows, scores=np.where(rows.scores > 0, -1, 0).astype(np.float32)).check()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (changed_rows("features", (1, 0, 2), np.nan), r"'image-1'.*features\[0\]\[2\].*nan"),
        (changed_rows("features", (1, 1, 4), -np.inf), r"'image-1'.*features\[1\]\[4\].*-inf"),
        (changed_rows("features", (1, 2, 0), 1), r"'image-1'.*features\[2\].*zero"),
        (changed_rows("boxes", (1, 1, 0), -np.inf), r"'image-1'.*boxes\[1\]\[0\].*-inf"),
        (changed_rows("boxes", (1, 1), [-0.1, 0, 1, 1]), r"'image-1'.*boxes\[1\].*-0\.1"),
        (changed_rows("boxes", (1, 1), [0, 0, 1, 1.5]), r"'image-1'.*boxes\[1\].*1\.5"),
        (changed_rows("boxes", (1, 1), [0.5, 0, 0.4, 1]), r"'image-1'.*boxes\[1\].*x0 <= x1"),
        (changed_rows("boxes", (1, 1), [0, 0.5, 1, 0.4]), r"'image-1'.*boxes\[1\].*y0 <= y1"),
        (changed_rows("boxes", (1, 2), [0, 0, 1, 1]), r"'image-1'.*boxes\[2\].*zero"),
        (changed_rows("whole", (1, 3), np.inf), r"'image-1'.*whole\[3\].*inf.*finite"),
        (changed_rows("whole", (1, 0), np.nan), r"'image-1'.*whole\[0\].*nan.*finite"),
        (changed_rows("scores", (1, 0), np.inf), r"'image-1'.*scores\[0\].*inf"),
        (changed_rows("scores", (1, 1), 2), r"'image-1'.*scores\[1\].*2\.0"),
        (changed_rows("scores", (1, 2), 0.5), r"'image-1'.*scores\[2\].*0\.5.*zero"),
        (changed_rows("classes", (1, 2), 7), r"'image-1'.*classes\[2\].*7.*zero"),
        (changed_rows("count", 1, 0), r"'image-1'.*count.*0.*1 to 3"),
        (changed_rows("count", 1, 4), r"'image-1'.*count.*4.*1 to 3"),
        (changed_rows("view", 1, -1), r"'image-1'.*view.*-1"),
        (changed_rows("image_id", 1, b""), r"'' .*row 1.*image_id"),
        (changed_rows("image_id", 1, b"\xff"), r"row 1.*image_id.*b'\\xff'.*UTF-8"),
    ],
)
def test_a_value_that_breaks_the_contract_is_named(rows: RegionRows, message: str) -> None:
    with pytest.raises(InputError, match=message):
        rows.check()


@pytest.mark.parametrize("field", AXES)
def test_another_dtype_is_named(field: str) -> None:
    rows = make_rows(whole=True)
    other = getattr(rows, field).astype(np.str_ if field == "image_id" else np.float64)
    with pytest.raises(InputError, match=rf"{field}.*{other.dtype}"):
        replace(rows, **{field: other}).check()


@pytest.mark.parametrize("field", AXES)
def test_another_shape_is_named(field: str) -> None:
    rows = make_rows(whole=True)
    other = getattr(rows, field)[..., None]
    with pytest.raises(InputError, match=rf"'image-0'.*{field}.*shape \("):
        replace(rows, **{field: other}).check()


def test_the_vector_of_the_whole_view_has_the_type_and_size_of_a_feature() -> None:
    rows = make_rows(whole=True)
    assert rows.whole is not None
    with pytest.raises(InputError, match=r"whole.*float32.*float16"):
        replace(rows, whole=rows.whole.astype(np.float32)).check()
    with pytest.raises(InputError, match=r"whole.*\(4, 4\).*\(4, 5\)"):
        replace(rows, whole=rows.whole[:, :4]).check()


def test_rows_are_taken_and_joined_in_order() -> None:
    rows = make_rows(5)
    parts = [rows.take([0, 1]), rows.take([2]), rows.take([3, 4])]
    assert_same_rows(RegionRows.concatenate(parts), rows)
    assert rows.take([4, 4]).image_id.tolist() == [b"image-4", b"image-4"]
    with pytest.raises(ValueError, match="feature dtype"):
        RegionRows.concatenate([rows, make_rows(feature_dtype="float32")])
    with_whole = make_rows(5, whole=True)
    parts = [with_whole.take([0, 1]), with_whole.take([2, 3, 4])]
    assert_same_rows(RegionRows.concatenate(parts), with_whole)
    with pytest.raises(ValueError, match="fields"):
        RegionRows.concatenate([rows, with_whole])


def test_a_checksum_covers_every_field_but_not_the_width_of_ids() -> None:
    rows = make_rows(2, whole=True)
    plain = row_checksums(rows)
    row = [getattr(rows, field)[1] for field in AXES]
    first = b"".join(value.tobytes() for value in row[:5]) + b"image-1\0\0"
    assert plain[1] == zlib.crc32(first + row[7].tobytes())
    assert row_checksums(replace(rows, whole=None))[1] == zlib.crc32(first)
    wide = replace(rows, image_id=rows.image_id.astype("S40"))
    assert row_checksums(wide).tolist() == plain.tolist()
    for field in AXES:
        other = getattr(rows, field).copy()
        other[1] = b"other" if field == "image_id" else other[1] + 1
        sums = row_checksums(replace(rows, **{field: other}))
        assert (sums != plain).tolist() == [False, True], field


# Recipes -----------------------------------------------------------------------------------------


def test_a_fingerprint_ignores_only_the_order_of_fields() -> None:
    assert fingerprint(RECIPE) == fingerprint(dict(reversed(RECIPE.items())))
    assert fingerprint(RECIPE) != fingerprint({**RECIPE, "flip": 1})


def test_every_difference_between_recipes_is_named() -> None:
    check_same_recipe(RECIPE, dict(RECIPE), "here")
    found = {**RECIPE, "m": 10, "flip": 1, "old": "x"}
    with pytest.raises(MismatchError) as caught:
        check_same_recipe(found, {**RECIPE, "new": 0.5}, "cache/tiny")
    message = str(caught.value)
    assert message.startswith("cache/tiny ")
    assert "m is 10, expected 3;" in message
    assert "flip is 1, expected true;" in message
    assert 'old is "x", expected absent' in message
    assert "new is absent, expected 0.5;" in message
    assert "nms_threshold" not in message
