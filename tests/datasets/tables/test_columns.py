"""pipeline.datasets.readers: columns of 0 and 1, rows of one image, and odd headers and types."""

from __future__ import annotations

import unicodedata
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from refusals import refused
from trees import PETS, labels_of, read_pets, read_pets_text, write_pets_parquet

from pipeline.errors import InputError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """data/pets/, empty."""
    root = tmp_path / "pets"
    root.mkdir()
    return root


# --- columns of 0 and 1 --------------------------------------------------------------------------

FLAGS = "image,sofa,cat,split\na.jpg,1,0,train\nb.jpg,1,1,test\nc.jpg,0,0,test\n"
FLAGGED = [["sofa"], ["sofa", "cat"], []]


@pytest.mark.parametrize(
    ("yes", "no"), [("1", "0"), ("1.0", "0.0"), ("True", "False"), ("true", "FALSE"), ("yes", "no")]
)
def test_all_other_columns_of_0_and_1_are_labels(root: Path, yes: str, no: str) -> None:
    text = FLAGS.replace(",1", f",{yes}").replace(",0", f", {no}")
    listing = read_pets_text(root, text)
    assert listing.vocabulary == ("sofa", "cat")
    assert labels_of(listing) == FLAGGED
    [note] = listing.notes
    for part in ("labels.csv", "'labels'", "sofa, cat", "`prepare.pets.labels`"):
        assert part in note
    listing = read_pets_text(root, text, labels=["cat", "sofa"])
    assert listing.vocabulary == ("cat", "sofa")
    assert labels_of(listing) == [sorted(row) for row in FLAGGED]
    assert listing.notes == ()


@pytest.mark.parametrize(
    ("values", "found"), [(("1", "-1"), "-1"), (("0.9", "0.2"), "0.9"), (("1", ""), "")]
)
def test_all_columns_in_another_coding(root: Path, values: tuple[str, str], found: str) -> None:
    yes, no = values
    text = f"image,cat,dog,split\na.jpg,{yes},{no},train\nb.jpg,{no},{yes},test\n"
    with refused(InputError, "labels.csv, line ", "'cat'", repr(found), "0 or 1", "`true`"):
        read_pets_text(root, text)


def test_column_that_numbers_the_rows_is_no_label(root: Path) -> None:
    lines = FLAGS.splitlines()
    text = "\n".join([f",{lines[0]}", *(f"{row},{line}" for row, line in enumerate(lines[1:]))])
    assert labels_of(read_pets_text(root, text)) == FLAGGED


def test_columns_of_0_and_1_with_a_share_for_the_test_split(root: Path) -> None:
    text = "image,cat,dog\n" + "".join(f"{row}.jpg,1,0\n" for row in range(50))
    assert labels_of(read_pets_text(root, text, test_share=0.3)) == [["cat"]] * 50


def test_columns_of_0_and_1_in_parquet(root: Path) -> None:
    columns: dict[str, Any] = {"image": ["a.jpg", "b.jpg"], "split": ["train", "test"]}
    for ones in ([1, 0], [1.0, 0.0], [True, False], ["1", "0"]):
        write_pets_parquet(root, {**columns, "cat": ones, "dog": [ones[0]] * 2})
        assert labels_of(read_pets(root, "labels.parquet")) == [["cat", "dog"], ["dog"]]
    write_pets_parquet(root, {**columns, "cat": [1, None], "dog": [1, 0]})
    with refused(InputError, "labels.parquet, row 1", "'cat'", "empty", "0 or 1"):
        read_pets(root, "labels.parquet", labels=["cat", "dog"])


def test_vocabulary_of_columns(root: Path) -> None:
    listing = read_pets_text(root, FLAGS, labels=["sofa", "cat"], vocabulary=["cat", "dog", "sofa"])
    assert listing.vocabulary == ("cat", "dog", "sofa")
    assert labels_of(listing) == [["sofa"], ["cat", "sofa"], []]
    with refused(InputError, "line 2", "'sofa'", "`prepare.pets.vocabulary`"):
        read_pets_text(root, FLAGS, labels=["sofa", "cat"], vocabulary=["cat"])


