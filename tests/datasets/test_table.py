"""pipeline.datasets.table: a round trip through both formats, and every error by its message."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pipeline.datasets.listing import Listing, make_manifest
from pipeline.datasets.manifest import COLUMNS
from pipeline.datasets.table import read_table
from pipeline.errors import GmpipeError
from pipeline.settings import TableSettings

Row = tuple[str, list[str], str]
"""An image's path, its labels and its split."""

PETS = "image,labels,split\na.jpg,cat;dog,train\ndeep/b.jpg,,train\nc.jpg,dog,test\n"


def read(root: Path, file: str = "labels.csv", **settings: object) -> Listing:
    return read_table(
        root, TableSettings.model_validate({"source": "table", "file": file} | settings)
    )


def read_text(root: Path, text: str, **settings: object) -> Listing:
    (root / "labels.csv").write_text(text, newline="")
    return read(root, **settings)


def write_parquet(root: Path, columns: dict[str, Any]) -> None:
    pq.write_table(pa.table(columns), root / "labels.parquet")


def named(listing: Listing) -> list[Row]:
    """A listing's rows, with their labels' names."""
    return [
        (row["path"], [listing.vocabulary[number] for number in row["labels"]], row["split"])
        for row in listing.table.to_pylist()
    ]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """data/pets/, empty."""
    root = tmp_path / "pets"
    root.mkdir()
    return root


# --- sound tables --------------------------------------------------------------------------------


def test_a_table_is_listed_row_by_row(root: Path) -> None:
    listing = read_text(root, PETS)
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


