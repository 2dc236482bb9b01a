"""pipeline.datasets.nuswide: its three forms, real lists, every error, and the memory of it all."""

from __future__ import annotations

import gzip
import hashlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from trees import NUSWIDE_LABELS as LABELS
from trees import NUSWIDE_NAMES as NAMES
from trees import NUSWIDE_TEST as TEST
from trees import NUSWIDE_TRAIN as TRAIN
from trees import csv_rows, csv_text, multi_hot_line, write_official

from pipeline.datasets.listing import Listing, make_manifest
from pipeline.datasets.manifest import COLUMNS
from pipeline.datasets.nuswide import CONCEPTS, read_nuswide
from pipeline.errors import GmpipeError
from pipeline.settings import NuswideSettings

AGAIN = r" Mend the file and run `gmpipe prepare` again\.$"


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
    found = {name: digest for name, digest in listing.sources.items() if "." in name}
    assert found == {
        file.name if file.parent.name != "ImageList" else f"ImageList/{file.name}": hashlib.sha256(
            file.read_bytes()
        ).hexdigest()
        for file in files
    }


@pytest.mark.parametrize("end", ["\n", "\r\n", " \n"])
def test_the_official_form(tmp_path: Path, end: str) -> None:
    write_official(tmp_path, {"Train": TRAIN, "Test": TEST}, LABELS, end=end)
    listing = read(tmp_path, "official")
    lists = [tmp_path / f"ImageList/{split}Imagelist.txt" for split in ("Train", "Test")]
    files = [*lists, tmp_path / "Concepts81.txt"]
    assert_listed(listing, [*TRAIN, *TEST], "Flickr/", "official", files)


def test_a_changed_label_changes_the_sources(official: Path) -> None:
    before = read(official, "official").sources
    (official / "Groundtruth/TrainTestLabels/Labels_concept7_Test.txt").write_text("1\n0\n")
    after = read(official, "official").sources
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == {
        "Groundtruth/TrainTestLabels"
    }


def test_the_last_line_needs_no_end(official: Path) -> None:
    expected = read(official, "official").table
    for file in official.rglob("*.txt"):
        file.write_text(file.read_text().removesuffix("\n"))
    assert read(official, "official").table == expected


def test_the_csv_form(one_csv: Path) -> None:
    files = [one_csv / "nus_wid_data.csv", one_csv / "Concepts81.txt"]
    listing = read(one_csv, "csv", images="pictures/all")
    assert_listed(listing, [*TRAIN, *TEST], "pictures/all/", "csv", files)
    listing = read(one_csv, "csv", images=".", split_name="70-30")
    assert_listed(listing, [*TRAIN, *TEST], "", "70-30", files)


def test_the_csv_form_without_concepts_sorts_its_labels(one_csv: Path) -> None:
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
def test_label_lists(one_csv: Path, cell: str, labels: list[int]) -> None:
    rows = csv_rows()
    rows[2] = (rows[2][0], cell, "train")
    (one_csv / "nus_wid_data.csv").write_text(csv_text(rows))
    assert read(one_csv, "csv").table.column("labels")[2].as_py() == labels


def test_the_multi_hot_form(multi_hot: Path) -> None:
    images = [image.partition("/")[2] for image in [*TRAIN, *TEST]]
    files = [multi_hot / name for name in ("database.txt", "test.txt", "Concepts81.txt")]
    listing = read(multi_hot, "multi-hot", images="images")
    assert_listed(listing, images, "images/", "multi-hot", files)


def test_multi_hot_lists_may_be_packed(multi_hot: Path) -> None:
    expected = read(multi_hot, "multi-hot").table
    packed = multi_hot / "lists" / "all.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress((multi_hot / "database.txt").read_bytes()))
    (multi_hot / "database.txt").unlink()
    listing = read(multi_hot, "multi-hot", train_list="lists/all.gz")
    assert listing.table == expected
    assert set(listing.sources) == {"lists/all.gz", "test.txt", "Concepts81.txt"}


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


