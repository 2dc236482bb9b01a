"""What publishers define about their data sets, by the data set's source."""

from __future__ import annotations

import pytest

from pipeline.datasets.groups import LABEL_GROUPS, has_eleven_points, label_groups
from pipeline.datasets.readers.voc import VOCABULARY


@pytest.mark.parametrize(
    ("source", "labels", "expected"),
    [
        ("voc", VOCABULARY, True),
        ("voc", ("cat", "dog"), True),  # one's own classes in VOC's layout
        ("imported", VOCABULARY, True),
        ("imported", VOCABULARY[::-1], True),
        ("imported", VOCABULARY[1:], False),
        ("table", (*VOCABULARY, "lamp"), False),
        ("coco", ("person",), False),
    ],
)
def test_vocs_metric_follows_the_source(
    source: str, labels: tuple[str, ...], expected: bool
) -> None:
    assert has_eleven_points(source, labels) == expected


def test_groups_are_those_of_the_source_and_cover_vocs_classes() -> None:
    assert label_groups("voc", VOCABULARY) == LABEL_GROUPS["voc"]
    assert label_groups("voc", ("lamp",)) is None
    assert label_groups("table", VOCABULARY) is None
