"""pipeline.datasets.readers.cells: several labels in one cell, as lists, JSON or text."""

from __future__ import annotations

import contextlib
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from refusals import refused
from trees import labels_of, read_cells

from pipeline.errors import InputError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """data/pets/, empty."""
    root = tmp_path / "pets"
    root.mkdir()
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pets")


LISTS = [
    "['cat', 'sofa']",
    "['cat','sofa',]",
    '["cat", "sofa"]',
    """['cat', "sofa"]""",
    "[ 'cat' , 'sofa' ]",
    "('cat', 'sofa')",
    "{'cat', 'sofa'}",
    "['cat' 'sofa']",
    "['cat'\n 'sofa']",
    "array(['cat', 'sofa'], dtype=object)",
    "array(['cat', 'sofa'], dtype='<U4')",
    "frozenset({'cat', 'sofa'})",
    "Index(['cat', 'sofa'], dtype='object')",
    "[np.str_('cat'), np.str_('sofa')]",
    'c("cat", "sofa")',
    '{"choices": ["cat", "sofa"]}',
    '{"labels": ["cat", "sofa"], "id": 7}',
    '[{"rectanglelabels": ["cat"], "x": 1.5}, {"rectanglelabels": ["sofa"], "x": 2}]',
    '[{"value": {"choices": ["cat", "sofa"]}, "type": "choices"}]',
    '[{"name": "cat", "score": 0.5}, {"name": "sofa", "score": 1}]',
    '[{"label": "cat"}, {"label": "sofa"}, {"label": "cat"}]',
    '[{"title": "cat", "color": "red"}, {"title": "sofa"}]',
    '{"cat": true, "dog": false, "sofa": true}',
    "{'cat': 1, 'dog': 0, 'sofa': 1}",
]


@pytest.mark.parametrize("cell", LISTS)
@pytest.mark.parametrize("separator", [";", ",", "|"])
def test_lists_and_json_are_read(root: Path, cell: str, separator: str) -> None:
    listing = read_cells(root, cell, "[]", "", separator=separator)
    assert labels_of(listing) == [["cat", "sofa"], [], []]
    [note] = listing.notes
    for part in ("labels.csv, line 2", "'cat', 'sofa'"):
        assert part in note


@pytest.mark.parametrize(
    "cell", ["[]", "{}", "()", "set()", "frozenset()", "array([], dtype=object)", "character(0)"]
)
def test_empty_lists_have_no_labels(root: Path, cell: str) -> None:
    listing = read_cells(root, cell, "cat;dog")
    assert labels_of(listing) == [[], ["cat", "dog"]]
    assert listing.notes == ()


@pytest.mark.parametrize(
    ("cell", "labels"),
    [
        (r"""['it\'s', "5\" nail"]""", ["it's", '5" nail']),
        ('["caf\\u00e9", "a;b"]', ["café", "a;b"]),
        ("['traffic light', 'a, b']", ["traffic light", "a, b"]),
        ("[17, 3]", ["17", "3"]),
        ("['cat']", ["cat"]),
    ],
)
def test_names_in_lists_are_taken_whole(root: Path, cell: str, labels: list[str]) -> None:
    assert labels_of(read_cells(root, cell)) == [sorted(labels)]


def test_lists_and_plain_text_in_one_column(root: Path) -> None:
    # Label Studio writes a single choice as text, and several as JSON.
    listing = read_cells(root, "cat", '{"choices": ["cat", "traffic light"]}', "traffic light")
    assert labels_of(listing) == [["cat"], ["cat", "traffic light"], ["traffic light"]]
    [note] = listing.notes
    for part in ("(1 cell)", "labels.csv, line 3", "(2 cells,", "labels.csv, line 2"):
        assert part in note