@pytest.mark.parametrize("value", ["-1", "0.7", "nan", "", "x", "2"])
@pytest.mark.parametrize("settings", [{}, {"labels": ["sofa", "cat"]}])
def test_other_value_in_a_column_of_0_and_1(
    root: Path, value: str, settings: dict[str, Any]
) -> None:
    text = FLAGS.replace("b.jpg,1,1", f"b.jpg,1,{value}")
    found = repr(value) if value or not settings else "empty"
    with refused(InputError, "labels.csv, line 3: ", "'cat'", found, "0"):
        read_pets_text(root, text, **settings)


def test_columns_of_the_setting_that_are_missing(root: Path) -> None:
    with refused(InputError, "'dog'", "'cow'", "`prepare.pets.labels`"):
        read_pets_text(root, FLAGS, labels=["sofa", "dog", "cow"])


def test_names_of_columns_in_a_remedy_are_yaml(root: Path) -> None:
    text = 'image,"a, b",no,traffic light,öl,7,note,split\na.jpg,1,0,1,0,1,x,train\n'
    with refused(InputError, '`prepare.pets.labels: ["a, b", "no", traffic light, öl, "7"]`'):
        read_pets_text(root, text)


def test_single_column_of_0_and_1_is_no_guess(root: Path) -> None:
    text = "image,cat,split\na.jpg,1,train\nb.jpg,0,test\n"
    with refused(InputError, "'cat'", "`prepare.pets.labels: [cat]`", "`prepare.pets.labels: cat`"):
        read_pets_text(root, text)
    assert labels_of(read_pets_text(root, text, labels=["cat"])) == [["cat"], []]


def test_misspelt_column_of_labels_is_no_column_of_0_and_1(root: Path) -> None:
    with refused(InputError, "'labels'", "perhaps it is 'label'"):
        read_pets_text(root, "image,label,big,split\na.jpg,1,0,train\nb.jpg,0,1,test\n")


@pytest.mark.parametrize(
    ("other", "values"),
    [
        ("taken", [datetime(2024, 1, 1), None]),
        ("embedding", [[0.1, 0.2], [0.3, 0.4]]),
        ("bytes", [b"\xff", b"\xfe"]),
        ("box", [{"x": 1}, {"x": 2}]),
    ],
)
def test_other_types_of_parquet_are_no_labels(root: Path, other: str, values: list[Any]) -> None:
    columns: dict[str, Any] = {"image": ["a.jpg", "b.jpg"], "split": ["train", "test"]}
    columns[other] = values
    write_pets_parquet(root, {**columns, "category": ["cat", "dog"]})
    missing = ["labels.parquet", "'labels' is missing", repr(other), "`prepare.pets.labels`"]
    with refused(InputError, *missing, "'category'"):
        read_pets(root, "labels.parquet")
    write_pets_parquet(root, {**columns, "cat": [1, 0], "dog": [True, False]})
    with refused(InputError, *missing, "`prepare.pets.labels: [cat, dog]`"):
        read_pets(root, "labels.parquet")
    listing = read_pets(root, "labels.parquet", labels=["cat", "dog"])
    assert labels_of(listing) == [["cat", "dog"], []]


def test_columns_of_numbers_beside_columns_of_0_and_1(root: Path) -> None:
    text = (
        "Unnamed: 0.1,Unnamed: 0,id,image,width,fold,confidence,cat,hot dog,split,\n"
        "0,0,7,a.jpg,640,0,0.7,1,0,train,\n1,1,8,b.jpg,640,2,0.9,0,1,test,\n"
    )
    others = ("'id'", "'width'", "'fold'", "'confidence'")
    with refused(
        InputError, "'labels' is missing", *others, "`prepare.pets.labels: [cat, hot dog]`"
    ):
        read_pets_text(root, text)
    assert labels_of(read_pets_text(root, text, labels=["cat", "hot dog"])) == [
        ["cat"],
        ["hot dog"],
    ]
    for name in ("id", "width", "fold", "confidence"):
        text = text.replace(f"{name},", f"Unnamed: {len(name)},")
    assert labels_of(read_pets_text(root, text)) == [["cat"], ["hot dog"]]