def test_a_listing_becomes_a_manifest(root: Path) -> None:
    read_text(root, PETS)
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
    listing = read_text(
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
def test_paths_are_relative_to_the_folder_of_images(root: Path, images: str) -> None:
    plain, listing = read_text(root, PETS).table, read_text(root, PETS, images=images).table
    folder = Path(images).as_posix()
    assert listing.column("image_id") == plain.column("image_id")
    assert listing.column("path").to_pylist() == [
        (Path(folder) / path).as_posix() for path in plain.column("path").to_pylist()
    ]


def test_the_folder_of_images_does_not_move_the_split(root: Path) -> None:
    text = unsplit(PATHS)
    plain = read_text(root, text, test_share=0.2).table
    moved = read_text(root, text, test_share=0.2, images="more").table
    assert moved.column("split") == plain.column("split")


def unsplit(paths: Sequence[str]) -> str:
    return "".join(["image,labels\n", *(f"{path},cat\n" for path in paths)])


def sides(listing: Listing) -> dict[str, str]:
    """Path -> split."""
    return {path: split for path, _, split in named(listing)}


PATHS = [f"photos/{number}.jpg" for number in range(400)]


def test_a_table_without_split_is_split_by_its_paths(root: Path) -> None:
    found = sides(read_text(root, unsplit(PATHS), test_share=0.2))
    tests = [path for path, split in found.items() if split == "test"]
    assert 60 <= len(tests) <= 100  # 80, with a standard deviation of 8
    # For whoever splits the same paths elsewhere: sha256's first bytes as a fraction.
    expected = [
        path
        for path in PATHS
        if int(hashlib.sha256(path.encode()).hexdigest()[:16], 16) < 0.2 * 2**64
    ]
    assert tests == expected


def test_an_image_stays_on_its_side(root: Path) -> None:
    all_of_them = sides(read_text(root, unsplit(PATHS), test_share=0.2))
    fewer = sides(read_text(root, unsplit(PATHS[::-3]), test_share=0.2))
    assert fewer.items() <= all_of_them.items()
    assert sides(read_text(root, unsplit([f"./{path}" for path in PATHS]), test_share=0.2)) == (
        all_of_them
    )
    larger = sides(read_text(root, unsplit(PATHS), test_share=0.3))
    assert {path for path, split in all_of_them.items() if split == "test"} < {
        path for path, split in larger.items() if split == "test"
    }


def test_parquet_is_split_alike(root: Path) -> None:
    expected = sides(read_text(root, unsplit(PATHS), test_share=0.5))
    write_parquet(root, {"image": PATHS, "labels": ["cat"] * len(PATHS)})
    assert sides(read(root, "labels.parquet", test_share=0.5)) == expected


@pytest.mark.parametrize("share", [0, 1, -0.1, 20])
def test_a_share_is_a_fraction(share: float) -> None:
    with pytest.raises(ValueError, match="test_share"):
        TableSettings(source="table", test_share=share)


def test_a_split_of_its_own_and_a_share_contradict(root: Path) -> None:
    message = (
        r"/labels\.csv has a column 'split', and `prepare\.pets\.test_share` in params\.yaml asks "
        r"for another split\. Take one of the two out\.$"
    )
    with pytest.raises(GmpipeError, match=message):
        read_text(root, PETS, test_share=0.2)
    assert len(sides(read_text(root, PETS, test_share=0.4, split="fold"))) == 3


@pytest.mark.parametrize(("share", "tests"), [(0.0001, 0), (0.9999, 400)])
def test_a_share_that_leaves_a_side_empty(root: Path, share: float, tests: int) -> None:
    message = (
        rf"/labels\.csv: by `test_share: {share}` {tests} of 400 images test; expected some on "
        r"both sides\. Change it, or add a column 'split' that says `train` or `test`\.$"
    )
    with pytest.raises(GmpipeError, match=message):
        read_text(root, unsplit(PATHS), test_share=share)


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
def test_a_cell_is_a_set_of_labels(root: Path, cell: str, labels: list[str]) -> None:
    quoted = '"' + cell.replace('"', '""') + '"'
    listing = read_text(root, f"image,labels,split\na.jpg,{quoted},train\nb.jpg,zebra,test\n")
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
def test_spellings_of_the_same_table(root: Path, text: str) -> None:
    expected = read_text(root, PETS).table
    assert read_text(root, text).table == expected


def test_cells_may_hold_commas_quotes_and_line_breaks(root: Path) -> None:
    text = 'note,image,labels,split\n"two\nlines","a,""b"".jpg",cat,train\n,c.jpg,cat,test\n'
    assert named(read_text(root, text))[0] == ('a,"b".jpg', ["cat"], "train")


words = st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters=";"), min_size=1)
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
@hypothesis_settings(max_examples=80, deadline=None)
def test_csv_comes_back(folder: Path, rows: list[Row], crlf: bool, bom: bool, quoting: int) -> None:
    encoding = "utf-8-sig" if bom else "utf-8"
    with (folder / "labels.csv").open("w", encoding=encoding, newline="") as stream:
        writer = csv.writer(
            stream,
            lineterminator="\r\n" if crlf else "\n",
            quoting=(csv.QUOTE_MINIMAL, csv.QUOTE_ALL)[quoting],
        )
        writer.writerow(["image", "labels", "split"])
        writer.writerows([path, ";".join(labels), split] for path, labels, split in rows)
    assert_rows(read(folder), rows)


@given(rows=rows_of_tables, form=st.sampled_from(["text", "lists", "large", "dictionary"]))
@hypothesis_settings(max_examples=80, deadline=None)
def test_parquet_comes_back(folder: Path, rows: list[Row], form: str) -> None:
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
    write_parquet(
        folder,
        {
            "image": pa.array(paths, text),
            "labels": cells[form],
            "split": split.dictionary_encode() if form == "dictionary" else split,
            "more": [b"bytes"] * len(rows),
        },
    )
    assert_rows(read(folder, "labels.parquet"), rows)


def assert_rows(listing: Listing, rows: list[Row]) -> None:
    assert listing.vocabulary == tuple(sorted({label for _, labels, _ in rows for label in labels}))
    assert named(listing) == [(path, sorted(set(labels)), split) for path, labels, split in rows]
    assert listing.table.column("image_id").to_pylist() == [path for path, _, _ in rows]


