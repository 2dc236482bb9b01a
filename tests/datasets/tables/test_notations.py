"""pipeline.datasets.readers.cells: notations that only a whole column shows, and odd labels."""

from __future__ import annotations

from pathlib import Path

import pytest
from refusals import refused
from trees import labels_of, read_cells

from pipeline.errors import InputError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """data/pets/, empty."""
    root = tmp_path / "pets"
    root.mkdir()
    return root


@pytest.mark.parametrize(
    ("cells", "labels"),
    [
        (["{cat,dog}", "{dog}", "{}", ""], [["cat", "dog"], ["dog"], [], []]),
        (['{cat,"traffic light"}', '{"a, b"}'], [["cat", "traffic light"], ["a, b"]]),
        (["(cat, dog)", "(dog)", "nan"], [["cat", "dog"], ["dog"], []]),
        (["(cat; dog)", "(dog)"], [["cat", "dog"], ["dog"]]),
        (['"cat", "dog"', '"dog"'], [["cat", "dog"], ["dog"]]),
        (["'cat'; 'dog'", "'dog'"], [["cat", "dog"], ["dog"]]),
        (["[np.int64(3), np.int64(14)]", "[np.int64(3)]"], [["14", "3"], ["3"]]),
    ],
)
def test_column_of_lists_in_another_notation(
    root: Path, cells: list[str], labels: list[list[str]]
) -> None:
    listing = read_cells(root, *cells)
    assert labels_of(listing) == labels
    assert "labels.csv, line 2" in listing.notes[0]


def test_brackets_around_few_labels_belong_to_them(root: Path) -> None:
    cells = ["(cat)", "{dog}", "cat (old)", '"x"']
    listing = read_cells(root, *cells)
    assert labels_of(listing) == [[cell] for cell in cells]


@pytest.mark.parametrize(
    "cell",
    [
        '"cat", "sofa"',
        "<Labels: {'a': [<Label: {'label': 'cat'}>, <Label: {'label': 'dog'}>]}>",
        'list("cat", dog)',
    ],
)
def test_no_mark_is_advised_that_would_cut_brackets_or_quotes(root: Path, cell: str) -> None:
    [note] = read_cells(root, cell, "dog").notes
    assert "separator:" not in note
    for part in ("labels.csv, line 2", repr(cell), "';'"):
        assert part in note


@pytest.mark.parametrize(
    "cells", [["1 0 0", "0 1 1"], ["1,0,0", "0,1,1", ""], ["1. 0.", "0. 1."], ["(1, 0)", "(0, 1)"]]
)
def test_vectors_of_0_and_1_are_refused(root: Path, cells: list[str]) -> None:
    with refused(
        InputError, "labels.csv, line 2: ", repr(cells[0]), "column per label", "pets.labels`"
    ):
        read_cells(root, *cells)


@pytest.mark.parametrize(
    ("cells", "parts"),
    [
        (["True", "False"], ["'True'", "'False'", "`prepare.pets.labels: [labels]`"]),
        (["yes", "no", ""], ["'yes'", "'no'", "`prepare.pets.labels: [labels]`"]),
        (["1", "-1"], ["'1'", "'-1'", "write 1", "`prepare.pets.labels: [labels]`"]),
        (["Y", "N"], ["'Y'", "'N'", "write 1", "`prepare.pets.labels: [labels]`"]),
    ],
)
def test_yes_and_no_as_labels_are_noted(root: Path, cells: list[str], parts: list[str]) -> None:
    [note] = read_cells(root, *cells).notes
    for part in parts:
        assert part in note


@pytest.mark.parametrize(
    ("cells", "labels"),
    [
        (
            ['{"animals": {"cat": true, "dog": true}}', '{"animals": {"cat": false}}', "{}", ""],
            [["cat", "dog"], [], [], []],
        ),
        (['{"type": "cat"}', '{"type": "dog"}', '{"type": ""}'], [["cat"], ["dog"], []]),
    ],
)
def test_attributes_of_via(root: Path, cells: list[str], labels: list[list[str]]) -> None:
    listing = read_cells(root, *cells)
    assert labels_of(listing) == labels
    [note] = listing.notes
    assert "labels.csv, line 2" in note


def test_objects_with_several_keys_are_refused(root: Path) -> None:
    with refused(InputError, "labels.csv, line 2: ", "'type'"):
        read_cells(root, '{"type": "cat"}', '{"kind": "dog"}')


@pytest.mark.parametrize("cell", ["[nan]", "[None]", "['']", '[""]', '""', "(null)"])
@pytest.mark.parametrize("other", ["cat;dog", "['cat', 'dog']"])
def test_list_of_nothing_is_no_label(root: Path, cell: str, other: str) -> None:
    listing = read_cells(root, cell, other, cell)
    assert labels_of(listing) == [[], ["cat", "dog"], []]
    note = listing.notes[-1]
    for part in ("2 cells", repr(cell), "labels.csv, line 2"):
        assert part in note


def test_list_of_a_word_that_is_in_the_vocabulary(root: Path) -> None:
    listing = read_cells(root, "['nan']", "cat", vocabulary=["cat", "nan"])
    assert labels_of(listing) == [["nan"], ["cat"]]


@pytest.mark.parametrize("mark", [" - ", " and ", "；", "、", ":", "\\", "_"])
def test_marks_that_people_write(root: Path, mark: str) -> None:
    cells = ["cat", "dog", f"cat{mark}dog", f"dog{mark}sofa", f"cat{mark}sofa"]
    [note] = read_cells(root, *cells).notes
    separator = mark if mark != "\\" else "\\\\"
    assert f'`prepare.pets.separator: "{separator}"`' in note
    listing = read_cells(root, *cells, separator=mark)
    assert labels_of(listing)[2:] == [["cat", "dog"], ["dog", "sofa"], ["cat", "sofa"]]


@pytest.mark.parametrize(
    "cells",
    [
        ["red dress", "red", "dress"],
        ["red;dress", "red dress", "blue dress", "blue"],
        ["hot_dog", "hot", "dog"],
    ],
)
def test_names_that_others_are_part_of_are_not_noted(root: Path, cells: list[str]) -> None:
    assert read_cells(root, *cells).notes == ()


@pytest.mark.parametrize(
    ("cells", "parts"),
    [
        (["cat:0.9;dog:0.9", "cat:0.7"], ["'cat:0.7'", "line 3", "number"]),
        (["cat &amp; kitten", "dog"], ["'cat &amp'", "line 2", "HTML"]),
        (["caf&#233; noir", "dog"], ["'caf&#233'", "line 2", "HTML"]),
    ],
)
def test_labels_with_what_is_no_name(root: Path, cells: list[str], parts: list[str]) -> None:
    [note] = read_cells(root, *cells).notes
    assert "separator:" not in note
    for part in parts:
        assert part in note