def test_the_real_test_list(shared: Path, tmp_path: Path) -> None:
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
    found = listing.table.column("labels").to_pylist()
    assert [*found[:3], *found[-3:]] == picked
    assert not any(found[3:-3])


def test_the_concepts_stand_in_alphabetical_order(shared: Path) -> None:
    # Where the CSV form stands without Concepts81.txt, its docstring relies on it.
    assert real_concepts(shared) == sorted(real_concepts(shared))


def test_a_real_multi_hot_list(shared: Path, tmp_path: Path) -> None:
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

CONCEPTS_HINT = (
    r"It is in the publisher's ConceptsList\.zip: put it there, or set `prepare\.nuswide\.concepts`"
    r" in params\.yaml to its path below .*/nuswide\.$"
)
COLUMN = "Groundtruth/TrainTestLabels/Labels_concept7_Test.txt"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ImageList/TrainImagelist.txt", r"ImageList\.zip: unpack that in .*/nuswide\.$"),
        ("ImageList/TestImagelist.txt", r"ImageList\.zip: unpack that in .*/nuswide\.$"),
        (COLUMN, r"It is in the publisher's Groundtruth\.zip: unpack that in .*/nuswide\.$"),
        ("Concepts81.txt", CONCEPTS_HINT),
    ],
)
def test_a_missing_file_of_the_official_form(official: Path, name: str, message: str) -> None:
    (official / name).unlink()
    with pytest.raises(GmpipeError, match=rf"there is no .*/nuswide/{name}\. .*{message}"):
        read(official, "official")
    (official / name).mkdir()
    with pytest.raises(GmpipeError, match=rf"/{name} can't be read .*{message}"):
        read(official, "official")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "1\n",
            r" has 1 lines, expected 2, as many as images in .*/ImageList/TestImagelist\.txt\. ",
        ),
        ("1\n0\n1\n", r" has 3 lines, expected 2, as many .* One of them is damaged: unpack .*"),
        ("1\n2\n", r", line 2: '2', expected 0 or 1\." + AGAIN),
        ("10\n", r", line 1: '10', expected 0 or 1\." + AGAIN),
        ("\n1\n0\n", r", line 1: '', expected 0 or 1\." + AGAIN),
        ("1\n-1\n", r", line 2: '-1', expected 0 or 1\."),
        ("1\n0\n1\nx\n", r", line 4: 'x', expected 0 or 1\."),
        ("", r", line 1: '', expected 0 or 1\."),
        ("1,0\n", r", line 1: '1,0', expected 0 or 1\."),
    ],
)
def test_a_label_file_that_does_not_fit(official: Path, text: str, message: str) -> None:
    (official / COLUMN).write_text(text)
    with pytest.raises(GmpipeError, match=rf"/{COLUMN}{message}"):
        read(official, "official")


def test_an_image_that_no_label_file_knows(official: Path) -> None:
    with (official / "ImageList/TrainImagelist.txt").open("a") as stream:
        stream.write("zoos\\0009_19.jpg\n")
    message = (
        r"Labels_concept80_Train\.txt has 3 lines, expected 4, as many as images in .*/TrainIm"
    )
    with pytest.raises(GmpipeError, match=message):
        read(official, "official")


