"""pipeline.datasets.spelling: two spellings of one label, and several labels in one name."""

from __future__ import annotations

import pytest

from pipeline.datasets.spelling import packed_labels, similar_labels


@pytest.mark.parametrize(
    ("first", "second", "similar"),
    [
        ("dining table", "Dining_Table", True),
        ("t-shirt", "tshirt", True),
        ("dog", "dogs", True),
        ("person", "preson", True),
        ("person", "persan", True),
        ("person", "pesron", True),
        ("person", "erson", True),
        ("cat", "car", False),
        ("boat", "coat", False),
        ("ox", "fox", False),
        ("grade 11", "grade 12", False),
        ("room", "room 2", False),
        ("abcde", "bcdea", False),
        ("person", "prosen", False),
        ("window", "winners", False),
    ],
)
def test_similar_labels(first: str, second: str, similar: bool) -> None:
    for pair in ((first, second), (second, first)):
        assert similar_labels(pair) == ([pair] if similar else [])


def test_similar_labels_among_thousands() -> None:
    names = [
        f"{number:05d}".translate(str.maketrans("0123456789", "abcdefghij")) * 3
        for number in range(1 << 12)
    ]
    assert similar_labels([*names, "aaaaaaaaaaaaaaax"]) == [(names[0], "aaaaaaaaaaaaaaax")]


PAIRS = ["cat", "dog", "cat{0}sofa", "dog{0}sofa"]
"""Labels of a column of which the separator is another one."""


@pytest.mark.parametrize("mark", ["|", ";", ",", ", ", "/", " / ", "+", " & ", " ", "\t", "\n"])
def test_names_that_are_made_of_the_parts_of_others(mark: str) -> None:
    names = [name.format(mark) for name in PAIRS]
    assert packed_labels(names) == (mark.strip(" ") or " ", names[2:])


@pytest.mark.parametrize(
    "names",
    [
        ["traffic light", "stop sign", "fire hydrant", "light", "parking meter", "wine glass"],
        ["tench, Tinca tinca", "goldfish, Carassius auratus", "great white shark, white shark"],
        ["shark, great white", "shark, tiger", "whale"],
        ["indoor/kitchen", "indoor/office", "outdoor/street", "outdoor/park"],
        ["and/or", "C++", "R&B", "a/", "/b"],
        ["red car", "blue car", "red bus", "blue bus"],
        ["hot dog", "dog", "cat"],
        ["cat", "dog"],
        ["a|b", "cat", "dog"],
    ],
)
def test_marks_of_their_own_in_names(names: list[str]) -> None:
    assert packed_labels(names) is None


def test_most_combinations_need_not_be_complete() -> None:
    names = ["cat,bowl", "cat,plant", "dog,sofa", "dog,tree,person", "dog,tree", "dog,person"]
    assert packed_labels(names) == (",", names)


@pytest.mark.parametrize("mark", ["|", ";", "\t"])
def test_marks_that_names_never_have(mark: str) -> None:
    assert packed_labels([f"cat{mark}dog"]) == (mark, [f"cat{mark}dog"])
