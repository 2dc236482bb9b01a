"""pipeline.datasets.readers.nuswide: three forms, real lists, errors, memory at full scale."""

from __future__ import annotations

import gzip
import hashlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from refusals import refused
from trees import NUSWIDE_LABELS as LABELS
from trees import NUSWIDE_NAMES as NAMES
from trees import NUSWIDE_TEST as TEST
from trees import NUSWIDE_TRAIN as TRAIN
from trees import csv_rows, csv_text, multi_hot_line, write_official

from pipeline.datasets.listing import Listing, make_manifest
from pipeline.datasets.manifest import COLUMNS
from pipeline.datasets.readers.nuswide import CONCEPTS, read_nuswide
from pipeline.errors import GmpipeError, InputError, MissingError
from pipeline.settings import NuswideSettings


def settings_of(form: str, **changes: object) -> NuswideSettings:
    return NuswideSettings.model_validate({"source": "nuswide", "form": form} | changes)


def read(root: Path, form: str, **changes: object) -> Listing:
    return read_nuswide(root, settings_of(form, **changes))


@pytest.fixture
def official(tmp_path: Path) -> Path:
    root = tmp_path / "nuswide"
    root.mkdir()
    write_official(root, {"Train": TRAIN, "Test": TEST}, LABELS)
    return root


@pytest.fixture
def multi_hot(tmp_path: Path) -> Path:
    root = tmp_path / "nuswide"
    root.mkdir()
    (root / "Concepts81.txt").write_text("\n".join(NAMES))
    lines = [
        multi_hot_line("./data/nuswide_81/images/" + image.partition("/")[2], labels)
        for image, labels in zip([*TRAIN, *TEST], LABELS, strict=True)
    ]
    (root / "database.txt").write_text(f"{lines[0]}\n{lines[1]} \n{lines[2]}\n")
    (root / "test.txt").write_text(f"{lines[3]}\n{lines[4]}")
    return root


@pytest.fixture
def one_csv(tmp_path: Path) -> Path:
    root = tmp_path / "nuswide"
    root.mkdir()
    (root / "Concepts81.txt").write_text("\n".join(NAMES))
    (root / "nus_wid_data.csv").write_text(csv_text(csv_rows()))
    return root


# --- the three forms -----------------------------------------------------------------------------


def assert_listed(
    listing: Listing, images: Sequence[str], folder: str, split_name: str, files: Sequence[Path]
) -> None:
    assert listing.vocabulary == tuple(NAMES)
    assert listing.split_name == split_name
    assert listing.boxes is None
    assert listing.table.schema == COLUMNS
    assert listing.table.to_pylist() == [
        {
            "image_id": image,
            "path": folder + image,
            "split": "train" if row < len(TRAIN) else "test",
            "labels": LABELS[row],
            "ignored": [],
            "width": None,
            "height": None,
        }
        for row, image in enumerate(images)
    ]
    digests = {name: digest for name, digest in listing.sources.items() if "." in name}
    assert digests == {
        file.name if file.parent.name != "ImageList" else f"ImageList/{file.name}": hashlib.sha256(
            file.read_bytes()
        ).hexdigest()
        for file in files
    }


@pytest.mark.parametrize("end", ["\n", "\r\n", " \n"])
def test_official_form(tmp_path: Path, end: str) -> None:
    write_official(tmp_path, {"Train": TRAIN, "Test": TEST}, LABELS, end=end)
    listing = read(tmp_path, "official")
    lists = [tmp_path / f"ImageList/{split}Imagelist.txt" for split in ("Train", "Test")]
    files = [*lists, tmp_path / "Concepts81.txt"]
    assert_listed(listing, [*TRAIN, *TEST], "Flickr/", "official", files)


def test_changed_label_changes_the_sources(official: Path) -> None:
    before = read(official, "official").sources
    (official / "Groundtruth/TrainTestLabels/Labels_concept7_Test.txt").write_text("1\n0\n")
    after = read(official, "official").sources
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == {
        "Groundtruth/TrainTestLabels"
    }


def test_last_line_needs_no_line_end(official: Path) -> None:
    expected = read(official, "official").table
    for file in official.rglob("*.txt"):
        file.write_text(file.read_text().removesuffix("\n"))
    assert read(official, "official").table == expected


