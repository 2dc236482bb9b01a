"""pipeline.datasets.readers.rows: formats of table files, marks between cells, odd rows."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from refusals import refused
from trees import labels_of, read_pets, read_pets_text

from pipeline.errors import InputError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """data/pets/, empty."""
    root = tmp_path / "pets"
    root.mkdir()
    return root


TEXT = "image,split,labels,{0}\na.jpg,train,cat;dog,1\nb.jpg,test,dog,2\n"


@pytest.mark.parametrize("file", ["labels.csv", "labels.tsv"])
@pytest.mark.parametrize(
    ("mark", "other"),
    [(";", '"size (w,h)"'), (";", "size (w,h)"), ("\t", "a,b"), ("\t", "a;b;c;d")],
)
def test_mark_between_cells_is_the_one_of_the_wanted_columns(
    root: Path, file: str, mark: str, other: str
) -> None:
    text = TEXT.replace(";", "|").replace(",", mark).format(other)
    (root / file).write_text(text)
    assert labels_of(read_pets(root, file, separator="|")) == [["cat", "dog"], ["dog"]]


def test_marks_that_are_not_read_are_named(root: Path) -> None:
    with refused(InputError, "labels.csv", "'image'", "`|`", "a comma"):
        read_pets_text(root, TEXT.replace(",", "|"))


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"PK\x03\x04\x14\0\x06\0", ["zip", "CSV UTF-8"]),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", [".xls", "CSV UTF-8"]),
        (gzip.compress(TEXT.encode()), ["gzip", "`gunzip -c labels.csv > labels-plain.csv`"]),
        (b"PAR1\x15\x04\x15\0\n", ["Parquet", "labels.parquet"]),
    ],
)
def test_other_formats_are_named(root: Path, content: bytes, parts: list[str]) -> None:
    (root / "labels.csv").write_bytes(content)
    with refused(InputError, "labels.csv", *parts):
        read_pets(root)


def test_text_named_parquet(root: Path) -> None:
    (root / "labels.parquet").write_text(TEXT)
    with refused(InputError, "labels.parquet", "'imag'", "labels.csv"):
        read_pets(root, "labels.parquet")


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        (["a.jpg,train,cat,,", "b.jpg,test,dog,,"], ["5 cells", "ends of the lines"]),
        (["x,a.jpg,train,cat", "y,b.jpg,test,dog"], ["4 cells", "`row.names = FALSE`"]),
        (["a.jpg,train,cat,dog", "b.jpg,test,dog"], ["4 cells", "double quotes"]),
        (["a.jpg,train", "b.jpg,test,dog"], ["2 cells", "all marks"]),
    ],
)
def test_rows_of_another_length(root: Path, rows: list[str], parts: list[str]) -> None:
    with refused(InputError, "labels.csv, line 2", "expected 3", *parts):
        read_pets_text(root, "\n".join(["image,split,labels", *rows, ""]))


def test_rows_of_blanks_are_skipped(root: Path) -> None:
    text = "image,split,labels\na.jpg,train,cat\n,,\n , ,\nb.jpg,test,dog\n,,\n"
    assert labels_of(read_pets_text(root, text)) == [["cat"], ["dog"]]


@pytest.mark.parametrize("name", ["tables", "camels", "cables", "bagels"])
def test_column_of_0_and_1_whose_name_is_like_labels(root: Path, name: str) -> None:
    listing = read_pets_text(root, f"image,split,{name},cat\na.jpg,train,1,0\nb.jpg,test,1,1\n")
    assert labels_of(listing) == [[name], [name, "cat"]]
