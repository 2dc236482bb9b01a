"""pipeline.datasets.readers.table: valid tables in both formats, and the split by a share."""

from __future__ import annotations

import csv
import hashlib
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from refusals import refused
from trees import PETS, read_pets, read_pets_text, write_pets_parquet

from pipeline.datasets.listing import Listing, make_manifest
from pipeline.datasets.manifest import COLUMNS
from pipeline.datasets.readers import rows as module
from pipeline.datasets.readers.table import read_table
from pipeline.errors import InputError
from pipeline.settings import TableSettings

Row = tuple[str, list[str], str]
"""An image's path, its labels and its split."""


def named(listing: Listing) -> list[Row]:
    """The rows of a listing, with the names of their labels."""
    return [
        (row["path"], [listing.vocabulary[label] for label in row["labels"]], row["split"])
        for row in listing.table.to_pylist()
    ]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """data/pets/, empty."""
    root = tmp_path / "pets"
    root.mkdir()
    return root


# --- columns, labels and paths -------------------------------------------------------------------


def test_table_is_listed_row_by_row(root: Path) -> None:
    listing = read_pets_text(root, PETS)
    assert listing.vocabulary == ("cat", "dog")
    assert listing.split_name == "own"
    assert listing.sources == {"labels.csv": hashlib.sha256(PETS.encode()).hexdigest()}
    assert listing.boxes is None
    assert listing.table.schema == COLUMNS
    unsized = {"ignored": [], "width": None, "height": None}
    assert listing.table.to_pylist() == [
        {"image_id": path, "path": path, "split": split, "labels": labels, **unsized}
        for path, split, labels in [
            ("a.jpg", "train", [0, 1]),
            ("deep/b.jpg", "train", []),
            ("c.jpg", "test", [1]),
        ]
    ]


def test_listing_becomes_a_manifest(root: Path) -> None:
    read_pets_text(root, PETS)
    (root / "deep").mkdir()
    for name in ("a.jpg", "deep/b.jpg", "c.jpg"):
        (root / name).touch()
    settings = TableSettings(source="table")
    manifest, missing = make_manifest(read_table(root, settings), "pets", root, settings)
    assert manifest.image_ids("train") == ["a.jpg", "deep/b.jpg"]
    assert manifest.truth("train").tolist() == [[1, 1], [0, 0]]
    assert manifest.truth("test").tolist() == [[0, 1]]
    assert manifest.counts["train"]["unlabelled"] == 1
    assert missing.num_rows == 0


def test_settings_name_columns_separator_vocabulary_and_split(root: Path) -> None:
    text = "note,what,where,part\nx,dog | cat,a.jpg,train\ny,cat,b.jpg,test\n"
    listing = read_pets_text(
        root,
        text,
        image="where",
        labels="what",
        split="part",
        separator="|",
        vocabulary=["fish", "dog", "cat"],
        split_name="mine",
    )
    assert listing.vocabulary == ("fish", "dog", "cat")
    assert listing.split_name == "mine"
    assert listing.table.column("labels").to_pylist() == [[1, 2], [2]]


@pytest.mark.parametrize("images", [".", "photos", "photos/", "./photos", "deep/er"])
def test_paths_are_relative_to_the_image_folder(root: Path, images: str) -> None:
    plain, listing = (
        read_pets_text(root, PETS).table,
        read_pets_text(root, PETS, images=images).table,
    )
    folder = Path(images).as_posix()
    assert listing.column("image_id") == plain.column("image_id")
    assert listing.column("path").to_pylist() == [
        (Path(folder) / path).as_posix() for path in plain.column("path").to_pylist()
    ]


