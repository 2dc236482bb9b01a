"""pipeline.datasets.readers.table: what is wrong with a table is named, with its row or column."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from refusals import refused
from trees import PETS, read_pets, read_pets_text, write_pets_parquet

from pipeline.datasets.listing import listed_manifest
from pipeline.errors import GmpipeError, InputError, MissingError
from pipeline.settings import TableSettings


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """data/pets/, empty."""
    root = tmp_path / "pets"
    root.mkdir()
    return root


# --- errors in a row -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        (",cat,train", ["image", "''"]),
        ("/b.jpg,cat,train", ["'/b.jpg'"]),
        ("../b.jpg,cat,train", ["'../b.jpg'"]),
        ("x/../b.jpg,cat,train", ["'x/../b.jpg'"]),
        ("x/..,cat,train", ["'x/..'"]),
        ("x/./b.jpg,cat,train", ["'x/./b.jpg'"]),
        ("x//b.jpg,cat,train", ["'x//b.jpg'"]),
        ("x/,cat,train", ["'x/'"]),
        ("photos\\b.jpg,cat,train", ["Write 'photos/b.jpg'"]),
        (".,cat,train", ["'.'"]),
        ("x\\b.jpg,cat,train", [r"'x\\b.jpg'"]),
        ("b\0.jpg,cat,train", [r"'b\x00.jpg'"]),
        ('"b\n.jpg",cat,train', [r"'b\n.jpg'"]),
        ("a.jpg,cat,test", ["'a.jpg'", "labels.csv, line 2", "'train'", "'test'", "'split'"]),
        ("a.jpg,cat;dog,train", ["'a.jpg'", "labels.csv, line 2", "one row", "';'"]),
        ("./a.jpg,,train", ["'a.jpg'", "labels.csv, line 2", "one row", "';'"]),
        ("b.jpg,\"['cat', 'dog'\",train", ["['cat', 'dog'", "quotes", "commas"]),
        ('b.jpg,"[""cat"" ""dog"", ""cow""]",train', ['["cat" "dog", "cow"]', "quotes"]),
        ('b.jpg,"{""a"": ""x""}",train', ["'a'", "choices"]),
        ('b.jpg,"[0, 1, 0]",train', ["[0, 1, 0]", "column per label"]),
        ("b.jpg,cat,dev", ["'dev'", "'train', 'val' or 'test'"]),
        ("b.jpg,cat,", ["split is ''", "'train', 'val' or 'test'"]),
        ("b.jpg,cat,train1", ["'train1'", "'train', 'val' or 'test'", "Write 'train'"]),
        ("C:\\x\\b.jpg,cat,train", ["b.jpg", "as it is below"]),
        ("b.jpg,cat;;dog,train", ["['cat', '', 'dog']", "empty"]),
        ("b.jpg,cat;,train", ["['cat', '']", "empty"]),
        ("b.jpg,; ,train", ["['', '']", "empty"]),
        ("b.jpg,dog;cta,train", ["'cta'", "`prepare.pets.vocabulary`", "params.yaml", "'cat'?"]),
        ("b.jpg,aeroplane,train", ["'aeroplane'", "`prepare.pets.vocabulary`"]),
        ("b.jpg,qqqq,train", ["'qqqq'", "`prepare.pets.vocabulary`"]),
        ("b.jpg,cat | dog,train", ["'cat | dog'", '`separator: "|"`']),
        ("b.jpg,Cat,train", ["'Cat'", "'cat'?"]),
        ("b.jpg,cat", ["3 cells", "expected 4"]),
        ("b.jpg,cat,train,x", ["5 cells", "expected 4"]),
        ("b.jpg,cat,dog,train", ["5 cells", "expected 4"]),
        ('b.jpg,"cat"x,train', ["',' expected after '\"'", "quote"]),
        ('b.jpg,"cat,train', ["unexpected end of data", "quote"]),
    ],
)
@pytest.mark.parametrize("before", ["", "\n\n", '"x\n\ny",b1.jpg,cat,test\n'])
def test_invalid_row_is_named_with_its_line(
    root: Path, row: str, parts: list[str], before: str
) -> None:
    valid = "note,image,labels,split\n0,a.jpg,cat,train\n1,b0.jpg,dog,test\n"
    line = 4 + before.count("\n")
    text = f"{valid}{before}2,{row}\n3,z.jpg,cat,train\n"
    with refused(InputError, f"/labels.csv, line {line}: ", *parts):
        read_pets_text(root, text, vocabulary=["cat", "dog"])


@pytest.mark.parametrize("label", ["aeroplane", "qqqq"])
def test_label_unlike_any_other_gets_no_suggestion(root: Path, label: str) -> None:
    text = f"image,labels,split\na.jpg,{label},train\n"
    with pytest.raises(InputError, match=label) as caught:
        read_pets_text(root, text, vocabulary=["cat", "dog"])
    assert not {"'cat'", "'dog'"} & set(str(caught.value).replace("?", "").split())


@pytest.mark.parametrize(
    ("content", "line", "parts"),
    [
        (
            PETS.encode().replace(b"dog,test", b"d\xf6g,test"),
            4,
            ["0xf6", "'c.jpg,dög,test'", "`iconv -f WINDOWS-1252 -t UTF-8 labels.csv"],
        ),
        (PETS.encode("utf-16"), 1, ["0xff", "`iconv -f UTF-16 -t UTF-8 labels.csv"]),
        (PETS.encode("utf-16-le"), 1, ["null", "`iconv -f UTF-16LE "]),
        (PETS.encode("utf-16-be"), 1, ["null", "`iconv -f UTF-16BE "]),
        (b"\x80" + PETS.encode(), 1, ["0x80"]),
    ],
)
def test_other_encodings_are_refused(
    root: Path, content: bytes, line: int, parts: list[str]
) -> None:
    (root / "labels.csv").write_bytes(content)
    with refused(InputError, f"labels.csv, line {line}: ", "UTF-8", *parts):
        read_pets(root)


@pytest.mark.parametrize(
    ("settings", "keys"),
    [
        ({"labels": "image"}, ["image", "labels"]),
        ({"split": "labels"}, ["split", "labels"]),
        ({"labels": ["image", "split"]}, ["image", "labels"]),
    ],
)
def test_column_for_two_purposes(root: Path, settings: dict[str, Any], keys: list[str]) -> None:
    with refused(InputError, *(f"`prepare.pets.{key}`" for key in keys), "params.yaml"):
        read_pets_text(root, PETS, **settings)


@pytest.mark.parametrize(
    ("columns", "parts"),
    [
        ({"image": ["a.jpg", None]}, [", row 1: ", "'image'", "null"]),
        ({"split": [None, "test"]}, [", row 0: ", "'split'", "null"]),
        ({"image": ["a.jpg", "a.jpg"]}, [", row 1: ", "'a.jpg'", ", row 0"]),
        ({"split": ["train", "dev"]}, [", row 1: ", "'dev'", "'train', 'val' or 'test'"]),
        ({"labels": [["cat"], ["cat", None]]}, [", row 1: ", "['cat', None]", "empty"]),
        ({"labels": [[], ["", "cat"]]}, [", row 1: ", "['', 'cat']", "empty"]),
        ({"labels": [1.5, 2]}, ["'labels'", "double", "lists of text"]),
        ({"labels": [[1.5], [2]]}, ["'labels'", "list<", "double>", "lists of text"]),
        ({"image": [1.5, 2]}, ["'image'", "double", "expected text."]),
        ({"image": [["a"], ["b"]]}, ["'image'", "list<", "expected text."]),
        ({"split": [True, False]}, ["'split'", "bool", "expected text."]),
    ],
)
def test_invalid_row_or_column_of_parquet_is_named(
    root: Path, columns: dict[str, list[object]], parts: list[str]
) -> None:
    valid: dict[str, Any] = {
        "image": ["a.jpg", "b.jpg"],
        "labels": ["cat", "dog"],
        "split": ["train", "test"],
    }
    write_pets_parquet(root, valid | columns)
    with refused(InputError, "/labels.parquet", *parts):
        read_pets(root, "labels.parquet")


# --- errors of the whole file --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["empty", "header"]),
        ("\n\n", ["empty", "header"]),
        ("image,labels,split\n", ["row", "header"]),
        ("image,labels,split\n\n\n", ["row", "header"]),
        (
            PETS.replace("labels", "label"),
            ["'labels'", "'label'", "'image', 'label', 'split'", "`prepare.pets.labels`"],
        ),
        (PETS.replace("split", "qqq"), ["'split'", "'qqq'", "`prepare.pets.split: qqq`"]),
        (
            PETS.replace("split", "qqq").replace("train", "x"),
            ["'split'", "`prepare.pets.test_share: 0.2`"],
        ),
        (PETS.replace("labels", "Labels"), ["'labels'", "'Labels'"]),
        ("file;tags\na.jpg;cat\n", ["'image'", "'labels'", "'file', 'tags'"]),
        ("photos/a.jpg,cat\n", ["'image'", "first line", "'photos/a.jpg'"]),
        ("file,cat,dog\na.jpg,0,1\n", ["'image'", "`prepare.pets.labels`", "0 and 1"]),
        (PETS.replace(",", ";"), ["line 2", "4 cells", "expected 3", "quotes"]),
        ("image labels split\n1 a.jpg cat train\n".replace(" ", "\t"), ["`row.names = FALSE`"]),
        (
            "file,tags\na.jpg,cat\n",
            [
                *("'image'", "'labels'", "'split'", "'file', 'tags'"),
                *(f"`prepare.pets.{key}`" for key in ("image", "labels", "split")),
                "`prepare.pets.test_share: 0.2`",
            ],
        ),
        (PETS.replace("labels", "image"), ["'image', 'image', 'split'", "'labels'"]),
        (PETS.replace("labels", "split"), ["'labels'", "'image', 'split', 'split'"]),
        (
            "image,labels,split\na.jpg,,train\nb.jpg, ,test\n",
            ["labels.csv, line 2", "0 different labels", "1 to 32768"],
        ),
    ],
)
def test_invalid_file_is_refused(root: Path, text: str, parts: list[str]) -> None:
    with refused(InputError, "labels.csv", *parts):
        read_pets_text(root, text)


@pytest.mark.parametrize("header", [PETS.replace("labels", "split"), PETS.replace("labels", "tag")])
def test_share_is_suggested_only_where_the_split_is_missing(root: Path, header: str) -> None:
    with pytest.raises(InputError, match="'labels'") as caught:
        read_pets_text(root, header)
    assert "`prepare.pets.test_share" not in str(caught.value)


def test_more_labels_than_a_manifest_can_hold(root: Path) -> None:
    half = ";".join(map(str, range(1 << 14)))
    rest = ";".join(map(str, range(1 << 14, 1 << 15)))
    most = f"image,labels,split\na.jpg,{half},train\nb.jpg,{rest},test\n"
    assert len(read_pets_text(root, most).vocabulary) == 1 << 15
    with refused(InputError, "line 2", "32769 different labels", "1 to 32768"):
        read_pets_text(root, most + "c.jpg,one more,test\n")


@pytest.mark.parametrize("file", ["labels.csv", "labels.parquet"])
@pytest.mark.parametrize(
    ("make", "kind", "parts"),
    [
        (lambda path: None, MissingError, ["`prepare.pets.file`", "params.yaml"]),
        (lambda path: path.mkdir(), InputError, ["folder"]),
    ],
)
def test_missing_file_or_folder_in_its_place(
    root: Path,
    file: str,
    make: Callable[[Path], object],
    kind: type[GmpipeError],
    parts: list[str],
) -> None:
    make(root / file)
    with refused(kind, f"/pets/{file}", *parts):
        read_pets(root, file)


def test_file_that_is_not_parquet_is_refused(root: Path) -> None:
    (root / "labels.parquet").write_text(PETS)
    with refused(InputError, "labels.parquet", "Parquet"):
        read_pets(root, "labels.parquet")


def test_parquet_without_a_column_or_rows_is_refused(root: Path) -> None:
    write_pets_parquet(root, {"image": ["a.jpg"], "label": ["cat"], "split": ["train"]})
    with refused(InputError, "labels.parquet", "'labels'", "'label'"):
        read_pets(root, "labels.parquet")
    text = pa.array([], pa.string())
    write_pets_parquet(root, {"image": text, "labels": text, "split": text})
    with refused(InputError, "labels.parquet", "row"):
        read_pets(root, "labels.parquet")


@pytest.mark.parametrize("file", ["labels.txt", "labels", "labels.csv.gz", "labels.xlsx"])
def test_other_file_types_are_refused(root: Path, file: str) -> None:
    with refused(InputError, f"/{file}", ".csv", ".parquet", repr(Path(file).suffix)):
        read_pets(root, file)


# --- odd files -----------------------------------------------------------------------------------

TEXTS = pa.array(["x", "y", "z"])
ODD_COLUMNS = {
    "decimal": pa.array([Decimal("1.5")] * 3),
    "date": pa.array([date(2024, 1, 1)] * 3),
    "truth": pa.array([True] * 3),
    "nulls": pa.nulls(3),
    "number": pa.array([1.5, 2, 3]),
    "bytes": pa.array([b"\xff", b"y", b"z"]),
    "struct": pa.array([{"a": "x"}] * 3),
    "map": pa.array([[("a", "b")]] * 3, pa.map_(pa.string(), pa.string())),
    "lists of lists": pa.array([[["x"]]] * 3),
    "numbers by name": pa.array([1.5, 2, 1]).dictionary_encode(),
    "not UTF-8": pa.array([b"\xff", b"y", b"z"]).view(pa.string()),
    "half a character": pa.array([b"\xed\xa0\x80", b"y", b"z"]).view(pa.string()),
    "names that are not UTF-8": pa.DictionaryArray.from_arrays(
        pa.array([0, 1, 0]), pa.array([b"\xff", b"y"]).view(pa.string())
    ),
}


@pytest.mark.parametrize("column", ["image", "labels", "split"])
@pytest.mark.parametrize("name", ODD_COLUMNS)
def test_odd_columns_of_a_parquet_file(root: Path, name: str, column: str) -> None:
    columns = {"image": TEXTS, "labels": TEXTS, "split": pa.array(["train", "train", "test"])}
    write_pets_parquet(root, {**columns, column: ODD_COLUMNS[name]})
    with refused(InputError, "labels.parquet"):
        read_pets(root, "labels.parquet")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"a\0.jpg,cat,train\n", ["line 2"]),
        (b"a.jpg,h\xfcnd,train\n", ["line 2", "0xfc", "UTF-8"]),
        (b"a.jpg,\xed\xa0\x80,train\n", ["line 2", "0xed", "UTF-8"]),
        (b'a.jpg,"' + b"x\n" * 100_000, ["line 2"]),
    ],
)
def test_odd_text(root: Path, content: bytes, parts: list[str]) -> None:
    (root / "labels.csv").write_bytes(b"image,labels,split\n" + content + b"b.jpg,dog,test\n")
    with refused(InputError, "labels.csv", *parts):
        read_pets(root)


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        (["x" * 5000 + ".jpg", "cat"], ["row 0", "image_id", "5004 bytes", "4096"]),
        (["a.jpg", "y" * 1001], ["label", "1001 characters", "1000"]),
    ],
)
def test_what_is_too_long_is_shown_cut(root: Path, row: list[str], parts: list[str]) -> None:
    text = f"image,labels,split\n{','.join(row)},train\nb.jpg,dog,test\n"
    listing = read_pets_text(root, text)
    with pytest.raises(InputError) as caught:
        listed_manifest(listing, "pets", TableSettings(source="table"))
    assert [part for part in ("pets", *parts) if part not in str(caught.value)] == []
    assert len(str(caught.value)) < 1000