def test_csv_form(one_csv: Path) -> None:
    files = [one_csv / "nus_wid_data.csv", one_csv / "Concepts81.txt"]
    listing = read(one_csv, "csv", images="pictures/all")
    assert_listed(listing, [*TRAIN, *TEST], "pictures/all/", "csv", files)
    listing = read(one_csv, "csv", images=".", split_name="70-30")
    assert_listed(listing, [*TRAIN, *TEST], "", "70-30", files)


def test_csv_form_without_concepts_file_sorts_the_labels(one_csv: Path) -> None:
    (one_csv / "Concepts81.txt").unlink()
    rows = csv_rows()
    rows[1] = (rows[1][0], str(NAMES), rows[1][2])
    (one_csv / "nus_wid_data.csv").write_text(csv_text(rows))
    listing = read(one_csv, "csv")
    assert listing.vocabulary == tuple(sorted(NAMES))
    assert list(listing.sources) == ["nus_wid_data.csv"]
    numbers = listing.table.column("labels").to_pylist()
    assert numbers[1] == list(range(CONCEPTS))
    assert [listing.vocabulary[number] for number in numbers[3]] == sorted(NAMES[1:3])


@pytest.mark.parametrize(
    ("cell", "labels"),
    [
        ("[]", []),
        ("['concept0']", [80]),
        ("['concept80', 'concept0']", [0, 80]),
        ("['concept0' ,'concept80']", [0, 80]),
        ("['concept0','concept0']", [80]),
        ('[""concept0"", \'concept80\']', [0, 80]),
    ],
)
def test_label_lists_of_the_csv(one_csv: Path, cell: str, labels: list[int]) -> None:
    rows = csv_rows()
    rows[2] = (rows[2][0], cell, "train")
    (one_csv / "nus_wid_data.csv").write_text(csv_text(rows))
    assert read(one_csv, "csv").table.column("labels")[2].as_py() == labels


def test_multi_hot_form(multi_hot: Path) -> None:
    images = [image.partition("/")[2] for image in [*TRAIN, *TEST]]
    files = [multi_hot / name for name in ("database.txt", "test.txt", "Concepts81.txt")]
    listing = read(multi_hot, "multi-hot", images="images")
    assert_listed(listing, images, "images/", "multi-hot", files)


def test_multi_hot_lists_may_be_compressed(multi_hot: Path) -> None:
    expected = read(multi_hot, "multi-hot").table
    compressed = multi_hot / "lists" / "all.gz"
    compressed.parent.mkdir()
    compressed.write_bytes(gzip.compress((multi_hot / "database.txt").read_bytes()))
    (multi_hot / "database.txt").unlink()
    listing = read(multi_hot, "multi-hot", train_list="lists/all.gz")
    assert listing.table == expected
    assert set(listing.sources) == {"lists/all.gz", "test.txt", "Concepts81.txt"}


@pytest.mark.parametrize("form", ["official", "csv", "multi-hot"])
def test_byte_order_marks_are_no_part_of_the_text(
    form: str, request: pytest.FixtureRequest
) -> None:
    root: Path = request.getfixturevalue("one_csv" if form == "csv" else form.replace("-", "_"))
    (root / "Concepts81.txt").write_text("\n".join(NAMES))
    expected = read(root, form)
    for path in [path for path in root.rglob("*") if path.suffix in (".txt", ".csv")]:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    listing = read(root, form)
    assert listing.vocabulary == expected.vocabulary == tuple(NAMES)
    assert listing.table == expected.table


def test_unlabelled_and_missing_images_are_counted(official: Path) -> None:
    settings = settings_of("official", drop_missing=True, drop_unlabelled=True)
    for image in [*TRAIN, *TEST[1:]]:
        (official / "Flickr" / image).parent.mkdir(parents=True, exist_ok=True)
        (official / "Flickr" / image).touch()
    manifest, missing = make_manifest(
        read_nuswide(official, settings), "nuswide", official, settings
    )
    assert manifest.split_name == "official"
    assert manifest.counts == {
        "train": {"listed": 3, "missing": 0, "unlabelled": 1, "images": 2},
        "test": {"listed": 2, "missing": 1, "unlabelled": 0, "images": 1},
    }
    assert missing.column("path").to_pylist() == ["Flickr/actor/0004_14.jpg"]


