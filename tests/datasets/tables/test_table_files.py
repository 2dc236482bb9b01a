"""pipeline.datasets.readers.rows: formats of table files, marks between cells, odd rows."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from refusals import refused
from trees import labels_of, read_pets, read_pets_text, write_pets_parquet

from pipeline.datasets.listing import listed_manifest
from pipeline.errors import InputError
from pipeline.settings import TableSettings


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
        (
            gzip.compress(TEXT.encode(), mtime=0),
            ["gzip", "`gunzip -c labels.csv > labels-plain.csv`"],
        ),
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


@pytest.mark.parametrize(
    ("labels", "read"),
    [
        ([1, 20], [["1"], ["20"]]),
        ([[1, 3], []], [["1", "3"], []]),
        ([1.0, None], [["1"], []]),
        ([[1.0, 3.0], None], [["1", "3"], []]),
    ],
)
def test_numbers_of_classes_in_parquet(
    root: Path, labels: list[object], read: list[list[str]]
) -> None:
    write_pets_parquet(root, {"image": [7, 8], "split": ["train", "test"], "labels": labels})
    listing = read_pets(root, "labels.parquet")
    assert labels_of(listing) == read
    assert listing.table["path"].to_pylist() == ["7", "8"]
    assert any("'1'" in note for note in listing.notes)


def test_plain_forms_of_splits_are_read_and_noted(root: Path) -> None:
    words = ["Train", "training", " train", "TEST", "testing", "Validation", "valid", "val"]
    rows = "".join(f"{row}.jpg,cat,{word}\n" for row, word in enumerate(words))
    listing = read_pets_text(root, f"image,labels,split\n{rows}")
    expected = ["train"] * 3 + ["test"] * 2 + ["val"] * 3
    assert listing.table["split"].to_pylist() == expected
    [note] = listing.notes
    for part in ("'split'", "'TEST' is read as 'test'", "'valid' is read as 'val'"):
        assert part in note


def test_split_under_another_name_is_suggested(root: Path) -> None:
    with refused(InputError, "`prepare.pets.split: subset`", "by themselves"):
        read_pets_text(root, "image,cat,dog,subset\na.jpg,1,0,Train\nb.jpg,0,1,test\n")


def test_table_without_a_test_image(root: Path) -> None:
    listing = read_pets_text(root, "image,labels,split\na.jpg,cat,train\nb.jpg,cat,val\n")
    settings = TableSettings.model_validate({"source": "table"})
    with refused(InputError, "'test'", "'train', 'val'", "`prepare.pets.test_share: 0.2`"):
        listed_manifest(listing, "pets", settings)


def test_blanks_around_a_path_are_removed(root: Path) -> None:
    text = 'image,labels,split\n a.jpg ,cat,train\n"b.jpg\n",cat,test\n'
    listing = read_pets_text(root, text)
    assert listing.table["path"].to_pylist() == ["a.jpg", "b.jpg"]
    [note] = listing.notes
    for part in ("rows: 2", "labels.csv, line 2", "' a.jpg '"):
        assert part in note


def test_path_of_the_whole_disk(root: Path) -> None:
    (root / "photos").mkdir()
    (root / "photos" / "a.jpg").touch()
    text = f"image,labels,split\n{root}/photos/a.jpg,cat,train\nb.jpg,cat,test\n"
    with refused(InputError, "line 2", f"Remove '{root}/photos/'"):
        read_pets_text(root, text, images="photos")
    with refused(InputError, "line 2", f"Remove '{root}/'"):
        read_pets_text(root, text)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"images": "/home/x"}, "`prepare.pets.images: photos`"),
        ({"images": "C:\\photos"}, "`prepare.pets.images: photos`"),
        ({"images": ".\\"}, "`prepare.pets.images: photos`"),
        ({"images": "../x"}, "`prepare.pets.images: photos`"),
        ({"vocabulary": ["cat", "dog", "cat "]}, "`prepare.pets.vocabulary`"),
    ],
)
def test_settings_are_not_taken_for_mistakes_in_the_table(
    root: Path, settings: dict[str, object], part: str
) -> None:
    with refused(InputError, "params.yaml", part):
        read_pets_text(root, "image,labels,split\na.jpg,cat,train\n", **settings)


def test_rows_of_blanks_are_skipped(root: Path) -> None:
    text = "image,split,labels\na.jpg,train,cat\n,,\n , ,\nb.jpg,test,dog\n,,\n"
    assert labels_of(read_pets_text(root, text)) == [["cat"], ["dog"]]


@pytest.mark.parametrize("name", ["tables", "camels", "cables", "bagels"])
def test_column_of_0_and_1_whose_name_is_like_labels(root: Path, name: str) -> None:
    listing = read_pets_text(root, f"image,split,{name},cat\na.jpg,train,1,0\nb.jpg,test,1,1\n")
    assert labels_of(listing) == [[name], [name, "cat"]]
