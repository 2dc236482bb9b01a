"""pipeline.datasets.readers.voc: labels and boxes of a devkit, and what breaks its format."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from refusals import refused
from trees import VOC_TEST, VOC_TRAIN, Voc, VocObject, make_voc, placed, voc_xml

from pipeline.datasets.listing import Listing
from pipeline.datasets.readers.voc import VOCABULARY, read_voc
from pipeline.errors import InputError, MissingError
from pipeline.settings import VocSettings

ANNOTATIONS = VocSettings(source="voc")
LISTS = VocSettings(source="voc", labels="lists")
DEVKIT = (
    *("ImageSets/Main/", "Annotations/", "JPEGImages/", "VOCdevkit/VOC2007"),
    *("VOCtrainval_06-Nov-2007.tar", "VOCtest_06-Nov-2007.tar"),
)
"""What the message about a missing file says of VOC 2007's layout."""


def names_of(listing: Listing) -> dict[str, tuple[str, set[str], set[str]]]:
    """Image id -> its split, and the names of its labels and its ignored labels."""
    return {
        row["image_id"]: (
            row["split"],
            {VOCABULARY[label] for label in row["labels"]},
            {VOCABULARY[label] for label in row["ignored"]},
        )
        for row in listing.table.to_pylist()
    }


EXPECTED = {
    "000001": ("train", {"dog"}, set()),
    "000012": ("train", {"aeroplane", "cow"}, {"person"}),
    "2008_000003": ("train", set(), set()),
    "000004": ("test", {"tvmonitor"}, set()),
    "000005": ("test", set(), {"cat"}),
}


# --- a valid devkit ------------------------------------------------------------------------------


@pytest.mark.parametrize("newline", ["\n", "\r\n", " \r\n", "\t\n\n", "\r\n \r\n"])
@pytest.mark.parametrize("settings", [ANNOTATIONS, LISTS])
def test_annotations_and_lists_give_the_same_labels(
    tmp_path: Path, settings: VocSettings, newline: str
) -> None:
    make_voc(tmp_path, newline=newline)
    listing = read_voc(tmp_path, settings)
    assert names_of(listing) == EXPECTED
    assert listing.split_name == "official"
    assert listing.table.column("path").to_pylist() == [
        f"VOCdevkit/VOC2007/JPEGImages/{image_id}.jpg" for image_id in EXPECTED
    ]
    size = (20, 10) if settings is ANNOTATIONS else (None, None)
    for row in listing.table.to_pylist():
        assert (row["width"], row["height"]) == size
        assert row["labels"] == sorted(row["labels"])


def test_vocabulary_is_alphabetical() -> None:
    assert len(VOCABULARY) == 20
    assert list(VOCABULARY) == sorted(VOCABULARY)


def test_boxes_start_at_pixel_one_and_include_both_ends(tmp_path: Path) -> None:
    make_voc(tmp_path)
    boxes = placed(read_voc(tmp_path, ANNOTATIONS), tmp_path)
    assert boxes.classes == VOCABULARY
    # The difficult dog is left out.
    assert boxes.images["000001"].classes.tolist() == [VOCABULARY.index("dog") + 1]
    np.testing.assert_array_equal(boxes.images["000001"].boxes, [[0, 0, 0.5, 0.5]])
    # One pixel of 20 x 10, the third from the left in the second row.
    np.testing.assert_allclose(boxes.images["000004"].boxes, [[0.1, 0.1, 0.15, 0.2]], rtol=1e-6)
    assert boxes.images["000012"].classes.tolist() == [1, 10]
    assert len(boxes.images["000005"].classes) == 0
    assert boxes.images["000005"].boxes.shape == (0, 4)
    assert read_voc(tmp_path, LISTS).boxes is None


def test_boxes_are_clipped_to_their_image(tmp_path: Path) -> None:
    make_voc(tmp_path, {"000001": [VocObject("cat", (0, -3, 25.5, 10.0))]})
    boxes = placed(read_voc(tmp_path, ANNOTATIONS), tmp_path)
    np.testing.assert_array_equal(boxes.images["000001"].boxes, [[0, 0, 1, 1]])


def test_parts_of_an_object_are_not_objects(tmp_path: Path) -> None:
    top = make_voc(tmp_path)
    path = top / "Annotations/000004.xml"
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part></object>"
    path.write_text(path.read_text().replace("</object>", part))
    assert names_of(read_voc(tmp_path, ANNOTATIONS)) == EXPECTED