# --- real lists ----------------------------------------------------------------------------------


def real_concepts(shared: Path) -> list[str]:
    return (shared / "data/nuswide-lists/Concepts81.txt").read_text().split()


def test_real_official_test_list(shared: Path, tmp_path: Path) -> None:
    with gzip.open(shared / "data/nuswide-lists/TestImagelist.txt.gz", "rt") as stream:
        images = [line.strip().replace("\\", "/") for line in stream]
    assert len(images) == 107_859
    names = real_concepts(shared)
    rng = np.random.default_rng(0)
    picked = [sorted(rng.choice(CONCEPTS, size, replace=False).tolist()) for size in range(6)]
    lists = {"Train": images[:3], "Test": images[3:]}
    labels = [*picked[:3], *([()] * (len(images) - 6)), *picked[3:]]
    write_official(tmp_path, lists, labels, names=names)
    listing = read(tmp_path, "official")
    assert listing.vocabulary == tuple(names)
    assert listing.table.column("image_id").to_pylist() == images
    listed = listing.table.column("labels").to_pylist()
    assert [*listed[:3], *listed[-3:]] == picked
    assert not any(listed[3:-3])


def test_real_concepts_are_in_alphabetical_order(shared: Path) -> None:
    # The CSV form relies on it where Concepts81.txt is missing.
    assert real_concepts(shared) == sorted(real_concepts(shared))


def test_real_multi_hot_list(shared: Path, tmp_path: Path) -> None:
    lists = shared / "data/nuswide-lists"
    lines = gzip.decompress((lists / "multi_hot_test.txt.gz").read_bytes()).decode().splitlines()
    (tmp_path / "Concepts81.txt").write_bytes((lists / "Concepts81.txt").read_bytes())
    (tmp_path / "test.txt.gz").write_bytes((lists / "multi_hot_test.txt.gz").read_bytes())
    (tmp_path / "database.txt").write_text(multi_hot_line("images/other.jpg", [5]))
    listing = read(tmp_path, "multi-hot", test_list="test.txt.gz", images="images")
    rows = listing.table.slice(1).to_pylist()
    assert len(rows) == len(lines) == 5000
    for row, line in zip(rows, lines, strict=True):
        path, flags = line.strip().split(" ", 1)
        assert path.endswith("/" + row["image_id"])
        assert row["path"] == "images/" + row["image_id"]
        assert row["labels"] == [n for n in range(CONCEPTS) if flags[2 * n] == "1"]


# --- errors --------------------------------------------------------------------------------------

CONCEPTS_KEY = "`prepare.nuswide.concepts`"
COLUMN = "Groundtruth/TrainTestLabels/Labels_concept7_Test.txt"


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("ImageList/TrainImagelist.txt", ["ImageList.zip"]),
        ("ImageList/TestImagelist.txt", ["ImageList.zip"]),
        (COLUMN, ["Groundtruth.zip"]),
        ("Concepts81.txt", ["ConceptsList.zip", CONCEPTS_KEY, "params.yaml"]),
    ],
)
def test_missing_file_of_the_official_form(official: Path, name: str, parts: list[str]) -> None:
    (official / name).unlink()
    with refused(MissingError, f"/nuswide/{name}", *parts):
        read(official, "official")
    (official / name).mkdir()
    with refused(InputError, f"/nuswide/{name}", *parts):
        read(official, "official")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("1\n", ["1 lines", "expected 2", "/ImageList/TestImagelist.txt"]),
        ("1\n0\n1\n", ["3 lines", "expected 2", "ImageList.zip", "Groundtruth.zip"]),
        ("1\n2\n", ["line 2: ", "'2'", "0 or 1"]),
        ("10\n", ["line 1: ", "'10'", "0 or 1"]),
        ("\n1\n0\n", ["line 1: ", "''", "0 or 1"]),
        ("1\n-1\n", ["line 2: ", "'-1'", "0 or 1"]),
        ("1\n0\n1\nx\n", ["line 4: ", "'x'", "0 or 1"]),
        ("", ["line 1: ", "''", "0 or 1"]),
        ("1,0\n", ["line 1: ", "'1,0'", "0 or 1"]),
    ],
)
def test_label_file_that_does_not_fit_the_list(official: Path, text: str, parts: list[str]) -> None:
    (official / COLUMN).write_text(text)
    with refused(InputError, f"/{COLUMN}", *parts):
        read(official, "official")


