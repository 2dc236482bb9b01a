"""Rows of `gmpipe predict` for labels that no region says most for."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from flows import Flow
from stand_in_heads import of_head, registered

from pipeline.api import load_run
from pipeline.inference.formats import file_writer, label_rows


def test_scores_that_only_rank_labels_are_said_to_do_so(flow: Flow) -> None:
    """No score of theirs says that a photograph has the label."""
    flow.ok("train", "--set", "train.tiny.loss.name=softmax-squared")
    [run] = (path.name for path in (flow / "runs/tiny").glob("full-s0-*"))
    photograph = str(next((flow / "data/tiny/prepared/images").glob("test-*")))
    explain = ("explain", photograph, "-o", "a.png", "--run")
    said = flow.gmpipe("predict", photograph, "--run", run)
    assert re.search(r"Note: .*`gm-mlic`.*`softmax-squared`.*--threshold 0 --top 3", said.err)
    assert re.search(r"Note: .*`softmax-squared`.*`--label`", flow.gmpipe(*explain, run).err)
    assert "Note" not in flow.gmpipe(*explain, run, "--label", "house").err
    assert "Note" not in flow.gmpipe("predict", photograph, "--run", "full-s0").err


def test_without_a_region_its_columns_are_empty(made: Flow, tmp_path: Path) -> None:
    """The head `whole-wins` takes labels with even numbers from the image as a whole."""
    with registered():
        own = of_head(load_run(made / "runs/tiny/full-s0"), "whole-wins")
    [prediction] = own.predict([np.zeros((40, 50, 3), np.uint8)])
    rows = label_rows(Path("a.png"), prediction, own, 0.5, None)
    of_region = ("region", "left", "top", "right", "bottom", "detector_class", "detector_score")
    for row in rows:
        even = own.vocabulary.index(row["label"]) % 2 == 0
        # A region without a class stands for no detection.
        assert {row[name] is None for name in of_region if name != "detector_class"} == {even}
    stored = {}
    for suffix in ("json", "csv", "parquet"):
        path = tmp_path / f"labels.{suffix}"
        with file_writer(path) as write:
            write(rows)
        stored[suffix] = path
    [image] = json.loads(stored["json"].read_text())
    with stored["csv"].open(newline="") as stream:
        cells = list(csv.DictReader(stream))
    for row, label, cell, kept in zip(
        rows, image["labels"], cells, pq.read_table(stored["parquet"]).to_pylist(), strict=True
    ):
        assert label["region"] == kept["region"] == row["region"]
        if row["region"] is None:
            assert (label["box"], label["detector_class"], label["detector_score"]) == (None,) * 3
            assert {cell[name] for name in of_region} == {""}
            assert {kept[name] for name in of_region} == {None}
        else:
            assert len(label["box"]) == 4
            assert int(cell["region"]) == row["region"]