def test_more_rows_than_are_read_at_a_time(root: Path) -> None:
    count = (1 << 16) + 3
    lines = [
        f"{row}.jpg,{'odd' if row % 2 else 'even'},{'test' if row % 5 else 'train'}"
        for row in range(count)
    ]
    listing = read_text(root, "\n".join(["image,labels,split", *lines]))
    expected = [(f"{row}.jpg", [row % 2], "test" if row % 5 else "train") for row in range(count)]
    columns = (listing.table.column(name).to_pylist() for name in ("path", "labels", "split"))
    assert list(zip(*columns, strict=True)) == expected
    lines[-1] = "0.jpg,odd,test"
    message = (
        rf"labels\.csv, line {count + 1}: the image '0\.jpg' stands in .*labels\.csv, line 2 al"
    )
    with pytest.raises(GmpipeError, match=message):
        read_text(root, "\n".join(["image,labels,split", *lines]))


# --- errors in a row -----------------------------------------------------------------------------

AGAIN = r" Mend the file and run `gmpipe prepare` again\.$"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            ",cat,train",
            r"the image is '', expected a path below its folder with forward .*" + AGAIN,
        ),
        ("/b.jpg,cat,train", r"the image is '/b\.jpg', expected a path below"),
        ("../b.jpg,cat,train", r"the image is '\.\./b\.jpg', expected"),
        ("x/../b.jpg,cat,train", r"the image is 'x/\.\./b\.jpg', expected"),
        ("x/..,cat,train", r"the image is 'x/\.\.', expected"),
        ("x/./b.jpg,cat,train", r"the image is 'x/\./b\.jpg', expected"),
        ("x//b.jpg,cat,train", r"the image is 'x//b\.jpg', expected"),
        ("x/,cat,train", r"the image is 'x/', expected"),
        (".,cat,train", r"the image is '\.', expected"),
        ("x\\b.jpg,cat,train", r"the image is 'x\\\\b\.jpg', expected"),
        ("b\0.jpg,cat,train", r"the image is 'b\\x00\.jpg', expected"),
        ('"b\n.jpg",cat,train', r"the image is 'b\\n\.jpg', expected"),
        (
            "a.jpg,cat,train",
            r"the image 'a\.jpg' stands in .*labels\.csv, line 2 already; expected each .*" + AGAIN,
        ),
        ("./a.jpg,cat,train", r"the image 'a\.jpg' stands in .*labels\.csv, line 2 already"),
        ("b.jpg,cat,val", r"the split is 'val', expected 'train' or 'test'\." + AGAIN),
        ("b.jpg,cat,", r"the split is '', expected 'train' or 'test'"),
        ("b.jpg,cat, train", r"the split is ' train', expected 'train' or 'test'"),
        ("b.jpg,cat;;dog,train", r"one of the labels \['cat', '', 'dog'\] is empty\." + AGAIN),
        ("b.jpg,cat;,train", r"one of the labels \['cat', ''\] is empty"),
        ("b.jpg,; ,train", r"one of the labels \['', ''\] is empty"),
        (
            "b.jpg,dog;cta,train",
            r"the label 'cta' is not in `prepare\.pets\.vocabulary` of params\.yaml\. Mend the "
            r"file or add the label there\. Did you mean 'cat'\?$",
        ),
        (
            "b.jpg,aeroplane,train",  # 'cat' and 'dog' are nothing like it
            r"the label 'aeroplane' is not in .* add the label there\.$",
        ),
        (
            "b.jpg,qqqq,train",
            r"the label 'qqqq' is not in .* Mend the file or add the label there\.$",
        ),
        ("b.jpg,Cat,train", r"the label 'Cat' is not in .* Did you mean 'cat'\?"),
        (
            "b.jpg,cat",
            r"found 3 cells, expected 4 as in the header; a cell with a comma .*" + AGAIN,
        ),
        ("b.jpg,cat,train,x", "found 5 cells, expected 4 as in the header"),
        ("b.jpg,cat,dog,train", "found 5 cells, expected 4 as in the header"),
        ('b.jpg,"cat"x,train', r"',' expected after '\"'; is a quote not closed, .*\?" + AGAIN),
        ('b.jpg,"cat,train', "unexpected end of data; is a quote not closed, or not doubled"),
    ],
)
@pytest.mark.parametrize("before", ["", "\n\n", '"x\n\ny","cat",test\n'])
def test_a_fault_names_its_line(root: Path, row: str, message: str, before: str) -> None:
    sound = "note,image,labels,split\n0,a.jpg,cat,train\n1,b0.jpg,dog,test\n"
    if before.startswith('"'):
        before = '"x\n\ny",b1.jpg,cat,test\n'
    line = 4 + before.count("\n")
    text = f"{sound}{before}2,{row}\n3,z.jpg,cat,train\n"
    with pytest.raises(GmpipeError, match=rf"(?s)/labels\.csv, line {line}: {message}"):
        read_text(root, text, vocabulary=["cat", "dog"])