@pytest.mark.parametrize(
    ("split", "lines", "message"),
    [
        (
            "Train",
            ["a\\1.jpg", "", "b\\1.jpg", "a\\1.jpg"],
            r"/TrainImagelist\.txt, line 4: the image 'a/1\.jpg' stands in .*/TrainImagelist\.txt, "
            r"line 1 already; expected each image once\." + AGAIN,
        ),
        (
            "Test",
            ["a\\1.jpg", "actor\\0002_12.jpg"],
            r"/TestImagelist\.txt, line 2: the image 'actor/0002_12\.jpg' stands in "
            r".*/TrainImagelist\.txt, line 2 already; expected each image once\." + AGAIN,
        ),
        ("Test", ["a\\1.jpg", "..\\1.jpg"], r"/TestImagelist\.txt, line 2: the image is '\.\./1\."),
        ("Train", ["a", "/b", "c"], r"/TrainImagelist\.txt, line 2: the image is '/b', expected a"),
    ],
)
def test_unsound_image_lists(official: Path, split: str, lines: list[str], message: str) -> None:
    (official / f"ImageList/{split}Imagelist.txt").write_text("\n".join(lines))
    with pytest.raises(GmpipeError, match=message):
        read(official, "official")


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (NAMES[1:], "80 concepts, 80 of them different"),
        ([*NAMES, "more"], "82 concepts, 82 of them different"),
        ([*NAMES[1:], NAMES[1]], "81 concepts, 80 of them different"),
        ([], "0 concepts, 0 of them different"),
    ],
)
@pytest.mark.parametrize("form", ["official", "multi-hot", "csv"])
def test_there_are_81_concepts(
    request: pytest.FixtureRequest, form: str, names: list[str], found: str
) -> None:
    root: Path = request.getfixturevalue("one_csv" if form == "csv" else form.replace("-", "_"))
    (root / "Concepts81.txt").write_text("\n".join(names))
    message = rf"/Concepts81\.txt: {found}, expected 81\. {CONCEPTS_HINT}"
    with pytest.raises(GmpipeError, match=message):
        read(root, form)


SOUND = multi_hot_line("images/z.jpg", [1])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (SOUND[:-2], r"line 3: 80 columns after the path; expected 81, each 0 or 1\." + AGAIN),
        (SOUND + " 0", r"line 3: 82 columns after the path; expected 81, each 0 or 1\." + AGAIN),
        (SOUND[:-1] + "2", r"line 3: 81 columns after the path, one of them '2'; expected 81"),
        (SOUND[:-1] + "10", r"line 3: 81 columns after the path, one of them '10'; expected 81"),
        (SOUND.replace("z.", "z z."), r"line 3: 82 columns .*, one of them 'z\.jpg'; expected"),
        ("x", r"line 3: 0 columns after the path; expected 81"),
        (
            multi_hot_line("elsewhere\\0001_11.jpg", []),
            r"line 3: the image '0001_11\.jpg' stands in .*/database\.txt, line 1 already",
        ),
        (multi_hot_line("images/", []), r"line 3: the image is '', expected a path below"),
        (multi_hot_line("images/..", []), r"line 3: the image is '\.\.', expected a path below"),
    ],
)
def test_unsound_multi_hot_lists(multi_hot: Path, line: str, message: str) -> None:
    lines = (multi_hot / "test.txt").read_text().splitlines()
    (multi_hot / "test.txt").write_text("\n".join([lines[0], "", line, lines[1]]))
    with pytest.raises(GmpipeError, match=rf"/test\.txt, {message}"):
        read(multi_hot, "multi-hot")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda path: path.unlink(),
            r"there is no .*/test\.gz\. Put it there, or set `prepare\.nuswide\.test_list` in "
            r"params\.yaml to the list's path below .*/nuswide\.$",
        ),
        (lambda path: path.write_text(SOUND), r"/test\.gz can't be read beyond line 0: Not a gzip"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-9]),
            r"/test\.gz can't be read beyond line \d+: .*" + AGAIN,
        ),
        (
            lambda path: path.write_bytes(gzip.compress(b"\xe4 0 1")),
            r"/test\.gz, line 1: the byte 0xe4 is not UTF-8\. Save the file as",
        ),
    ],
)
def test_a_packed_list_that_is_damaged(
    multi_hot: Path, spoil: Callable[[Path], object], message: str
) -> None:
    path = multi_hot / "test.gz"
    path.write_bytes(gzip.compress((multi_hot / "test.txt").read_bytes()))
    spoil(path)
    with pytest.raises(GmpipeError, match=message):
        read(multi_hot, "multi-hot", test_list="test.gz")