@pytest.mark.parametrize(
    ("cell", "parts"),
    [
        ("['cat', 'sofa'", ["['cat', 'sofa'"]),
        ("'cat', 'sofa']", ["'cat', 'sofa']"]),
        ("'cat', 'sofa'", ["'cat', 'sofa'"]),
        ("[cat, sofa]", ["[cat, sofa]"]),
        ("['cat' 'sofa', 'dog']", ["['cat' 'sofa', 'dog']"]),
        ("['a' 'b' ... 'z']", ["['a' 'b' ... 'z']"]),
        ('{"choices": ["cat", "sofa"', ['{"choices"']),
        ("['cat', None]", ["['cat', None]", "None is not a name"]),
        ("[['cat'], ['sofa']]", ["['cat']"]),
        ("[1.5]", ["1.5 is not a name"]),
        ('[{"id": 7}]', ["'id'", "choices"]),
        ("[0, 1, 1]", ["[0, 1, 1]", "['cat']"]),
        ("['cat', 3]", ["numbers and names"]),
        ("[__import__('os').getcwd()]", ["__import__"]),
        ("[" * 2000 + "'cat'" + "]" * 2000, ["[[["]),
        ("['cat', '']", ["empty"]),
    ],
)
def test_damaged_list_among_lists_is_named_with_its_row(
    root: Path, cell: str, parts: list[str]
) -> None:
    with refused(InputError, "labels.csv, line 4: ", *parts):
        read_cells(root, "['cat']", "['dog', 'sofa']", cell, "['dog']")


@pytest.mark.parametrize(
    ("cell", "labels"),
    [
        ('{"name": "box 1", "labels": ["cat", "sofa"]}', ["cat", "sofa"]),
        ('{"title": "x", "labels": ["a"]}', ["a"]),
        ('{"name": "box 1", "label": "cat"}', ["cat"]),
        ('{"class": "cat", "label": ""}', ["cat"]),
        ('{"label": " ", "tag": null, "title": "cat"}', ["cat"]),
        ('{"tags": [], "category": "cat"}', ["cat"]),
        ('{"label": "cat", "labels": ["cat", "sofa"]}', ["cat", "sofa"]),
        ('{"tags": ["cat"], "category": "cat"}', ["cat"]),
        ('{"class": 3, "class_name": "cat"}', ["cat"]),
        ('{"name": "q", "value": {"choices": ["cat"]}}', ["cat"]),
        ('{"category": {"id": 1, "name": "cat"}}', ["cat"]),
        ('[{"category": "cat", "id": 1}, {"category": "sofa", "id": 0}]', ["cat", "sofa"]),
        ('{"labels": {"cat": 1, "dog": 0}}', ["cat"]),
        ('{"tag": true, "cat": false}', ["tag"]),
        ('{"cat": true}', ["cat"]),
        ('{"cat": 1, "dog": 0, "sofa": 1.0}', ["cat", "sofa"]),
        ('{"choices": []}', []),
        ('{"label": null}', []),
        ('{"value": {"choices": []}}', []),
    ],
)
def test_keys_of_objects(root: Path, cell: str, labels: list[str]) -> None:
    assert labels_of(read_cells(root, "other", cell)) == [["other"], labels]


@pytest.mark.parametrize(
    ("cell", "parts"),
    [
        ('[{"id": 1}]', ["'id'", "choices"]),
        ('{"id": 1, "x": 0}', ["0 and 1"]),
        ('{"cat": 1}', ["'cat'", "choices"]),
        ('{"tag": 1, "cat": 0}', ["0 and 1", "truth values"]),
        ('{"label": true}', ["True is not a name"]),
        ('[{"cat": true, "dog": false}]', ["'cat'", "'dog'", "choices"]),
        ('{"cat": 0.9, "dog": 0.1}', ["'cat'", "'dog'", "choices"]),
        ('{"class": "cat", "category": "animal"}', ["cat", "'class'", "animal", "'category'"]),
        ('{"label": "cat", "tags": ["night"]}', ["cat", "'label'", "night", "'tags'"]),
        ('{"name": "box 1", "title": "cat"}', ["box 1", "'name'", "cat", "'title'"]),
    ],
)
def test_object_whose_meaning_is_not_plain(root: Path, cell: str, parts: list[str]) -> None:
    with refused(InputError, "labels.csv, line 3: ", *parts):
        read_cells(root, "other", cell)