@pytest.mark.parametrize(
    ("content", "line", "byte"),
    [
        (PETS.encode().replace(b"dog,test", b"d\xf6g,test"), 4, "0xf6"),
        (PETS.encode("utf-16"), 1, "0xff"),
        (b"\x80" + PETS.encode(), 1, "0x80"),
    ],
)
def test_another_encoding_is_an_error(root: Path, content: bytes, line: int, byte: str) -> None:
    (root / "labels.csv").write_bytes(content)
    message = rf"labels\.csv, line {line}: the byte {byte} is not UTF-8\. Save the file as UTF-8 "
    with pytest.raises(GmpipeError, match=message):
        read(root)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": ["a.jpg", None]}, r"row 1: 'image' is null, expected text\." + AGAIN),
        ({"split": [None, "test"]}, r"row 0: 'split' is null, expected text\." + AGAIN),
        ({"image": ["a.jpg", "a.jpg"]}, r"row 1: the image 'a\.jpg' stands in .*, row 0 already"),
        ({"split": ["train", "val"]}, "row 1: the split is 'val', expected 'train' or 'test'"),
        (
            {"labels": [["cat"], ["cat", None]]},
            r"row 1: one of the labels \['cat', None\] is empty",
        ),
        ({"labels": [[], ["", "cat"]]}, r"row 1: one of the labels \['', 'cat'\] is empty"),
        (
            {"labels": [1, 2]},
            r": the column 'labels' holds int64, expected text or lists of text\. Write it anew,",
        ),
        ({"labels": [[1], [2]]}, r": the column 'labels' holds list<.*int64>, expected text or li"),
        (
            {"image": [1, 2]},
            r": the column 'image' holds int64, expected text\. Write it anew, or ",
        ),
        ({"image": [["a"], ["b"]]}, r": the column 'image' holds list<.*>, expected text\. Write"),
        (
            {"split": [True, False]},
            r": the column 'split' holds bool, expected text\. Write it ane",
        ),
    ],
)
def test_a_fault_in_parquet_names_its_row(
    root: Path, columns: dict[str, list[object]], message: str
) -> None:
    sound: dict[str, Any] = {
        "image": ["a.jpg", "b.jpg"],
        "labels": ["cat", "dog"],
        "split": ["train", "test"],
    }
    write_parquet(root, sound | columns)
    separator = "" if message.startswith(":") else ", "
    with pytest.raises(GmpipeError, match=rf"/labels\.parquet{separator}{message}"):
        read(root, "labels.parquet")


