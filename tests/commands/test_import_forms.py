"""`gmpipe import-regions` of files in forms that people have: what is read, noted and named.

Files with the array `whole`, the features of whole images, make a cache of format version 2.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from caches import cut, flip_bit
from region_files import assert_stored, images_of, make_arrays, make_lines, write_npz, write_tsv
from test_import_regions import Checkout, make_checkout, write_listed

from pipeline.datasets.manifest import read_manifest
from pipeline.errors import InputError
from pipeline.shards.imports import NpzFile
from pipeline.shards.reader import RegionCache

WHOLE = np.random.default_rng(7).normal(size=(9, 6)).astype(np.float32)


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return make_checkout(tmp_path / "checkout")


def test_a_run_on_labels_of_0_and_1_learns_negatives(checkout: Checkout, tmp_path: Path) -> None:
    """As `neither`, its zeros gave loss 0 and mAP 100."""
    labels = (make_arrays()["labels"] == 1).astype(int)
    labels[2], labels[5], labels[8] = (1, 0, 1), (0, 1, 0), (0, 1, 1)  # of the test images
    outcome = checkout.gmpipe("import-regions", write_npz(tmp_path, labels=labels))
    assert outcome.code == 0
    assert "Note: " in outcome.err
    assert "`labels`" in outcome.err
    assert "multi-hot" in outcome.err
    assert "data/tiny/prepared: 6 train, 3 test, 3 labels" in outcome.out
    assert "`gmpipe prepare --dataset tiny`" in outcome.out
    manifest = read_manifest(checkout / "data/tiny/prepared/manifest.parquet")
    assert manifest.table.to_pylist()[2]["labels"] == [0, 2]
    assert not any(manifest.table["ignored"].to_pylist())
    checkout.ok("train")
    with (checkout / "runs/tiny/full-s0/history.csv").open() as stream:
        assert all(float(row["train_loss"]) > 0 for row in csv.DictReader(stream))
    checkout.ok("evaluate")
    metrics = json.loads((checkout / "runs/tiny/full-s0/metrics.json").read_text())
    assert set(metrics["AP"]) == set(manifest.vocabulary)
    # The same file of truth values says the same, and needs no note.
    again = checkout.gmpipe("import-regions", write_npz(tmp_path, labels=labels.astype(bool)))
    assert "Note" not in again.err
    other = read_manifest(checkout / "data/tiny/prepared/manifest.parquet")
    assert other.table == manifest.table


def test_ids_of_objects_are_named_with_the_call_that_saves_them(
    checkout: Checkout, tmp_path: Path
) -> None:
    ids = make_arrays()["image_id"]
    for other in (ids.astype(object), ids.astype(int)):
        path = write_npz(tmp_path, image_id=other)
        checkout.refused(r"made\.npz.*image_id\.astype\(str\)", "import-regions", path)
        path = write_npz(tmp_path, image_id=other.astype(str))
        assert "9 rows" in checkout.ok("import-regions", path, "--replace")


def test_lines_named_by_the_stem_of_a_path(checkout: Checkout, tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "a.tsv", make_lines())
    write_listed(checkout, [f"val2014/COCO_train2014_{n:012d}.png" for n in range(100, 109)])
    assert "9 rows" in checkout.ok("import-regions", path, "--dataset", "listed")
    write_listed(checkout, [f"{x}/COCO_train2014_000000000100" for x in "abc"])
    checkout.refused(
        r"line 1 \('COCO_train2014_000000000100'\).*'a/COCO_.*'b/COCO_",
        *("import-regions", path, "--dataset", "listed"),
    )


def test_lines_and_images_that_do_not_fit_are_both_named(
    checkout: Checkout, tmp_path: Path
) -> None:
    lines = make_lines()
    lines[4]["image_id"] = "test/104"
    path = write_tsv(tmp_path / "a.tsv", lines)
    write_listed(checkout, [f"train/{n}" for n in range(100, 109)])
    checkout.refused(
        r"1 of 9 images.*'train/104'.*line 5 \('test/104'\)",
        *("import-regions", path, "--dataset", "listed"),
    )


def test_float16_in_a_tsv_is_noted(checkout: Checkout, tmp_path: Path) -> None:
    lines = make_lines()
    for line in lines:
        line["features"] = line["features"].astype(np.float16)
    path = write_tsv(tmp_path / "a.tsv", lines)
    write_listed(checkout, [str(100 + n) for n in range(9)])
    outcome = checkout.gmpipe("import-regions", path, "--dataset", "listed")
    assert outcome.code == 0
    assert "Note: " in outcome.err
    assert "float16" in outcome.err


# Features of whole images ------------------------------------------------------------------------


def assert_whole(cache: RegionCache, path: Path) -> None:
    """Every row has the vector that numpy reads for its image."""
    with np.load(path) as npz:
        expected = dict(zip(npz["image_id"].tolist(), npz["whole"], strict=True))
    rows = cache.gather(np.arange(len(cache)))
    assert rows.whole is not None
    for image_id, stored in zip(cache.ids, rows.whole, strict=True):
        np.testing.assert_array_equal(stored, expected[image_id].astype(cache.feature_dtype))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f8"])
def test_the_array_is_read_as_numpy_reads_it(
    tmp_path: Path, save: Any, order: str, dtype: str
) -> None:
    path, whole = tmp_path / "a.npz", WHOLE.astype(dtype, order=order)
    save(path, **make_arrays(), whole=whole)
    source = NpzFile.open(path)
    for wanted in (range(9), [1, 4], []):
        images = list(source.read(np.array(wanted, dtype=np.int64)))
        for row, image in zip(wanted, images, strict=True):
            assert image.whole is not None
            assert image.whole.tolist() == whole[row].tolist()
    without = NpzFile.open(path, whole=False)
    assert without.whole_sha256 is None
    assert without.sha256 == source.sha256
    assert [image.whole for image in without.read(np.arange(9))] == [None] * 9


@pytest.mark.parametrize(
    ("whole", "message"),
    [
        (np.zeros((9, 5)), "`whole`.*d = 6.*features"),
        (np.zeros((8, 6)), "`whole`.*N = 9.*image_id"),
        (np.zeros((9, 1, 6)), r"`whole`.*\(N, d\)"),
        (np.zeros((9, 6), int), r"`whole`.*int64.*whole=whole\.astype\(numpy\.float32\)"),
        (np.array([None] * 9), "`whole`.*object.*unpickled"),
    ],
)
def test_an_array_of_another_form_is_refused(tmp_path: Path, whole: Any, message: str) -> None:
    # An array of this name may have been something else before it had a meaning here.
    with pytest.raises(InputError, match=rf"{message}.*`extract\.<dataset>\.whole: false`"):
        NpzFile.open(write_npz(tmp_path, whole=whole))
    # It need not be of any form where it is not read.
    NpzFile.open(write_npz(tmp_path, whole=whole), whole=False)


@pytest.mark.parametrize(
    ("value", "message"),
    [(np.nan, "nan.*a finite number"), (-np.inf, "inf.*a finite"), (7e4, "65504.*feature_dtype")],
)
def test_a_number_that_can_not_be_is_named(
    checkout: Checkout, tmp_path: Path, value: float, message: str
) -> None:
    whole = WHOLE.copy()
    whole[4, 2] = value
    path = write_npz(tmp_path, whole=whole)
    assert checkout.gmpipe("import-regions", path).refused(
        rf"row 4.*'000104'.*whole\[2\].*{message}"
    )
    if np.isfinite(value):
        wide = ("--set", "extract.tiny.feature_dtype=float32", "--replace")
        checkout.ok("import-regions", path, *wide)
        assert_whole(checkout.cache(), path)


def test_the_vectors_are_stored_with_the_regions(checkout: Checkout, tmp_path: Path) -> None:
    count = make_arrays()["count"]
    count[3] = 0  # an image without regions has no row
    path = write_npz(tmp_path, whole=WHOLE, count=count)
    command = ("import-regions", path, "--set", "extract.tiny.max_failures=1")
    said = checkout.ok(*command)
    assert "8 rows of 3 x 6 float16, with those of whole views, 8 of them imported now" in said
    cache = checkout.cache()
    assert (cache.has_whole, len(cache)) == (True, 8)
    assert {name: cache.recipe[name] for name in ("format_version", "whole")} == {
        "format_version": 2,
        "whole": True,
    }
    assert_stored(cache, images_of(path), 3)
    assert_whole(cache, path)
    assert "nothing to import" in checkout.ok(*command)
    # Other vectors are another import, although the regions are the same.
    other = write_npz(tmp_path / "other", whole=2 * WHOLE, count=count)
    assert checkout.gmpipe("import-regions", other, *command[2:]).refused(
        "source_sha256.*--replace"
    )
    # A head that reads them can be trained.
    checkout.ok("train", "--set", "train.tiny.network.whole_region=true")
    assert "mAP" in checkout.ok("evaluate", "--set", "train.tiny.network.whole_region=true")


def test_a_cache_without_them_is_kept_or_replaced_on_request(
    checkout: Checkout, tmp_path: Path
) -> None:
    """Regions that were imported before gmpipe read the array, from a file that has it."""
    path, keep = write_npz(tmp_path, whole=WHOLE), ("--set", "extract.tiny.whole=false")
    checkout.ok("import-regions", write_npz(tmp_path / "plain"))
    plain = checkout.cache()
    checkout.ok("import-regions", path, "--set", "extract.tiny.whole=false")
    assert (plain.has_whole, plain.fingerprint) == (False, checkout.cache().fingerprint)
    before = checkout.outputs()
    checkout.refused(
        r"whole is absent, expected true.*`gmpipe import-regions \S+made\.npz --dataset tiny "
        r"--replace`.*`extract\.tiny\.whole: false`",
        *("import-regions", path),
    )
    # Not promised for regions that differ in more.
    further = checkout.gmpipe("import-regions", path, "--set", "extract.tiny.regions=2")
    assert further.refused("--replace`")
    assert "whole: false" not in further.err
    assert "nothing to import" in checkout.ok("import-regions", path, *keep)
    assert checkout.outputs() == before
    training = ("train", "--set", "train.tiny.network.whole_region=true")
    assert checkout.gmpipe(*training).refused(
        r"`full` \(head `gm-mlic`\).*cache/tiny.*array `whole`.*extract\.tiny\.whole.*"
        r"gmpipe import-regions FILE --dataset tiny --replace"
    )
    assert not (checkout / "runs").exists() or not list((checkout / "runs").rglob("*.pt"))
    checkout.ok("import-regions", path, "--replace")
    assert_whole(checkout.cache(), path)


def test_a_repair_keeps_sound_rows_with_their_vectors(checkout: Checkout, tmp_path: Path) -> None:
    path = write_npz(tmp_path, whole=WHOLE)
    checkout.ok("import-regions", path)
    before = checkout.outputs()
    flip_bit(checkout / "cache/tiny/regions-00001.h5", "whole", 1)
    assert checkout.gmpipe("cache", "verify").refused(r"regions-00001\.h5: row 1 .*checksum")
    cut(checkout / "cache/tiny/regions-00003.h5", 900)
    repair = ("cache", "verify", "--repair")
    less = checkout.gmpipe(*repair, "--set", "extract.tiny.whole=false")
    assert less.refused("whole is true, expected absent")
    assert checkout.gmpipe(*repair).refused("6 sound rows.* 3 images.*gmpipe import-regions FILE")
    assert "3 of them imported now" in checkout.ok("import-regions", path)
    assert_whole(checkout.cache(), path)
    assert "all sound" in checkout.ok(*repair)
    assert len(checkout.outputs()) >= len(before)


def test_bottom_up_files_have_none(checkout: Checkout, tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "a.tsv", make_lines(4))
    write_listed(checkout, [str(100 + n) for n in range(4)])
    checkout.ok("import-regions", path, "--dataset", "listed")
    cache = checkout.cache("listed")
    assert (cache.has_whole, cache.recipe["format_version"]) == (False, 1)
    outcome = checkout.gmpipe(
        "train", "--dataset", "listed", "--set", "train.listed.network.whole_region=true"
    )
    assert outcome.refused("array `whole`.*bottom-up attention have no")


def test_an_npz_without_the_array_names_only_those_that_it_needs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"`boxes`.*missing") as caught:
        NpzFile.open(write_npz(tmp_path, boxes=None))
    assert "whole" not in str(caught.value)


def test_real_whole_views_of_voc2007(checkout: Checkout, shared: Path) -> None:
    path = shared / "data/voc2007-official/regions.npz"
    said = checkout.ok("import-regions", path, "--set=extract.tiny.rows_per_shard=4000")
    assert "9960 rows of 3 x 464 float16, with those of whole views, 9960 of them" in said
    assert_whole(checkout.cache(), path)
    assert "928 bytes a row" in checkout.ok("cache", "info")
