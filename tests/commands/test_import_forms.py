"""`gmpipe import-regions` of files in forms that people have: what is read, noted and named."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from region_files import make_arrays, make_lines, write_npz, write_tsv
from test_import_regions import Checkout, make_checkout, write_listed

from pipeline.datasets.manifest import read_manifest


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
