"""Scores in CSV, TSV and Parquet: what is read of them, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from scipy.special import logit

from pipeline.entries.averages import average_of
from pipeline.entries.scores import read_scores
from pipeline.errors import DamagedError, InputError, MissingError
from pipeline.evaluation.entries import EntryEvaluation, read_entry, write_entry
from pipeline.evaluation.metrics import evaluate

LABELS = ("dog", "dining table", "été")
IDS = ["000001", "000002", "000010"]
SCORES = np.array([[0.1, 0.9, 0.5], [0.0, 1.0, 0.25], [1e-300, 1 - 1e-16, 0.3]])


def columns(**changes: Any) -> dict[str, Any]:
    """The columns of a table of `SCORES`, with changes."""
    return {"image_id": IDS, **dict(zip(LABELS, SCORES.T, strict=True)), **changes}


def write(path: Path, table: Mapping[str, Any]) -> Path:
    arrays = pa.table(dict(table))
    if path.suffix == ".parquet":
        pq.write_table(arrays, path)
    else:
        mark = "\t" if path.suffix == ".tsv" else ","
        pacsv.write_csv(arrays, path, pacsv.WriteOptions(delimiter=mark))
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_rows_and_columns_may_be_in_any_order(tmp_path: Path, suffix: str) -> None:
    turned = {name: list(reversed(values)) for name, values in reversed(columns().items())}
    turned |= {"note": ["x", "y", "z"]}
    turned = {
        name: ["9" if name == "image_id" else values[0], *values] for name, values in turned.items()
    }
    read = read_scores(write(tmp_path / f"scores{suffix}", turned), LABELS, IDS)
    assert (read.scores == SCORES).all()
    assert len(read.notes) == 2
    assert "1 row" in read.notes[0]
    assert "'note'" in read.notes[1]


def test_ids_of_parquet_may_be_numbers_or_categories(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", columns(image_id=[1, 2, 10]))
    assert (read_scores(path, LABELS, ["1", "2", "10"]).scores == SCORES).all()
    path = write(tmp_path / "b.parquet", columns(image_id=pa.array(IDS).dictionary_encode()))
    assert (read_scores(path, LABELS, IDS).scores == SCORES).all()


def test_probabilities_become_logits(tmp_path: Path) -> None:
    logits = read_scores(
        write(tmp_path / "a.csv", columns()), LABELS, IDS
    ).logits_of_probabilities()
    inside = (SCORES > 0) & (SCORES < 1)
    assert logits[inside] == pytest.approx(logit(SCORES[inside]))
    assert np.isfinite(logits.astype(np.float32)).all()
    assert logits[1, 0] < logits[2, 0]  # 0 is below everything, 1 above it
    assert logits[1, 1] > logits[2, 1]
    assert logits[0, 2] == 0  # so that a label of 0.5 is not predicted


def test_a_constant_score_is_noted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", columns(dog=[0.5] * 3))
    [note] = read_scores(path, LABELS, IDS).notes
    assert "'dog'" in note


@pytest.mark.parametrize(
    ("table", "pattern"),
    [
        ({"image": IDS}, "'image_id', 'dog', 'dining table', 'été'.*'image'"),
        (columns(dog=[0.1, None, 0.2]), "'000002'.*'dog'.*missing"),
        (columns(dog=[0.1, 0.2, float("nan")]), "'000010'.*'dog'.*nan"),
        (columns(dog=[0.1, float("-inf"), 0.2]), "'000002'.*'dog'.*-inf"),
        (columns(dog=[1e300, 0.0, 0.2]), r"'000001'.*'dog'.*1e\+300"),
        (columns(dog=["0.1", "n/a", "0.3"]), "'000002'.*'dog'.*'n/a'"),
        (columns(image_id=["000001", "000001", "000010"]), "'000001'"),
        (columns(image_id=["000001", "2", "000010"]), "'000002'.*'2'"),
        (columns(image_id=["a.jpg", "b.jpg", "c.jpg"]), "3 test images of 3.*'000001', '000002'"),
        (columns(image_id=[0.5, 1.5, 2.5]), "`image_id`.*double"),
    ],
)
def test_what_is_refused(tmp_path: Path, table: Mapping[str, Any], pattern: str) -> None:
    with pytest.raises(InputError, match=re.escape("scores.parquet") + f".*({pattern})"):
        read_scores(write(tmp_path / "scores.parquet", table), LABELS, IDS)


@pytest.mark.parametrize("name", ["Dining Table", "dining_table", "diningtable", " dining table"])
def test_a_label_that_is_written_otherwise_is_suggested(tmp_path: Path, name: str) -> None:
    table = {name if one == "dining table" else one: values for one, values in columns().items()}
    with pytest.raises(InputError, match=f"'dining table'.*Is '{name}' the column"):
        read_scores(write(tmp_path / "a.csv", table), LABELS, IDS)


@pytest.mark.parametrize(
    ("name", "text", "pattern"),
    [
        ("a.csv", "image_id,dog,dog,dining table,été\n000001,1,1,1,1\n", "'dog'"),
        ("a.csv", "image_id;dog\n000001;1\n", "'image_id;dog'"),
        ("a.csv", "image_id,dog\n000001\n", "Expected 2 columns, got 1"),
        ("a.csv", "", "can't be read"),
        ("a.parquet", "image_id,dog\n", "can't be read"),
        ("a.xlsx", "", r"\.csv, \.tsv or \.parquet"),
        ("../absent.csv", "", "absent.csv"),
    ],
)
def test_files_that_are_no_such_table(tmp_path: Path, name: str, text: str, pattern: str) -> None:
    (tmp_path / Path(name).name).write_text(text)
    with pytest.raises(InputError, match=pattern):
        read_scores(tmp_path / name, LABELS, IDS)


def test_scores_that_are_no_probabilities(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", columns(dog=[0.1, 1.5, -3.0]))
    table = read_scores(path, LABELS, IDS)
    with pytest.raises(InputError, match=r"'000002'.*'dog'.*1\.5.*2 scores of 9"):
        table.logits_of_probabilities()


# Averages and metrics.json -----------------------------------------------------------------------


def test_the_average_is_that_of_probabilities() -> None:
    runs = [np.array([[0.0, 60.0, 2.0, 800]], np.float32), np.array([[1.0, 61.0, -2.0, 800]])]
    averaged = average_of(runs)
    mean = [(0.5 + 1 / (1 + np.exp(-1.0))) / 2, 0.5]
    assert averaged[0, [0, 2]] == pytest.approx(logit(mean))
    assert 60 < averaged[0, 1] < 61  # where all probabilities are 1 in floating point
    assert averaged[0, 3] == pytest.approx(800)
    assert average_of([-run for run in runs]) == pytest.approx(-averaged)


def entry(**changes: Any) -> EntryEvaluation:
    metrics = evaluate(SCORES - 0.4, np.eye(3, dtype=np.int8), LABELS)
    record: dict[str, Any] = {
        "name": "other",
        "kind": "logits",
        "made_of": {"a.csv": "s"},
        "dataset": "tiny",
        "split": "drawn/test",
        "images": 3,
        "left_out": 0,
        "commit": None,
        "uncommitted": None,
        "test_sha256": "t",
        "difficult": {"test": "ignored"},
    }
    return EntryEvaluation(metrics, **{**record, **changes})


def test_metrics_json_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    with pytest.raises(MissingError, match=r"metrics\.json"):
        read_entry(path)
    write_entry(path, entry())
    assert read_entry(path) == entry()
    assert entry().sha256 != entry(kind="probabilities").sha256 != entry(made_of={}).sha256
    for changes in (
        {"kind": "model"},
        {"images": "3"},
        {"name": 3},
        {"made_of": {"a.csv": 1}},
        {"difficult": {"test": "x"}},
    ):
        write_entry(path, entry(**changes))
        with pytest.raises(DamagedError, match=r"metrics\.json"):
            read_entry(path)
    write_entry(path, entry())
    path.write_text(path.read_text().replace("other", "others"))
    with pytest.raises(DamagedError, match=r"metrics\.json"):
        read_entry(path)