# --- errors of the whole file --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"labels\.csv is empty, expected a header and rows\." + AGAIN),
        ("\n\n", r"labels\.csv is empty, expected a header and rows\." + AGAIN),
        ("image,labels,split\n", r"labels\.csv has no row below its header\." + AGAIN),
        ("image,labels,split\n\n\n", r"labels\.csv has no row below its header"),
        (
            PETS.replace("labels", "label"),
            r"labels\.csv: 'labels' is not a column \(perhaps 'label' is\); the columns are "
            r"'image', 'label', 'split'\. Rename it in the file, or set `prepare\.pets\.labels` in "
            r"params\.yaml to the column's name\.$",
        ),
        (
            PETS.replace("split", "qqq"),
            r"'split' is not a column; .* to the column's name\. Without such a column, "
            r"`prepare\.pets\.test_share: 0\.2` lets a fifth of the images test\.$",
        ),
        (PETS.replace("labels", "Labels"), r"'labels' is not a column \(perhaps 'Labels' is\);"),
        (
            "file;tags\na.jpg;cat\n",
            r"labels\.csv: its cells are separated by semicolons, expected commas: the header is "
            r"'file;tags'\. Save the file as CSV with commas between cells and run `gmpipe pre",
        ),
        (PETS.replace(",", "\t"), r"its cells are separated by tabs, expected commas: the hea"),
        (
            "file,tags\na.jpg,cat\n",
            r"labels\.csv: 'image' is not a column, 'labels' is not a column, 'split' is not a "
            r"column; the columns are 'file', 'tags'\. Rename them in the file, or set "
            r"`prepare\.pets\.image` and `prepare\.pets\.labels` and `prepare\.pets\.split` in "
            r"params\.yaml to the columns' names\. Without such a column, `prepare\.pets\.test_sh",
        ),
        (
            PETS.replace("labels", "image"),
            r"'image' is more than one column, 'labels' is not a column; the columns are",
        ),
        (
            PETS.replace("labels", "split"),
            r"'labels' is not a column, 'split' is more than one column; .* the columns' names\.$",
        ),
        (
            "image,labels,split\na.jpg,,train\nb.jpg, ,test\n",
            r"from .*labels\.csv, line 2 on: 0 different labels, expected 1 to 32768\. Say in ",
        ),
    ],
)
def test_a_file_that_is_no_such_table(root: Path, text: str, message: str) -> None:
    with pytest.raises(GmpipeError, match=message):
        read_text(root, text)


def test_more_labels_than_a_manifest_holds(root: Path) -> None:
    half = ";".join(map(str, range(1 << 14)))
    rest = ";".join(map(str, range(1 << 14, 1 << 15)))
    most = f"image,labels,split\na.jpg,{half},train\nb.jpg,{rest},test\n"
    assert len(read_text(root, most).vocabulary) == 1 << 15
    with pytest.raises(
        GmpipeError, match=r"line 2 on: 32769 different labels, expected 1 to 32768"
    ):
        read_text(root, most + "c.jpg,one more,test\n")


@pytest.mark.parametrize("file", ["labels.csv", "labels.parquet"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda path: None,
            r"there is no .*/pets/{file}\. Put the table there, or set `prepare\.pets\.file` in "
            r"params\.yaml to its path below .*/pets\.$",
        ),
        (lambda path: path.mkdir(), r"/{file} .*[Ii]s a directory.*" + AGAIN),
    ],
)
def test_a_file_that_is_not_there(
    root: Path, file: str, make: Callable[[Path], object], message: str
) -> None:
    make(root / file)
    with pytest.raises(GmpipeError, match=message.replace("{file}", file)):
        read(root, file)


def test_what_is_no_parquet(root: Path) -> None:
    (root / "labels.parquet").write_text(PETS)
    with pytest.raises(
        GmpipeError, match=r"labels\.parquet is not a whole Parquet file: .*" + AGAIN
    ):
        read(root, "labels.parquet")


def test_a_parquet_file_lacks_columns_or_rows(root: Path) -> None:
    write_parquet(root, {"image": ["a.jpg"], "label": ["cat"], "split": ["train"]})
    message = r"labels\.parquet: 'labels' is not a column \(perhaps 'label' is\); the columns"
    with pytest.raises(GmpipeError, match=message):
        read(root, "labels.parquet")
    text = pa.array([], pa.string())
    write_parquet(root, {"image": text, "labels": text, "split": text})
    with pytest.raises(GmpipeError, match=r"labels\.parquet has no row\." + AGAIN):
        read(root, "labels.parquet")


@pytest.mark.parametrize("file", ["labels.txt", "labels", "labels.csv.gz", "labels.CSV"])
def test_another_kind_of_file(root: Path, file: str) -> None:
    message = rf"/{file}: expected a name that ends in \.csv or \.parquet, found '.*'\. Save the ta"
    with pytest.raises(GmpipeError, match=message):
        read(root, file)