@pytest.mark.parametrize(
    "cells",
    [
        ["[0, 3]", "[2]", "[0, 1]"],
        ["[0, 1]", "[1]"],
        ["[0, 1]", "[2, 0]"],
        ["[]", "[1]", "[0]"],
        ["[0 3]", "[2.]", "[0. 1.]"],
    ],
)
def test_numbers_of_classes(root: Path, cells: list[str]) -> None:
    numbers = [[n for n in "0123" if n in cell] for cell in cells]
    assert labels_of(read_cells(root, *cells)) == numbers


@pytest.mark.parametrize(
    "cells",
    [["[0, 1, 1]", "[1, 0, 0]"], ["[0 1 1]", "[1 0 0]"], ["[0. 1. 1.]", "[1. 0. 0.]"], ["[1,1]"]],
)
def test_lists_of_0_and_1_are_refused(root: Path, cells: list[str]) -> None:
    with refused(
        InputError, "labels.csv, line 2: ", cells[0], "column per label", "`prepare.pets.labels`"
    ):
        read_cells(root, *cells)


pieces = st.sampled_from(
    [
        "[",
        "]",
        "{",
        "}",
        "(",
        ")",
        "'",
        '"',
        ",",
        " ",
        ":",
        "cat",
        "1",
        "0",
        "None",
        "\\",
        "b",
        "\n",
    ]
)


@given(cells=st.lists(st.lists(pieces, max_size=9).map("".join), min_size=1, max_size=4))
@hypothesis_settings(max_examples=100)
def test_any_cell_is_read_or_refused(folder: Path, cells: list[str]) -> None:
    with contextlib.suppress(InputError):
        assert len(read_cells(folder, *cells).table) == len(cells)


def test_brackets_that_belong_to_a_label(root: Path) -> None:
    listing = read_cells(root, "[x];(other)", "cat", "{y}", "cat;dog")
    assert labels_of(listing) == [["(other)", "[x]"], ["cat"], ["{y}"], ["cat", "dog"]]
    assert listing.notes == ()


def test_brackets_without_quotes_are_lists_if_most_cells_have_them(root: Path) -> None:
    listing = read_cells(root, "[cat, sofa]", "[dog]", "[ ]", "")
    assert labels_of(listing) == [["cat", "sofa"], ["dog"], [], []]
    [note] = listing.notes
    for part in ("labels.csv, line 2", "'cat', 'sofa'"):
        assert part in note


@pytest.mark.parametrize(
    ("separator", "cells", "mark"),
    [
        (";", ["[cat;sofa]", "[dog]", "[a, b; dog]"], ";"),
        ("|", ["[cat|sofa]", "[dog]", "[a, b |dog]"], "|"),
        (" ", ["[cat sofa]", "[dog]", "[a,b  dog]"], ","),
    ],
)
def test_brackets_are_split_by_the_separator_of_the_settings(
    root: Path, separator: str, cells: list[str], mark: str
) -> None:
    listing = read_cells(root, *cells[:2], separator=separator)
    assert labels_of(listing) == [["cat", "sofa"], ["dog"]]
    [note] = listing.notes
    assert repr(separator) in note
    listing = read_cells(root, *cells, separator=separator)
    expected = [["cat sofa"], ["dog"], ["a", "b  dog"]]
    if mark != ",":
        expected = [["cat", "sofa"], ["dog"], ["a, b", "dog"]]
    assert labels_of(listing) == expected


@pytest.mark.parametrize(
    ("cells", "settings", "wanted"),
    [
        (["[cat|sofa]", "[dog|sofa]"], {}, '`prepare.pets.separator: "|"`'),
        (["cat|sofa", "dog|sofa"], {}, '`prepare.pets.separator: "|"`'),
        (["['cat|sofa']", "dog|sofa", "['dog']"], {}, "entry"),
        (["['cat;sofa']", "['dog;sofa']", "['dog']"], {}, "entry"),
        (["['cat;sofa']", "['dog;sofa']", "['dog']"], {"separator": ","}, "entry"),
    ],
)
def test_a_note_advises_what_helps(
    root: Path, cells: list[str], settings: dict[str, str], wanted: str
) -> None:
    *_, note = read_cells(root, *cells, **settings).notes
    assert wanted in note
    assert ("separator:" in note) == ("separator:" in wanted)