def test_folder_of_the_devkit_is_a_setting(tmp_path: Path) -> None:
    make_voc(tmp_path, folder="kit")
    for folder in ("kit", "kit/", "./kit"):
        listing = read_voc(tmp_path, ANNOTATIONS.model_copy(update={"folder": folder}))
        assert listing.table.column("path")[0].as_py() == "kit/JPEGImages/000001.jpg"
        assert sorted(listing.sources) == [
            "kit/Annotations",
            "kit/ImageSets/Main/test.txt",
            "kit/ImageSets/Main/trainval.txt",
        ]


OWN: dict[str, Voc] = {
    "train": {"b1": [VocObject("wasp", (1, 1, 10, 5)), VocObject("bee", difficult=1)], "b2": []},
    "test": {"b3": [VocObject("bee")]},
}


@pytest.mark.parametrize("settings", [ANNOTATIONS, LISTS])
def test_vocabulary_of_another_data_set_in_this_layout(
    tmp_path: Path, settings: VocSettings
) -> None:
    classes = ("wasp", "bee")  # in the order of the settings
    make_voc(tmp_path, OWN["train"], OWN["test"], vocabulary=classes)
    listing = read_voc(tmp_path, settings.model_copy(update={"vocabulary": list(classes)}))
    assert (listing.vocabulary, listing.split_name) == (classes, "own")
    columns = ("labels", "ignored", "split")
    assert [[row[name] for name in columns] for row in listing.table.to_pylist()] == [
        [[0], [1], "train"],
        [[], [], "train"],
        [[1], [], "test"],
    ]
    if listing.boxes is not None:
        boxes = placed(listing, tmp_path)
        assert boxes.classes == classes
        assert boxes.images["b3"].classes.tolist() == [2]


def test_error_of_another_data_set_does_not_mention_voc_archives(tmp_path: Path) -> None:
    make_voc(tmp_path, OWN["train"], OWN["test"], vocabulary=["wasp", "bee"])
    (tmp_path / "VOCdevkit/VOC2007/Annotations/b3.xml").unlink()
    own = ANNOTATIONS.model_copy(update={"vocabulary": ["wasp", "bee"]})
    with pytest.raises(MissingError, match=r"/VOC2007.*/b3\.xml") as caught:
        read_voc(tmp_path, own)
    assert ".tar" not in str(caught.value)
    with refused(InputError, "('wasp')", "`prepare.<dataset>.vocabulary`", "params.yaml"):
        read_voc(tmp_path, ANNOTATIONS)


def test_sources_cover_every_file_that_decides_the_labels(tmp_path: Path) -> None:
    top = make_voc(tmp_path)
    before = [read_voc(tmp_path, settings).sources for settings in (ANNOTATIONS, LISTS)]
    assert len(before[1]) == 2 + 2 * 20
    path = top / "Annotations/000004.xml"
    path.write_text(voc_xml([VocObject("cow")]))
    after = [read_voc(tmp_path, settings).sources for settings in (ANNOTATIONS, LISTS)]
    assert {name for name in after[0] if after[0][name] != before[0][name]} == {
        "VOCdevkit/VOC2007/Annotations"
    }
    assert after[1] == before[1]


objects = st.builds(
    VocObject,
    st.sampled_from(VOCABULARY[::4]),
    difficult=st.sampled_from([0, 1]),
)
split = st.lists(st.lists(objects, max_size=5), min_size=1, max_size=4)


@given(train=split, test=split)
@hypothesis_settings(max_examples=15)
def test_annotations_and_lists_agree_on_any_devkit(
    tmp_path_factory: pytest.TempPathFactory,
    train: list[list[VocObject]],
    test: list[list[VocObject]],
) -> None:
    root = tmp_path_factory.mktemp("voc")
    make_voc(
        root,
        {f"{number:06d}": items for number, items in enumerate(train)},
        {f"{number:06d}": items for number, items in enumerate(test, start=900)},
    )
    assert names_of(read_voc(root, ANNOTATIONS)) == names_of(read_voc(root, LISTS))