def test_image_without_a_line_in_the_label_files(official: Path) -> None:
    with (official / "ImageList/TrainImagelist.txt").open("a") as stream:
        stream.write("zoos\\0009_19.jpg\n")
    parts = ["Labels_concept80_Train.txt", "3 lines", "expected 4", "/TrainImagelist.txt"]
    with refused(InputError, *parts):
        read(official, "official")


@pytest.mark.parametrize(
    ("split", "lines", "parts"),
    [
        (
            "Train",
            ["a\\1.jpg", "", "b\\1.jpg", "a\\1.jpg"],
            ["/TrainImagelist.txt, line 4: ", "'a/1.jpg'", "/TrainImagelist.txt, line 1"],
        ),
        (
            "Test",
            ["a\\1.jpg", "actor\\0002_12.jpg"],
            ["/TestImagelist.txt, line 2: ", "'actor/0002_12.jpg'", "/TrainImagelist.txt, line 2"],
        ),
        ("Test", ["a\\1.jpg", "..\\1.jpg"], ["/TestImagelist.txt, line 2: ", "'../1.jpg'"]),
        ("Train", ["a", "/b", "c"], ["/TrainImagelist.txt, line 2: ", "'/b'"]),
    ],
)
def test_invalid_image_list(official: Path, split: str, lines: list[str], parts: list[str]) -> None:
    (official / f"ImageList/{split}Imagelist.txt").write_text("\n".join(lines))
    with refused(InputError, *parts):
        read(official, "official")


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (NAMES[1:], ["80 concepts", "80 of them"]),
        ([*NAMES, "more"], ["82 concepts", "82 of them"]),
        ([*NAMES[1:], NAMES[1]], ["81 concepts", "80 of them"]),
        ([], ["0 concepts", "0 of them"]),
    ],
)
@pytest.mark.parametrize("form", ["official", "multi-hot", "csv"])
def test_concepts_file_needs_81_names(
    request: pytest.FixtureRequest, form: str, names: list[str], parts: list[str]
) -> None:
    root: Path = request.getfixturevalue("one_csv" if form == "csv" else form.replace("-", "_"))
    (root / "Concepts81.txt").write_text("\n".join(names))
    with refused(InputError, "/Concepts81.txt", *parts, "expected 81", CONCEPTS_KEY):
        read(root, form)


VALID = multi_hot_line("images/z.jpg", [1])


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (VALID[:-2], ["80 columns", "expected 81"]),
        (VALID + " 0", ["82 columns", "expected 81"]),
        (VALID[:-1] + "2", ["81 columns", "'2'", "expected 81", "0 or 1"]),
        (VALID[:-1] + "10", ["81 columns", "'10'", "expected 81", "0 or 1"]),
        (VALID.replace("z.", "z z."), ["82 columns", "'z.jpg'", "expected 81"]),
        ("x", ["0 columns", "expected 81"]),
        (
            multi_hot_line("elsewhere\\0001_11.jpg", []),
            ["'0001_11.jpg'", "/database.txt, line 1"],
        ),
        (multi_hot_line("images/", []), ["''"]),
        (multi_hot_line("images/..", []), ["'..'"]),
    ],
)
def test_invalid_line_of_a_multi_hot_list(multi_hot: Path, line: str, parts: list[str]) -> None:
    lines = (multi_hot / "test.txt").read_text().splitlines()
    (multi_hot / "test.txt").write_text("\n".join([lines[0], "", line, lines[1]]))
    with refused(InputError, "/test.txt, line 3: ", *parts):
        read(multi_hot, "multi-hot")