@pytest.mark.parametrize("settings", [{}, {"labels": ["cat", "sofa"]}])
def test_column_that_appears_twice(root: Path, settings: dict[str, Any]) -> None:
    text = "image,cat,cat,sofa,split\na.jpg,1,0,1,train\nb.jpg,0,1,1,test\n"
    with pytest.raises(InputError, match="'cat' appears 2 times") as caught:
        read_pets_text(root, text, **settings)
    assert "params.yaml" not in str(caught.value)  # no setting helps


def test_other_column_that_appears_twice_is_not_blamed(root: Path) -> None:
    text = "image,note,note,category,split\na.jpg,x,y,cat,train\n"
    with refused(InputError, "'labels' is missing", "'category'"):
        read_pets_text(root, text)
    assert labels_of(read_pets_text(root, text, labels="category")) == [["cat"]]


# --- rows of one image ---------------------------------------------------------------------------


def test_one_row_per_label(root: Path) -> None:
    rows = [
        "a.jpg,cat,train",
        "b.jpg,cow,test",
        "./a.jpg,ant,train",
        "c.jpg,,test",
        "b.jpg,ant,test",
    ]
    listing = read_pets_text(root, "\n".join(["image,labels,split", *rows]))
    assert listing.table["path"].to_pylist() == ["a.jpg", "b.jpg", "c.jpg"]
    assert listing.table["split"].to_pylist() == ["train", "test", "test"]
    assert labels_of(listing) == [["ant", "cat"], ["ant", "cow"], []]
    [note] = listing.notes
    for part in ("images: 2", "'a.jpg'", "labels.csv, line 2", "line 4"):
        assert part in note
    assert listing.places["ant"] == "labels.csv, line 4"


def test_one_row_per_label_with_a_share_for_the_test_split(root: Path) -> None:
    rows = [f"{row // 2}.jpg,{'odd' if row % 2 else 'even'}" for row in range(100)]
    listing = read_pets_text(root, "\n".join(["image,labels", *rows]), test_share=0.5)
    assert labels_of(listing) == [["even", "odd"]] * 50


def test_names_that_differ_in_unicode_form_are_one_image(root: Path) -> None:
    names = ("caf\u00e9.jpg", "cafe\u0301.jpg")
    text = f"image,labels,split\n{names[0]},cat,train\n{names[1]},%s,%s\nb.jpg,cat,test\n"
    listing = read_pets_text(root, text % ("dog", "train"))
    assert listing.table["path"].to_pylist() == [names[0], "b.jpg"]
    assert labels_of(listing) == [["cat", "dog"], ["cat"]]
    with refused(InputError, "line 3", repr(names[1]), "line 2", "'test'", "'train'"):
        read_pets_text(root, text % ("dog", "test"))


def test_share_for_the_test_split_of_names_that_differ_in_unicode_form(root: Path) -> None:
    stems = [f"{row}\u00e9" for row in range(50)]
    rows = [
        f"{unicodedata.normalize(form, stem)}.jpg,{form}"
        for stem in stems
        for form in ("NFC", "NFD")
    ]
    listing = read_pets_text(root, "\n".join(["image,labels", *rows]), test_share=0.5)
    assert labels_of(listing) == [["NFC", "NFD"]] * 50
    alone = read_pets_text(root, "\n".join(["image,labels", *rows[::2]]), test_share=0.5)
    assert listing.table["split"] == alone.table["split"]


def test_split_instead_of_a_share_that_leaves_nothing(root: Path) -> None:
    with refused(InputError, "`test_share: 0.001`", "remove it", "'split'"):
        read_pets_text(root, "image,labels\na.jpg,cat\n", test_share=0.001)


