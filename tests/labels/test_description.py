"""What `gmpipe labels` prints: where each vector comes from, and the nearest other labels."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from flows import ROOT
from vector_files import SMALL, write_glove

from pipeline.datasets.manifest import COLUMNS, Manifest, full_counts, write_manifest
from pipeline.errors import MissingError
from pipeline.labels.description import describe_vectors
from pipeline.labels.vectors import LabelVectors, load_label_vectors
from stages.cli.main import cli


def cells(table: str) -> list[list[str]]:
    """The rows of a Markdown table without its rule."""
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]
    return [rows[0], *rows[2:]]


def test_nearest_other_labels_by_cosine() -> None:
    vectors = np.array([[1, 0], [3, 4], [0, -2], [4, 3], [-1, 0]], dtype=np.float32)
    described = describe_vectors(
        LabelVectors(("a", "b c", "d", "e", "f"), vectors, "v.npz", ("A", "b + c", "d", "e", "f"))
    )
    table, yardstick, line = described.split("\n\n")
    # Cosines: a with b c 3/5, d 0, e 4/5, f -1; b c with d -4/5, e 24/25, f -3/5; d with e -3/5,
    # f 0; e with f -4/5. Sorted: -1 -.8 -.8 -.6 -.6 0 0 .6 .8 .96.
    assert cells(table)[1:] == [
        ["a", "A", "e 0.80, b c 0.60, d 0.00"],
        ["b c", "b + c", "e 0.96, a 0.60, f -0.60"],
        ["d", "d", "a 0.00, f 0.00, e -0.60"],
        ["e", "e", "b c 0.96, a 0.80, d -0.60"],
        ["f", "f", "d 0.00, b c -0.60, e -0.80"],
    ]
    for part in ("10 pairs", "-0.30", "0.89"):  # the quantile is 0.8 + 0.55 * 0.16
        assert part in yardstick
    sha256 = LabelVectors(("a", "b c", "d", "e", "f"), vectors, "").sha256
    for part in ("5 labels", "size 2", "v.npz", sha256):
        assert part in line


def test_one_label_has_no_nearest_label_and_two_have_no_yardstick() -> None:
    single = LabelVectors(("a",), np.ones((1, 2), dtype=np.float32), "v.npz", ("a",))
    table, _ = describe_vectors(single).split("\n\n")
    assert cells(table)[1:] == [["a", "a", "-"]]
    both = np.array([[1, 0], [0, 1]], dtype=np.float32)
    table, _ = describe_vectors(LabelVectors(("a", "b"), both, "v.npz", ("a", "b"))).split("\n\n")
    assert cells(table)[1:] == [["a", "a", "b 0.00"], ["b", "b", "a 0.00"]]


def test_command_reads_manifest_and_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    rows = [
        {"image_id": split, "path": f"{split}.png", "split": split, "labels": [0], "ignored": []}
        for split in ("train", "test")
    ]
    table = pa.Table.from_pylist(rows, schema=COLUMNS)
    manifest = Manifest("demo", "own", ("traffic light", "sun"), {}, full_counts(table), table)
    write_manifest(tmp_path / "data" / "demo" / "prepared" / "manifest.parquet", manifest)
    write_glove(tmp_path / "g.txt", SMALL)

    ran = CliRunner().invoke(
        cli, ["labels", "--dataset", "demo", "--set", "train.demo.label_vectors=g.txt"]
    )
    assert (ran.exit_code, ran.stderr) == (0, "")
    loaded = load_label_vectors(["traffic light", "sun"], "g.txt")
    assert ran.stdout == describe_vectors(loaded) + "\n"
    offline = CliRunner().invoke(cli, ["labels"])
    assert " traffic + light " in offline.stdout
    assert "▁" not in offline.stdout
    assert "256" in offline.stdout
    assert "wordllama" in offline.stdout
    absent = CliRunner().invoke(cli, ["labels", "--set", "train.demo.label_vectors=h.txt"])
    assert isinstance(absent.exception, MissingError)
    assert "h.txt" in str(absent.exception)