LIST = r"expected a list as \['clouds', 'sky'\] or \[\]\." + AGAIN


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("z.jpg", "clouds", "val"), rf"line 7: the labels are 'clouds', {LIST}"),
        (("z.jpg", "", "val"), rf"line 7: the labels are '', {LIST}"),
        (("z.jpg", "['']", "val"), rf"line 7: the labels are .*, {LIST}"),
        (("z.jpg", "['concept1',]", "val"), rf"line 7: the labels are .*, {LIST}"),
        (("z.jpg", "['concept1' 'concept2']", "val"), rf"line 7: the labels are .*, {LIST}"),
        (("z.jpg", "['concept1'", "val"), rf"line 7: the labels are .*, {LIST}"),
        (("z.jpg", "[concept1]", "val"), rf"line 7: the labels are .*, {LIST}"),
        (("z.jpg", "['concept1'] + ['concept2']", "val"), rf"line 7: the labels are .*, {LIST}"),
        (("z.jpg", "[1]", "val"), rf"line 7: the labels are '\[1\]', {LIST}"),
        (
            ("z.jpg", "['concept1', 'koncept2']", "val"),
            r"line 7: the label 'koncept2' is not in .*/Concepts81\.txt\. Mend the file or add the "
            r"label there\. Did you mean 'concept2'\?$",
        ),
        (
            ("z.jpg", "['Concept1']", "val"),
            "line 7: the label 'Concept1' is not in .* mean 'concept1'",
        ),
        (("z.jpg", "[' ']", "val"), r"line 7: one of the labels \[' '\] is empty\." + AGAIN),
        (("z.jpg", "[]", "test"), "line 7: the split is 'test', expected 'train' or 'val'"),
        (
            (TRAIN[1], "[]", "val"),
            r"line 7: the image .* stands in .*/nus_wid_data\.csv, line 3 al",
        ),
        (("../z.jpg", "[]", "val"), r"line 7: the image is '\.\./z\.jpg', expected a path below"),
        (("z.jpg", "[]", "val,more"), "line 7: found 4 cells, expected 3 as in the header"),
    ],
)
def test_unsound_rows_of_the_csv(one_csv: Path, row: tuple[str, str, str], message: str) -> None:
    (one_csv / "nus_wid_data.csv").write_text(csv_text([*csv_rows(), row]))
    with pytest.raises(GmpipeError, match=rf"/nus_wid_data\.csv, {message}"):
        read(one_csv, "csv")


def test_the_csv_is_missing_or_another_one(one_csv: Path) -> None:
    message = (
        r"there is no .*/other\.csv\. Put it there, or set `prepare\.nuswide\.file` in "
        r"params\.yaml to its path below .*/nuswide\.$"
    )
    with pytest.raises(GmpipeError, match=message):
        read(one_csv, "csv", file="other.csv")
    (one_csv / "other.csv").write_text("filename,label,split\n")
    with pytest.raises(GmpipeError, match=r"'filepath' is not a column \(perhaps 'filename'"):
        read(one_csv, "csv", file="other.csv")


def test_the_csv_alone_must_name_all_81(one_csv: Path) -> None:
    (one_csv / "Concepts81.txt").unlink()
    message = (
        r"/nus_wid_data\.csv has 5 different labels, expected 81\. Put Concepts81\.txt of the "
        r"publisher's ConceptsList\.zip at .*/nuswide/Concepts81\.txt: then"
    )
    with pytest.raises(GmpipeError, match=message):
        read(one_csv, "csv")


# --- scale ---------------------------------------------------------------------------------------

PREPARE = """
import re, sys
from pathlib import Path
from pipeline.datasets.listing import make_manifest
from pipeline.datasets.manifest import write_manifest
from pipeline.datasets.nuswide import read_nuswide
from pipeline.settings import NuswideSettings
root, settings = Path(sys.argv[1]), NuswideSettings(source="nuswide")
manifest, missing = make_manifest(read_nuswide(root, settings), "nuswide", root, settings)
write_manifest(root / "prepared" / "manifest.parquet", manifest)
# Not getrusage's maximum, which a process takes over from the one that started it.
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
print(len(manifest), missing.num_rows, int(peak[1]) // 1024)
"""


@pytest.mark.slow
def test_all_of_nuswide_takes_little_memory(tmp_path: Path) -> None:
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