def test_rows_with_columns_of_0_and_1_are_not_joined(root: Path) -> None:
    with refused(InputError, "labels.csv, line 5", "'a.jpg'", "labels.csv, line 2", "1 for each"):
        read_pets_text(root, FLAGS + "a.jpg,0,1,train\n")


# --- headers, marks between cells, types ---------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        PETS.replace("image,labels,split", " image ,labels ,\u00a0split\u200b"),
        PETS.replace(",", ", "),
        PETS.replace("cat;dog", '"cat;dog"').replace(",", ", "),
        PETS.replace(";", "|").replace(",", ";").replace("|", ",").replace("cat,dog", '"cat;dog"'),
        PETS.replace(",", "\t"),
        "\n" + PETS.replace(",", "\t"),
        PETS.replace("\n", "\r"),
        "sep=\t\r\n" + PETS.replace(",", "\t"),
        PETS.replace("\n", ",,\n") + ",,,,\n,,,,\n",
        PETS.replace(";", "|")
        .replace(",", ";")
        .replace("split\n", 'split;"a, b"\n')
        .replace("train\n", "train;x\n")
        .replace("test\n", "test;y\n")
        .replace("cat|dog", '"cat;dog"'),
    ],
)
def test_equivalent_headers_and_marks(root: Path, text: str) -> None:
    expected = read_pets_text(root, PETS).table
    assert read_pets_text(root, text).table == expected


@pytest.mark.parametrize("file", ["labels.tsv", "labels.CSV"])
def test_suffixes(root: Path, file: str) -> None:
    expected = read_pets_text(root, PETS).table
    (root / file).write_text(PETS.replace(",", "\t"))
    assert read_pets(root, file).table == expected


TEXT_TYPES = [
    pa.string_view(),
    pa.large_string(),
    pa.binary(),
    pa.large_binary(),
    pa.binary_view(),
    pa.dictionary(pa.int8(), pa.string()),
]
LIST_TYPES = [
    pa.large_list(pa.large_string()),
    pa.list_view(pa.string()),
    pa.large_list_view(pa.string_view()),
    pa.list_(pa.string_view()),
    pa.list_(pa.dictionary(pa.int8(), pa.string())),
    pa.list_(pa.binary()),
]


@pytest.mark.parametrize("kind", TEXT_TYPES, ids=str)
def test_types_of_text_in_parquet(root: Path, kind: pa.DataType) -> None:
    columns = {"image": ["a.jpg", "b.jpg"], "labels": ["cat;dog", None], "split": ["train", "test"]}
    write_pets_parquet(
        root, {name: pa.array(column).cast(kind) for name, column in columns.items()}
    )
    assert labels_of(read_pets(root, "labels.parquet")) == [["cat", "dog"], []]


@pytest.mark.parametrize("kind", LIST_TYPES, ids=str)
def test_types_of_lists_in_parquet(root: Path, kind: pa.DataType) -> None:
    columns: dict[str, Any] = {"image": ["a.jpg", "b.jpg"], "split": ["train", "test"]}
    write_pets_parquet(root, {**columns, "labels": pa.array([["cat", "dog"], None], kind)})
    assert labels_of(read_pets(root, "labels.parquet")) == [["cat", "dog"], []]


def test_lists_of_one_length_in_parquet(root: Path) -> None:
    columns: dict[str, Any] = {"image": ["a.jpg", "b.jpg"], "split": ["train", "test"]}
    pairs = pa.array([["cat", "dog"], None], pa.list_(pa.string(), 2))
    write_pets_parquet(root, {**columns, "labels": pairs})
    assert labels_of(read_pets(root, "labels.parquet")) == [["cat", "dog"], []]


def test_parquet_without_any_label(root: Path) -> None:
    columns: dict[str, Any] = {"image": ["a.jpg", "b.jpg"], "split": ["train", "test"]}
    write_pets_parquet(root, {**columns, "labels": pa.nulls(2)})
    with refused(InputError, "labels.parquet", "0 different labels"):
        read_pets(root, "labels.parquet")
    listing = read_pets(root, "labels.parquet", vocabulary=["cat"])
    assert labels_of(listing) == [[], []]