@pytest.mark.parametrize(
    ("cell", "labels"),
    [
        ("cat", ["cat"]),
        (" cat ;\tdog ", ["cat", "dog"]),
        ("dog;cat;dog; cat", ["cat", "dog"]),
        ("", []),
        ("   ", []),
        ('big cat;Öre;5" nail', ['5" nail', "big cat", "Öre"]),
        ("null;NA", ["NA", "null"]),
    ],
)
def test_cell_is_a_set_of_labels(root: Path, cell: str, labels: list[str]) -> None:
    quoted = '"' + cell.replace('"', '""') + '"'
    listing = read_pets_text(root, f"image,labels,split\na.jpg,{quoted},train\nb.jpg,zebra,test\n")
    assert named(listing)[0] == ("a.jpg", labels, "train")


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff" + PETS,
        PETS.replace("\n", "\r\n"),
        PETS.removesuffix("\n"),
        "\n" + PETS.replace("\n", "\n\n"),
        PETS.replace("a.jpg", '"a.jpg"').replace("train", '"train"'),
        PETS.replace("a.jpg", "./a.jpg").replace("c.jpg", "././c.jpg"),
    ],
)
def test_equivalent_spellings_of_a_table(root: Path, text: str) -> None:
    expected = read_pets_text(root, PETS).table
    assert read_pets_text(root, text).table == expected


def test_cells_may_hold_commas_quotes_and_line_breaks(root: Path) -> None:
    text = 'note,image,labels,split\n"two\nlines","a,""b"".jpg",cat,train\n,c.jpg,cat,test\n'
    assert named(read_pets_text(root, text))[0] == ('a,"b".jpg', ["cat"], "train")


# --- round trips ---------------------------------------------------------------------------------

