"""What difficult labels count as: the truth of a split, and what must not depend on it."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toys import LABELS, make_toy
from trees import make_voc

from pipeline.datasets.difficult import describe_treatments
from pipeline.datasets.listing import listed_manifest
from pipeline.datasets.manifest import (
    COLUMNS,
    Manifest,
    Split,
    full_counts,
    read_manifest,
    write_manifest,
)
from pipeline.datasets.readers.voc import VOCABULARY, read_voc
from pipeline.settings import TREATMENTS, DifficultSettings, Treatment, VocSettings

SPLITS: tuple[Split, ...] = ("train", "val", "test")
COUNTS_AS = {"positive": 1, "negative": 0, "ignored": -1}
PROTOCOLS = [DifficultSettings(train=a, val=b, test=c) for a, b, c in product(TREATMENTS, repeat=3)]
RAW = {
    "train": [[1, -1, 0], [-1, -1, -1], [0, 0, 0]],
    "val": [[-1, 1, 0], [1, 0, 0]],
    "test": [[0, -1, 1], [-1, 0, 0], [0, 1, 0]],
}
"""The labels of each split as the files give them: 1 positive, 0 negative, -1 difficult."""


def make_manifest(difficult: DifficultSettings = PROTOCOLS[0]) -> Manifest:
    rows = [
        {
            "image_id": f"{split}{number}",
            "path": f"{split}{number}.jpg",
            "split": split,
            "labels": [n for n, kind in enumerate(kinds) if kind == 1],
            "ignored": [n for n, kind in enumerate(kinds) if kind == -1],
        }
        for split, images in RAW.items()
        for number, kinds in enumerate(images)
    ]
    table = pa.Table.from_pylist(rows, schema=COLUMNS)
    return Manifest("own", "own", LABELS, {}, full_counts(table), table, (), difficult)


@pytest.mark.parametrize("difficult", PROTOCOLS)
def test_the_truth_of_each_split_follows_its_own_treatment(difficult: DifficultSettings) -> None:
    manifest = make_manifest(difficult)
    for split in SPLITS:
        treatment: Treatment = getattr(difficult, split)
        raw = np.array(RAW[split])
        expected = np.where(raw == -1, COUNTS_AS[treatment], raw)
        np.testing.assert_array_equal(manifest.truth(split), expected)
        assert manifest.treatments[split] == treatment
    assert manifest.difficult_counts == {"train": 4, "val": 1, "test": 2}


@pytest.mark.parametrize("difficult", PROTOCOLS)
def test_images_and_counts_depend_on_no_treatment(difficult: DifficultSettings) -> None:
    """So neither do the regions, which are of images."""
    ignoring, manifest = make_manifest(), make_manifest(difficult)
    assert manifest.table == ignoring.table
    # An image with difficult labels alone is not unlabelled, also where they count as negative.
    assert manifest.counts == ignoring.counts
    assert manifest.counts["train"]["unlabelled"] == 1
    assert [manifest.image_ids(s) for s in SPLITS] == [ignoring.image_ids(s) for s in SPLITS]


def test_a_hash_depends_on_the_treatments_of_its_splits_alone() -> None:
    trained = {p.train_sha256: (p.difficult.train, p.difficult.val) for p in every_protocol()}
    tested = {p.test_sha256: p.difficult.test for p in every_protocol()}
    assert len(trained) == 9
    assert len(tested) == 3
    for one in every_protocol():
        assert trained[one.train_sha256] == (one.difficult.train, one.difficult.val)
        assert tested[one.test_sha256] == one.difficult.test


def every_protocol() -> list[Manifest]:
    return [make_manifest(difficult) for difficult in PROTOCOLS]


@pytest.mark.parametrize("treatment", ["positive", "negative"])
def test_a_treatment_is_what_a_file_with_these_labels_would_be(treatment: Treatment) -> None:
    treated = make_manifest(DifficultSettings(train=treatment, val=treatment, test=treatment))
    rows = treated.table.to_pylist()
    for row in rows:
        difficult, row["ignored"] = row["ignored"], []
        if treatment == "positive":
            row["labels"] = sorted([*row["labels"], *difficult])
    written = replace(treated, table=pa.Table.from_pylist(rows, schema=COLUMNS))
    assert written.train_sha256 == treated.train_sha256
    assert written.test_sha256 == treated.test_sha256
    assert written.treatments == {}


def test_without_difficult_labels_no_treatment_matters(tmp_path: Path) -> None:
    manifest = make_toy(tmp_path).manifest  # one training image has a difficult label
    assert manifest.difficult_counts == {"train": 1}
    assert manifest.treatments == {"train": "ignored"}
    other = replace(manifest, difficult=DifficultSettings(val="positive", test="negative"))
    assert other.train_sha256 == manifest.train_sha256
    assert other.test_sha256 == manifest.test_sha256


@pytest.mark.parametrize("difficult", [PROTOCOLS[0], PROTOCOLS[5]])
def test_a_file_keeps_what_the_source_said(tmp_path: Path, difficult: DifficultSettings) -> None:
    path = tmp_path / "manifest.parquet"
    write_manifest(path, make_manifest(difficult))
    read = read_manifest(path)
    assert read == make_manifest(difficult)
    write_manifest(tmp_path / "again.parquet", read)
    assert (tmp_path / "again.parquet").read_bytes() == path.read_bytes()
    assert replace(read, difficult=PROTOCOLS[0]) == make_manifest()
    # Of the version that releases before this setting wrote and read; they refuse the other one.
    version = 3 if difficult == DifficultSettings() else 4
    assert f'"version":{version}'.encode() in pq.read_schema(path).metadata[b"gmpipe"]
    assert (
        pq.read_table(path)["ignored"].to_pylist() == make_manifest().table["ignored"].to_pylist()
    )


@pytest.mark.parametrize(
    ("treatments", "parts"),
    [
        ({"train": "positive", "test": "ignored"}, ["positive in training", "ignored in testing"]),
        ({"train": "negative", "test": "negative"}, ["negative in training and testing"]),
        (
            {"train": "positive", "val": "ignored", "test": "positive"},
            ["positive in training and testing", "ignored in validation"],
        ),
        ({}, []),
    ],
)
def test_treatments_in_words(treatments: dict[str, str], parts: list[str]) -> None:
    assert sorted(filter(None, describe_treatments(treatments).split(", "))) == sorted(parts)


# VOC's files -------------------------------------------------------------------------------------


def test_both_sources_of_voc_are_treated_alike(tmp_path: Path) -> None:
    make_voc(tmp_path)
    for difficult in PUBLISHED.values():
        annotations, lists = (
            voc_manifest(tmp_path, VocSettings(source="voc", labels=labels, difficult=difficult))
            for labels in ("annotations", "lists")
        )
        for split in ("train", "test"):
            np.testing.assert_array_equal(annotations.truth(split), lists.truth(split))
        # 000012 has a difficult person, 000005 a difficult cat and nothing else.
        assert annotations.truth("train")[1, 14] == COUNTS_AS[difficult.train]
        assert annotations.truth("test")[1, 7] == COUNTS_AS[difficult.test]


def voc_manifest(root: Path, settings: VocSettings) -> Manifest:
    return listed_manifest(read_voc(root, settings), root.name, settings)


PUBLISHED = {
    "ML-GCN": DifficultSettings(train="positive", test="ignored"),
    "CSRA": DifficultSettings(train="negative", test="ignored"),
    "SSGRL": DifficultSettings(train="negative", test="negative"),
    "gmpipe": DifficultSettings(),
}


@pytest.mark.parametrize("method", PUBLISHED)
def test_real_annotations_under_the_published_protocols(shared: Path, method: str) -> None:
    """The labels are read here with regular expressions, without the reader."""
    difficult = PUBLISHED[method]
    root = shared / "data/voc2007-sample"
    manifest = voc_manifest(root, VocSettings(source="voc", difficult=difficult))
    changed = 0
    for split, treatment in (("train", difficult.train), ("test", difficult.test)):
        truth = manifest.truth(split)
        for image_id, row in zip(manifest.image_ids(split), truth.tolist(), strict=True):
            text = (root / f"VOCdevkit/VOC2007/Annotations/{image_id}.xml").read_text()
            marked: dict[str, set[str]] = {}
            for item in text.split("<object>")[1:]:
                found = [re.search(rf"<{tag}>(\w+)<", item) for tag in ("name", "difficult")]
                name, mark = (one[1] if one else "" for one in found)
                marked.setdefault(name, set()).add(mark)
            for name, value in zip(VOCABULARY, row, strict=True):
                only = marked.get(name) == {"1"}
                assert value == (COUNTS_AS[treatment] if only else name in marked)
                changed += only
    assert changed == sum(manifest.difficult_counts.values()) > 20
