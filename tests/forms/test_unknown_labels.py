"""Tables with a column for each label, in the codings that people use, some of it unknown."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from brought import make_brought
from refusals import refused
from region_files import make_lines, write_tsv
from sklearn.metrics import average_precision_score
from trees import draw_image, labels_of, read_pets_text

from pipeline.datasets.listing import Listing, is_current, make_manifest
from pipeline.datasets.manifest import read_manifest
from pipeline.datasets.readers.table import read_table
from pipeline.errors import InputError
from pipeline.settings import TableSettings


def unknown_of(listing: Listing) -> list[list[str]]:
    """The unknown labels of each row."""
    rows = listing.table.column("ignored").to_pylist()
    return [[listing.vocabulary[number] for number in row] for row in rows]


@pytest.mark.parametrize(
    ("mark", "setting"),
    [
        ("", ""),
        ("?", "?"),
        ("-1", -1),
        ("-1.0", -1),
        ("-1", [-1.0, "?"]),
        ("Unknown", ["", "unknown"]),
        ("nan", "NaN"),
    ],
)
@pytest.mark.parametrize("listed", [True, False])
def test_a_mark_is_neither_positive_nor_negative(
    tmp_path: Path, mark: str, setting: Any, listed: bool
) -> None:
    text = f"image,sofa,cat,split\na.jpg,1,{mark},train\nb.jpg,{mark},{mark},test\nc.jpg,0,1,test\n"
    labels = {"labels": ["sofa", "cat"]} if listed else {}
    listing = read_pets_text(tmp_path, text, unknown=setting, **labels)
    assert labels_of(listing) == [["sofa"], [], ["cat"]]
    assert unknown_of(listing) == [["cat"], ["sofa", "cat"], []]


def test_the_default_leaves_manifests_current_that_were_made_before(tmp_path: Path) -> None:
    read_pets_text(tmp_path, "image,labels,split\na.jpg,cat,train\nb.jpg,,test\n")
    for name in "ab":
        draw_image(tmp_path / f"{name}.jpg")
    settings = TableSettings(source="table")
    manifest, _ = make_manifest(read_table(tmp_path, settings), "pets", tmp_path, settings)
    before = {"version": 3, **settings.model_dump(exclude={"unknown"})}
    text = json.dumps(before, sort_keys=True, separators=(",", ":"))
    assert manifest.sources["settings"] == hashlib.sha256(text.encode()).hexdigest()
    assert not is_current(manifest, [], tmp_path, TableSettings(source="table", unknown=["?"]))


def test_without_the_setting_the_message_names_it(tmp_path: Path) -> None:
    text = "image,cat,dog,split\na.jpg,1,0,train\nb.jpg,?,1,test\n"
    with refused(InputError, "labels.csv, line 3", "'?'", '`unknown: ["?"]`'):
        read_pets_text(tmp_path, text, labels=["cat", "dog"])
    text = text.replace("?", "")
    with refused(InputError, "labels.csv, line 3", "empty", '`unknown: [""]`'):
        read_pets_text(tmp_path, text, labels=["cat", "dog"])


def test_a_column_of_marks_alone_is_no_label(tmp_path: Path) -> None:
    text = "image,cat,dog,remark,split\na.jpg,1,0,,train\nb.jpg,0,1,,test\n"
    with refused(InputError, "'cat', 'dog'", "'remark'", "`unknown`", ": [cat, dog]`"):
        read_pets_text(tmp_path, text, unknown="")


def test_marks_that_can_not_be(tmp_path: Path) -> None:
    flags = "image,cat,dog,split\na.jpg,1,0,train\nb.jpg,0,1,test\n"
    with refused(InputError, "prepare.", ".unknown", "'0.0'", "read as 0"):
        read_pets_text(tmp_path, flags, unknown=["?", "0.0"])
    names = "image,labels,split\na.jpg,cat,train\nb.jpg,?,test\n"
    with refused(InputError, "unknown", "'labels'"):
        read_pets_text(tmp_path, names, unknown="?")
    with pytest.raises(ValueError, match="unknown"):
        TableSettings.model_validate({"source": "table", "unknown": [True]})


CODINGS = {
    "digits": ("1", "0", "-1", -1),
    "words": ("True", "False", "", ""),
    "decimals": ("1.0", "0.0", "-1.0", -1),
    "yes and no": ("yes", "no", "unknown", "unknown"),
}


@pytest.mark.parametrize("coding", CODINGS)
def test_the_real_table_of_nuswide(shared: Path, tmp_path: Path, coding: str) -> None:
    """Lines of the published list as a CSV with a column for each concept; some are unknown."""
    yes, no, mark, setting = CODINGS[coding]
    names = (shared / "data/nuswide-lists/Concepts81.txt").read_text().split()
    truth, paths = nuswide_lines(shared / "data/nuswide-lists/multi_hot_test.txt.gz", 400)
    hidden = np.random.default_rng(0).random(truth.shape) < 0.05
    words = np.where(truth == 1, yes, no).astype(object)
    words[hidden] = mark
    with (tmp_path / "labels.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", *names, "split"])
        for number, (path, row) in enumerate(zip(paths, words, strict=True)):
            writer.writerow([path, *row, "test" if number % 2 else "train"])
    check_nuswide(
        read_table(tmp_path, TableSettings.model_validate({"source": "table", "unknown": setting})),
        (names, truth, hidden),
    )


def test_parquet_with_nulls_as_pandas_writes_it(shared: Path, tmp_path: Path) -> None:
    names = (shared / "data/nuswide-lists/Concepts81.txt").read_text().split()
    truth, paths = nuswide_lines(shared / "data/nuswide-lists/multi_hot_test.txt.gz", 400)
    hidden = np.random.default_rng(0).random(truth.shape) < 0.05
    columns = {
        name: pa.array(truth[:, n].astype(float), mask=hidden[:, n]) for n, name in enumerate(names)
    }
    split = ["test" if number % 2 else "train" for number in range(len(paths))]
    pq.write_table(pa.table({"image": paths, **columns, "split": split}), tmp_path / "x.parquet")
    settings = {"source": "table", "file": "x.parquet", "unknown": ""}
    check_nuswide(
        read_table(tmp_path, TableSettings.model_validate(settings)), (names, truth, hidden)
    )


def nuswide_lines(path: Path, count: int) -> tuple[np.ndarray, list[str]]:
    """The labels (N, 81) and the paths in the first lines of a multi-hot list."""
    with gzip.open(path, "rt") as stream:
        lines = [next(stream).split() for _ in range(count)]
    return np.array([line[1:] for line in lines], dtype=int), [line[0][2:] for line in lines]


def check_nuswide(listing: Listing, expected: tuple[Sequence[str], np.ndarray, np.ndarray]) -> None:
    names, truth, hidden = expected
    assert listing.vocabulary == tuple(names)
    rows = listing.table.to_pylist()
    assert [row["labels"] for row in rows] == [
        np.flatnonzero(own & ~gone).tolist() for own, gone in zip(truth == 1, hidden, strict=True)
    ]
    assert [row["ignored"] for row in rows] == [np.flatnonzero(gone).tolist() for gone in hidden]


def test_unknown_labels_are_in_the_manifest_and_change_what_is_current(tmp_path: Path) -> None:
    flow = make_brought(tmp_path / "checkout")
    root = flow / "data/listed"
    for number, name in enumerate("abc"):
        draw_image(root / f"{name}.jpg", number)
    (root / "labels.csv").write_text(
        "image,cat,dog,split\na.jpg,1,0,train\nb.jpg,0,1,train\nc.jpg,1,?,test\n"
    )
    assert flow.gmpipe("prepare", "--dataset", "listed").refused("'dog'.*unknown")
    known = ("prepare", "--dataset", "listed", "--set", 'prepare.listed.unknown="?"')
    flow.ok(*known)
    assert "unchanged" in flow.ok(*known)
    rows = read_manifest(root / "prepared/manifest.parquet").table.to_pylist()
    assert [(row["labels"], row["ignored"]) for row in rows] == [([0], []), ([1], []), ([0], [1])]
    assert flow.gmpipe("prepare", "--dataset", "listed").refused("'dog'.*unknown")


@pytest.mark.slow
def test_unknown_labels_are_left_out_of_metrics_and_have_no_loss(tmp_path: Path) -> None:
    flow = make_brought(tmp_path / "checkout")
    root = flow / "data/listed"
    lines = make_lines(24)
    words = np.random.default_rng(3).choice(["1", "0", "?"], (24, 2), p=[0.4, 0.4, 0.2])
    text = "image,cat,dog,split\n"
    for number, line in enumerate(lines):
        path = f"{line['image_id']}.jpg"
        draw_image(root / path, number)
        split = "test" if number % 2 else "train"
        text += f"{path},{words[number, 0]},{words[number, 1]},{split}\n"
    (root / "labels.csv").write_text(text)
    write_tsv(flow / "a.tsv", lines)
    options = ("--dataset", "listed", "--set", 'prepare.listed.unknown="?"')
    flow.ok("prepare", *options)
    flow.ok("import-regions", "a.tsv", *options)
    flow.ok("train", *options)
    flow.ok("evaluate", *options)
    run = flow / "runs/listed/full-s0"
    found = json.loads((run / "metrics.json").read_text())["AP"]
    logits = np.array(pq.read_table(run / "predictions.parquet")["logits"].to_pylist())
    for label, own, scores in zip(("cat", "dog"), words[1::2].T, logits.T, strict=True):
        known = own != "?"
        assert not known.all()
        expected = 100 * average_precision_score(own[known] == "1", scores[known])
        assert found[label] == pytest.approx(expected)