@pytest.mark.parametrize(
    ("damage", "kind", "parts"),
    [
        (lambda path: path.unlink(), MissingError, ["`prepare.nuswide.test_list`", "params.yaml"]),
        (lambda path: path.write_text(VALID), InputError, ["Not a gzip"]),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), InputError, ["line "]),
        (
            lambda path: path.write_bytes(gzip.compress(b"\xe4 0 1")),
            InputError,
            [", line 1: ", "0xe4", "UTF-8"],
        ),
    ],
)
def test_damaged_compressed_list(
    multi_hot: Path, damage: Callable[[Path], object], kind: type[GmpipeError], parts: list[str]
) -> None:
    path = multi_hot / "test.gz"
    path.write_bytes(gzip.compress((multi_hot / "test.txt").read_bytes()))
    damage(path)
    with refused(kind, "/test.gz", *parts):
        read(multi_hot, "multi-hot", test_list="test.gz")


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        *(
            (("z.jpg", cell, "val"), ["labels", "['clouds', 'sky']"])
            for cell in (
                "clouds",
                "",
                "['']",
                "['concept1',]",
                "['concept1' 'concept2']",
                "['concept1'",
                "[concept1]",
                "['concept1'] + ['concept2']",
                "[1]",
            )
        ),
        (
            ("z.jpg", "['concept1', 'koncept2']", "val"),
            ["'koncept2'", "/Concepts81.txt", "'concept2'?"],
        ),
        (("z.jpg", "['Concept1']", "val"), ["'Concept1'", "'concept1'?"]),
        (("z.jpg", "[' ']", "val"), ["[' ']", "empty"]),
        (("z.jpg", "[]", "test"), ["'test'", "'train' or 'val'"]),
        ((TRAIN[1], "[]", "val"), [TRAIN[1], "/nus_wid_data.csv, line 3"]),
        (("../z.jpg", "[]", "val"), ["'../z.jpg'"]),
        (("z.jpg", "[]", "val,more"), ["4 cells", "expected 3"]),
    ],
)
def test_invalid_row_of_the_csv(one_csv: Path, row: tuple[str, str, str], parts: list[str]) -> None:
    (one_csv / "nus_wid_data.csv").write_text(csv_text([*csv_rows(), row]))
    with refused(InputError, "/nus_wid_data.csv, line 7: ", *parts):
        read(one_csv, "csv")


def test_missing_csv_and_wrong_header(one_csv: Path) -> None:
    with refused(MissingError, "/other.csv", "`prepare.nuswide.file`", "params.yaml"):
        read(one_csv, "csv", file="other.csv")
    (one_csv / "other.csv").write_text("filename,label,split\n")
    with refused(InputError, "/other.csv", "'filepath'", "'filename'"):
        read(one_csv, "csv", file="other.csv")


def test_csv_without_concepts_file_needs_all_81(one_csv: Path) -> None:
    (one_csv / "Concepts81.txt").unlink()
    parts = ["5 different labels", "expected 81", "ConceptsList.zip", "/nuswide/Concepts81.txt"]
    with refused(InputError, "/nus_wid_data.csv", *parts):
        read(one_csv, "csv")


# --- scale ---------------------------------------------------------------------------------------

PREPARE = """
import re, sys
from pathlib import Path
from pipeline.datasets.listing import make_manifest
from pipeline.datasets.manifest import write_manifest
from pipeline.datasets.readers.nuswide import read_nuswide
from pipeline.settings import NuswideSettings
root, settings = Path(sys.argv[1]), NuswideSettings(source="nuswide")
manifest, missing = make_manifest(read_nuswide(root, settings), "nuswide", root, settings)
write_manifest(root / "prepared" / "manifest.parquet", manifest)
# Not the maximum of getrusage, which a process inherits from the one that started it.
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
print(len(manifest), missing.num_rows, int(peak[1]) // 1024)
"""


@pytest.mark.slow
def test_memory_at_the_size_of_nuswide(tmp_path: Path) -> None:
    lists = {
        split: [f"folder{number % 704}/{first + number:07d}_1.jpg" for number in range(count)]
        for split, first, count in (("Train", 0, 161_789), ("Test", 161_789, 107_859))
    }
    write_official(tmp_path, lists, [(number % 81, number % 7) for number in range(269_648)])
    for folder in range(704):
        (tmp_path / "Flickr" / f"folder{folder}").mkdir(parents=True)
    for image in [*lists["Train"], *lists["Test"]]:
        (tmp_path / "Flickr" / image).touch()
    run = subprocess.run(
        [sys.executable, "-c", PREPARE, str(tmp_path)], capture_output=True, text=True, check=True
    )
    images, missing, megabytes = map(int, run.stdout.split())
    assert (images, missing) == (269_648, 0)
    assert megabytes < 1500