# Brackets make lists of cells, some words are for empty ones, and all text is read as NFC.
EMPTY_WORDS = ("none", "nan", "<na>", "nat", "null", "#n/a")
words = st.text(
    st.characters(exclude_categories=["C", "Z"], exclude_characters=";[]{}()"), min_size=1
).map(lambda text: unicodedata.normalize("NFC", text))
words = words.filter(lambda word: word.lower() not in EMPTY_WORDS)
names = words.filter(lambda word: not {"/", "\\"} & set(word) and word.strip("."))
rows_of_tables = st.lists(
    st.tuples(names, st.lists(words, max_size=4), st.sampled_from(["train", "test"])),
    min_size=1,
    max_size=8,
    unique_by=lambda row: row[0],
).filter(lambda rows: any(labels for _, labels, _ in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pets")


@given(rows=rows_of_tables, crlf=st.booleans(), bom=st.booleans(), quoting=st.sampled_from([0, 1]))
@hypothesis_settings(max_examples=40)
def test_csv_round_trip(folder: Path, rows: list[Row], crlf: bool, bom: bool, quoting: int) -> None:
    encoding = "utf-8-sig" if bom else "utf-8"
    with (folder / "labels.csv").open("w", encoding=encoding, newline="") as stream:
        writer = csv.writer(
            stream,
            lineterminator="\r\n" if crlf else "\n",
            quoting=(csv.QUOTE_MINIMAL, csv.QUOTE_ALL)[quoting],
        )
        writer.writerow(["image", "labels", "split"])
        writer.writerows([path, ";".join(labels), split] for path, labels, split in rows)
    assert_rows(read_pets(folder), rows)


@given(rows=rows_of_tables, form=st.sampled_from(["text", "lists", "large", "dictionary"]))
@hypothesis_settings(max_examples=40)
def test_parquet_round_trip(folder: Path, rows: list[Row], form: str) -> None:
    paths, labels, splits = zip(*rows, strict=True)
    joined = [";".join(row) if row else None for row in labels]
    text = pa.large_string() if form == "large" else pa.string()
    cells = {
        "text": pa.array(joined, pa.string()),
        "lists": pa.array(labels, pa.list_(pa.string())),
        "large": pa.array(labels, pa.large_list(pa.large_string())),
        "dictionary": pa.array(joined, pa.string()).dictionary_encode(),
    }
    split = pa.array(splits, text)
    write_pets_parquet(
        folder,
        {
            "image": pa.array(paths, text),
            "labels": cells[form],
            "split": split.dictionary_encode() if form == "dictionary" else split,
            "more": [b"bytes"] * len(rows),
        },
    )
    assert_rows(read_pets(folder, "labels.parquet"), rows)


def assert_rows(listing: Listing, rows: list[Row]) -> None:
    assert listing.vocabulary == tuple(sorted({label for _, labels, _ in rows for label in labels}))
    assert named(listing) == [(path, sorted(set(labels)), split) for path, labels, split in rows]
    assert listing.table.column("image_id").to_pylist() == [path for path, _, _ in rows]


def test_table_of_several_batches(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CSV_BATCH", 64)
    count = 3 * 64 + 3
    lines = [
        f"{row}.jpg,{'odd' if row % 2 else 'even'},{'test' if row % 5 else 'train'}"
        for row in range(count)
    ]
    listing = read_pets_text(root, "\n".join(["image,labels,split", *lines]))
    expected = [(f"{row}.jpg", [row % 2], "test" if row % 5 else "train") for row in range(count)]
    columns = (listing.table.column(name).to_pylist() for name in ("path", "labels", "split"))
    assert list(zip(*columns, strict=True)) == expected
    lines[-1] = "0.jpg,odd,test"
    with refused(InputError, f"labels.csv, line {count + 1}", "'0.jpg'", "labels.csv, line 2"):
        read_pets_text(root, "\n".join(["image,labels,split", *lines]))


# --- tables without a split ----------------------------------------------------------------------


def unsplit(paths: Sequence[str]) -> str:
    """A table without the column `split`."""
    return "".join(["image,labels\n", *(f"{path},cat\n" for path in paths)])


def splits_by_path(listing: Listing) -> dict[str, str]:
    return {path: split for path, _, split in named(listing)}


PATHS = [f"photos/{number}.jpg" for number in range(400)]


def test_share_is_taken_by_a_hash_of_the_paths(root: Path) -> None:
    splits = splits_by_path(read_pets_text(root, unsplit(PATHS), test_share=0.2))
    tests = [path for path, split in splits.items() if split == "test"]
    assert 60 <= len(tests) <= 100  # 80, with a standard deviation of 8
    # So that others can make the same split: the first bytes of sha256 as a fraction.
    expected = [
        path
        for path in PATHS
        if int(hashlib.sha256(path.encode()).hexdigest()[:16], 16) < 0.2 * 2**64
    ]
    assert tests == expected


def test_image_keeps_its_split_when_others_are_added(root: Path) -> None:
    everything = splits_by_path(read_pets_text(root, unsplit(PATHS), test_share=0.2))
    fewer = splits_by_path(read_pets_text(root, unsplit(PATHS[::-3]), test_share=0.2))
    assert fewer.items() <= everything.items()
    dotted = unsplit([f"./{path}" for path in PATHS])
    assert splits_by_path(read_pets_text(root, dotted, test_share=0.2)) == everything
    larger = splits_by_path(read_pets_text(root, unsplit(PATHS), test_share=0.3))
    assert {path for path, split in everything.items() if split == "test"} < {
        path for path, split in larger.items() if split == "test"
    }


def test_image_folder_does_not_change_the_split(root: Path) -> None:
    text = unsplit(PATHS)
    plain = read_pets_text(root, text, test_share=0.2).table
    moved = read_pets_text(root, text, test_share=0.2, images="more").table
    assert moved.column("split") == plain.column("split")


def test_parquet_is_split_like_csv(root: Path) -> None:
    expected = splits_by_path(read_pets_text(root, unsplit(PATHS), test_share=0.5))
    write_pets_parquet(root, {"image": PATHS, "labels": ["cat"] * len(PATHS)})
    assert splits_by_path(read_pets(root, "labels.parquet", test_share=0.5)) == expected


@pytest.mark.parametrize("share", [0, 1, -0.1, 20])
def test_share_is_a_fraction(share: float) -> None:
    with pytest.raises(ValueError, match="test_share"):
        TableSettings(source="table", test_share=share)


def test_share_contradicts_a_column_split(root: Path) -> None:
    with refused(InputError, "/labels.csv", "'split'", "`prepare.pets.test_share`", "params.yaml"):
        read_pets_text(root, PETS, test_share=0.2)
    assert len(splits_by_path(read_pets_text(root, PETS, test_share=0.4, split="fold"))) == 3


@pytest.mark.parametrize(("share", "tests"), [(0.0001, 0), (0.9999, 400)])
def test_share_that_leaves_a_split_empty(root: Path, share: float, tests: int) -> None:
    parts = [f"`test_share: {share}`", f"{tests} of 400", "'split'", "`train`", "`test`"]
    with refused(InputError, "/labels.csv", *parts):
        read_pets_text(root, unsplit(PATHS), test_share=share)