def test_real_sample(shared: Path) -> None:
    """Compared with another reader: regular expressions on the XML, numpy on the lists."""
    root = shared / "data/voc2007-sample"
    top = root / "VOCdevkit/VOC2007"
    listing = read_voc(root, ANNOTATIONS)
    assert names_of(listing) == names_of(read_voc(root, LISTS))
    assert listing.table.column("split").to_pylist() == ["train"] * 240 + ["test"] * 160
    for number, name in enumerate(VOCABULARY):
        values = np.concatenate(
            [
                np.loadtxt(top / f"ImageSets/Main/{name}_{split}.txt", dtype=int)
                for split in ("trainval", "test")
            ]
        )
        for row, (image_id, value) in zip(listing.table.to_pylist(), values.tolist(), strict=True):
            assert int(row["image_id"]) == image_id
            assert (number in row["labels"], number in row["ignored"]) == (value == 1, value == 0)
    boxes = placed(listing, root)
    assert not boxes.incomplete
    objects = 0
    for row in listing.table.to_pylist():
        text = (top / f"Annotations/{row['image_id']}.xml").read_text()
        text = re.sub("<part>.*?</part>", "", text, flags=re.DOTALL)  # heads, hands and feet
        easy = [item for item in text.split("<object>")[1:] if "<difficult>0<" in item]
        classes = [re.findall("<name>([a-z]+)<", item)[0] for item in easy]
        corners = [re.findall(r"<[xy]m(?:in|ax)>(\d+)<", item)[:4] for item in easy]
        pixels = np.array(corners, dtype=int).reshape(-1, 4)  # xmin, ymin, xmax, ymax
        image = boxes.images[row["image_id"]]
        assert [VOCABULARY[number - 1] for number in image.classes] == classes
        scale = np.array([row["width"], row["height"]] * 2)
        np.testing.assert_allclose(image.boxes * scale, pixels - [1, 1, 0, 0], atol=1e-3)
        objects += len(easy)
    assert objects > 800


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (ANNOTATIONS, "ImageSets/Main/trainval.txt"),
        (ANNOTATIONS, "ImageSets/Main/test.txt"),
        (ANNOTATIONS, "Annotations/000004.xml"),
        (LISTS, "ImageSets/Main/sofa_trainval.txt"),
        (LISTS, "ImageSets/Main/tvmonitor_test.txt"),
    ],
)
def test_missing_or_unreadable_file_is_named(
    tmp_path: Path, settings: VocSettings, name: str
) -> None:
    path = make_voc(tmp_path) / name
    content = path.read_bytes()
    path.unlink()
    with refused(MissingError, str(path), *DEVKIT):
        read_voc(tmp_path, settings)
    path.mkdir()
    with refused(InputError, str(path), "folder", *DEVKIT):
        read_voc(tmp_path, settings)
    path.rmdir()
    path.write_bytes(content + b"\n\xff\xfe \n")
    with refused(InputError, str(path)):
        read_voc(tmp_path, settings)


def test_empty_root(tmp_path: Path) -> None:
    with refused(MissingError, "trainval.txt", *DEVKIT):
        read_voc(tmp_path / "voc2007", ANNOTATIONS)
    (tmp_path / "file").touch()
    with refused(MissingError, "trainval.txt"):
        read_voc(tmp_path / "file", ANNOTATIONS)


@pytest.mark.parametrize(
    ("name", "line", "parts"),
    [
        ("trainval", "000007 -1", ["'000007 -1'", "000005"]),
        ("trainval", "../000007", ["'../000007'"]),
        ("test", "/else/where", ["'/else/where'"]),
        ("trainval", "000012", ["000012", "train"]),
        ("test", "000012", ["000012", "train"]),
    ],
)
def test_invalid_line_of_an_image_list_is_named(
    tmp_path: Path, name: str, line: str, parts: list[str]
) -> None:
    path = make_voc(tmp_path) / f"ImageSets/Main/{name}.txt"
    number = len(path.read_text().splitlines()) + 2
    path.write_text(path.read_text() + f"\n{line}\n")
    with refused(InputError, f"{path}, line {number}: ", *parts):
        read_voc(tmp_path, ANNOTATIONS)


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("000001", ["'000001'", "1, 0 (difficult) or -1"]),
        ("000001 2", ["'000001 2'"]),
        ("000001 1 1", ["'000001 1 1'"]),
        ("000001 +1", ["'000001 +1'"]),
        ("000001 1", ["image 000001"]),
        ("000004 1", ["image 000004"]),
    ],
)
def test_invalid_line_of_a_class_list_is_named(tmp_path: Path, line: str, parts: list[str]) -> None:
    path = make_voc(tmp_path) / "ImageSets/Main/bus_trainval.txt"
    path.write_text(path.read_text() + f"{line}\n")
    with refused(InputError, f"{path}, line 4: ", *parts):
        read_voc(tmp_path, LISTS)