def test_entry_of_a_list_that_is_several_labels(root: Path) -> None:
    with refused(InputError, "labels.csv, line 3", "'cat | dog'", "entry of the list"):
        read_cells(root, "cat", "['cat | dog']", vocabulary=["cat", "dog"])
    with refused(InputError, "labels.csv, line 3", "'cat | dog'", '`separator: "|"`'):
        read_cells(root, "['cat']", "cat | dog", vocabulary=["cat", "dog"])


@pytest.mark.parametrize(
    ("cells", "mark"),
    [
        (["16 0", "7 1 2 0", "5", "18", "0 25"], " "),
        (["3, 17", "12,4", "5"], ","),
        (["0,5", "0,7"], ","),
        (["cat,sofa", "dog", "tree, person"], ","),
    ],
)
def test_separators_that_other_programs_write(root: Path, cells: list[str], mark: str) -> None:
    *_, note = read_cells(root, *cells).notes
    for part in ("labels.csv, line ", f'`prepare.pets.separator: "{mark}"`'):
        assert part in note
    listing = read_cells(root, *cells, separator=mark)
    assert labels_of(listing)[0] == sorted(part.strip() for part in cells[0].split(mark))
    assert not any("separator" in note for note in listing.notes)


def test_names_with_a_comma_beside_several_labels_are_not_noted(root: Path) -> None:
    assert read_cells(root, "salt, pepper", "cat;dog").notes == ()


@pytest.mark.parametrize("cells", [["3", "12", ""], ["3.0", "12.0"], ["0;1", "1"]])
def test_numbers_as_labels_are_noted(root: Path, cells: list[str]) -> None:
    listing = read_cells(root, *cells)
    [note] = listing.notes
    for name in listing.vocabulary:
        assert repr(name) in note
    assert "`" not in note  # no setting changes this


# --- words for nothing ---------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["nan", "NaN", "<NA>", "None", "NULL", "null", "#N/A", "NaT"])
def test_words_that_programs_write_for_an_empty_cell(root: Path, word: str) -> None:
    listing = read_cells(root, "cat", word, word, "dog")
    assert labels_of(listing) == [["cat"], [], [], ["dog"]]
    [note] = listing.notes
    for part in ("2 cells", repr(word), "labels.csv, line 3", "`prepare.pets.vocabulary`"):
        assert part in note
    listing = read_cells(root, "cat", word, word, "dog", vocabulary=["cat", "dog", word])
    assert labels_of(listing) == [["cat"], [word], [word], ["dog"]]


@pytest.mark.parametrize("cell", ["N/A", "n/a", "none", "-", "NA", "?", "cat;nan"])
def test_words_of_people_are_labels_and_noted(root: Path, cell: str) -> None:
    listing = read_cells(root, "cat", cell, cell)
    word = cell.rpartition(";")[2]
    assert word in listing.vocabulary
    [note] = listing.notes
    for part in (repr(word), "rows: 2", "labels.csv, line 3"):
        assert part in note


def test_zero_and_one_as_labels_are_noted(root: Path) -> None:
    listing = read_cells(root, "0", "1", "1")
    assert listing.vocabulary == ("0", "1")
    [note] = listing.notes
    for part in ("'0'", "'1'", "`prepare.pets.labels: [labels]`"):
        assert part in note


# --- forms of Unicode ----------------------------------------------------------------------------


def test_labels_that_look_alike_are_one(root: Path) -> None:
    forms = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
    hidden = ["\ufeffcafé", "café\u200b", "\u00a0café", "ca\u2060fé\u200d", "café\u2009"]
    listing = read_cells(root, *forms, *hidden, "caf\u00e9 noir;cafe\u0301\u00a0noir")
    assert listing.vocabulary == ("café", "café noir")
    assert labels_of(listing) == [["café"]] * 7 + [["café noir"]]
    for form in forms:
        listing = read_cells(root, *forms, vocabulary=[form])
        assert listing.vocabulary == (forms[0],)
        assert labels_of(listing) == [["café"], ["café"]]