def test_class_list_without_an_image(tmp_path: Path) -> None:
    path = make_voc(tmp_path) / "ImageSets/Main/bus_trainval.txt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:1]))
    with refused(InputError, "bus_trainval.txt: 2 of", "3 images", "000012"):
        read_voc(tmp_path, LISTS)


def replaced(before: str, after: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        assert before in text
        return text.replace(before, after, 1)

    return change


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda text: "", ["no element found", "VOCtrainval_06-Nov-2007.tar"]),
        (lambda text: text[:-20], ["unclosed token: line 2"]),
        (replaced("</name>", "</nam>"), ["mismatched tag: line 2"]),
        (replaced("tvmonitor", "tv"), ["object 1 ('tv')", "aeroplane, "]),
        (replaced("<name>tvmonitor</name>", ""), ["object 1 ('')", "aeroplane, "]),
        (replaced("size>", "sizes>"), ["mismatched tag"]),
        (lambda text: text.replace("annotation>", "annotations>"), ["<annotations>"]),
        (
            replaced("<difficult>0", "<difficult>2"),
            ["('tvmonitor')", "<difficult> is '2'", "0 or 1"],
        ),
        (replaced("<difficult>0", "<difficult>perhaps"), ["<difficult> is 'perhaps'", "0 or 1"]),
        (replaced("<xmin>3", "<xmin>three"), ["<bndbox>: <xmin> is 'three'"]),
        (replaced("<ymax>2", "<ymax>nan"), ["<bndbox>: <ymax> is 'nan'"]),
        (replaced("<xmin>3</xmin>", ""), ["<bndbox>: <xmin> is None", "without a box"]),
    ],
)
def test_invalid_annotation_is_named(
    tmp_path: Path, change: Callable[[str], str], parts: list[str]
) -> None:
    path = make_voc(tmp_path) / "Annotations/000004.xml"
    path.write_text(change(path.read_text()))
    with refused(InputError, str(path), *parts):
        read_voc(tmp_path, ANNOTATIONS)


LAUGHS = """<!DOCTYPE a [<!ENTITY a "ha"><!ENTITY b "&a;&a;"><!ENTITY c "&b;&b;">]>"""


@pytest.mark.parametrize(
    "doctype", [LAUGHS, '<!DOCTYPE a SYSTEM "file:///etc/hostname">', "<!DOCTYPE a>"]
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_entities_are_never_expanded(tmp_path: Path, doctype: str, encoding: str) -> None:
    path = make_voc(tmp_path) / "Annotations/000004.xml"
    text = path.read_text().replace("tvmonitor", "&c;" if doctype is LAUGHS else "tvmonitor")
    path.write_bytes((doctype + text).encode(encoding))
    with refused(InputError, "000004.xml", "<!DOCTYPE>"):
        read_voc(tmp_path, ANNOTATIONS)


def test_declared_encoding_of_an_annotation_is_used(tmp_path: Path) -> None:
    path = make_voc(tmp_path) / "Annotations/000004.xml"
    text = path.read_text()
    path.write_bytes(
        ("<?xml version='1.0' encoding='latin-1'?><!-- Münster -->" + text).encode("latin-1")
    )
    assert names_of(read_voc(tmp_path, ANNOTATIONS)) == EXPECTED
    unknown = "<?xml version='1.0' encoding='klingon'?><!-- Münster -->" + text
    path.write_text(unknown, encoding="utf-8")  # which nothing else looks like
    assert names_of(read_voc(tmp_path, ANNOTATIONS)) == EXPECTED
    path.write_text(unknown, encoding="latin-1")
    with refused(InputError, "000004.xml", "encoding"):
        read_voc(tmp_path, ANNOTATIONS)


def test_image_without_any_object_is_unlabelled(tmp_path: Path) -> None:
    nothing: Voc = {"000009": []}
    make_voc(tmp_path, {**VOC_TRAIN, **nothing}, VOC_TEST)
    listing: Any = read_voc(tmp_path, ANNOTATIONS)
    assert names_of(listing)["000009"] == ("train", set(), set())
