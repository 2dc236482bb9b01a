"""pipeline.datasets.voc: what a devkit says, and every breach of its format by its message."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trees import VOC_TEST, VOC_TRAIN, Voc, VocObject, make_voc, voc_xml

from pipeline.datasets.listing import Listing
from pipeline.datasets.voc import VOCABULARY, read_voc
from pipeline.errors import GmpipeError
from pipeline.settings import VocSettings

ANNOTATIONS = VocSettings(source="voc")
LISTS = VocSettings(source="voc", labels="lists")
REMEDY = (
    r"VOC 2007 is expected with ImageSets/Main/, Annotations/ and JPEGImages/ in .*VOC2007: unpack "
    r"VOCtrainval_06-Nov-2007\.tar and VOCtest_06-Nov-2007\.tar in .*\.$"
)


def names_of(listing: Listing) -> dict[str, tuple[str, set[str], set[str]]]:
    """Image id -> split, names of its labels, names of its ignored labels."""
    return {
        row["image_id"]: (
            row["split"],
            {VOCABULARY[number] for number in row["labels"]},
            {VOCABULARY[number] for number in row["ignored"]},
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


# --- a sound devkit ------------------------------------------------------------------------------


@pytest.mark.parametrize("newline", ["\n", "\r\n", " \r\n", "\t\n\n", "\r\n \r\n"])
@pytest.mark.parametrize("source", [ANNOTATIONS, LISTS])
def test_labels_of_either_source(tmp_path: Path, source: VocSettings, newline: str) -> None:
    make_voc(tmp_path, newline=newline)
    found = read_voc(tmp_path, source)
    assert names_of(found) == EXPECTED
    assert found.split_name == "official"
    assert found.table.column("path").to_pylist() == [
        f"VOCdevkit/VOC2007/JPEGImages/{image_id}.jpg" for image_id in EXPECTED
    ]
    size = (20, 10) if source is ANNOTATIONS else (None, None)
    for row in found.table.to_pylist():
        assert (row["width"], row["height"]) == size
        assert row["labels"] == sorted(row["labels"])


def test_the_vocabulary_is_alphabetical() -> None:
    assert len(VOCABULARY) == 20
    assert list(VOCABULARY) == sorted(VOCABULARY)


def test_boxes_count_pixels_from_one_and_hold_both_ends(tmp_path: Path) -> None:
    make_voc(tmp_path)
    boxes = read_voc(tmp_path, ANNOTATIONS).boxes
    assert boxes is not None
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
    boxes = read_voc(tmp_path, ANNOTATIONS).boxes
    assert boxes is not None
    np.testing.assert_array_equal(boxes.images["000001"].boxes, [[0, 0, 1, 1]])


def test_parts_of_an_object_are_no_objects(tmp_path: Path) -> None:
    top = make_voc(tmp_path)
    path = top / "Annotations/000004.xml"
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part></object>"
    path.write_text(path.read_text().replace("</object>", part))
    assert names_of(read_voc(tmp_path, ANNOTATIONS)) == EXPECTED


def test_the_devkit_may_lie_elsewhere(tmp_path: Path) -> None:
    make_voc(tmp_path, folder="kit")
    for folder in ("kit", "kit/", "./kit"):
        source = ANNOTATIONS.model_copy(update={"folder": folder})
        found = read_voc(tmp_path, source)
        assert found.table.column("path")[0].as_py() == "kit/JPEGImages/000001.jpg"
        assert sorted(found.sources) == [
            "kit/Annotations",
            "kit/ImageSets/Main/test.txt",
            "kit/ImageSets/Main/trainval.txt",
        ]


OWN: dict[str, Voc] = {
    "train": {"b1": [VocObject("wasp", (1, 1, 10, 5)), VocObject("bee", difficult=1)], "b2": []},
    "test": {"b3": [VocObject("bee")]},
}


@pytest.mark.parametrize("source", [ANNOTATIONS, LISTS])
def test_a_devkit_of_ones_own_has_classes_of_its_own(tmp_path: Path, source: VocSettings) -> None:
    classes = ("wasp", "bee")  # in the order of the settings
    make_voc(tmp_path, OWN["train"], OWN["test"], vocabulary=classes)
    found = read_voc(tmp_path, source.model_copy(update={"vocabulary": list(classes)}))
    assert (found.vocabulary, found.split_name) == (classes, "own")
    columns = ("labels", "ignored", "split")
    assert [[row[name] for name in columns] for row in found.table.to_pylist()] == [
        [[0], [1], "train"],
        [[], [], "train"],
        [[1], [], "test"],
    ]
    if found.boxes is not None:
        assert found.boxes.classes == classes
        assert found.boxes.images["b3"].classes.tolist() == [2]


def test_a_missing_file_of_ones_own_devkit_is_not_looked_for_in_vocs(tmp_path: Path) -> None:
    make_voc(tmp_path, OWN["train"], OWN["test"], vocabulary=["wasp", "bee"])
    (tmp_path / "VOCdevkit/VOC2007/Annotations/b3.xml").unlink()
    own = ANNOTATIONS.model_copy(update={"vocabulary": ["wasp", "bee"]})
    with pytest.raises(GmpipeError, match=r"no .*/b3\.xml\. .*/VOC2007\. Put the file there\.$"):
        read_voc(tmp_path, own)
    with pytest.raises(
        GmpipeError,
        match=r"'wasp'\): unknown class, .*name the classes of your own photographs in "
        r"`prepare\.<dataset>\.vocabulary` of params\.yaml\.$",
    ):
        read_voc(tmp_path, ANNOTATIONS)


def test_sources_are_all_that_decides_the_labels(tmp_path: Path) -> None:
    top = make_voc(tmp_path)
    before = [read_voc(tmp_path, source).sources for source in (ANNOTATIONS, LISTS)]
    assert len(before[1]) == 2 + 2 * 20
    path = top / "Annotations/000004.xml"
    path.write_text(voc_xml([VocObject("cow")]))
    after = [read_voc(tmp_path, source).sources for source in (ANNOTATIONS, LISTS)]
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
@settings(max_examples=15, deadline=None)
def test_both_sources_always_agree(
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


def test_the_real_sample(shared: Path) -> None:
    """Against another reading: regular expressions on the XML, numpy on the lists."""
    root = shared / "data/voc2007-sample"
    top = root / "VOCdevkit/VOC2007"
    found = read_voc(root, ANNOTATIONS)
    assert names_of(found) == names_of(read_voc(root, LISTS))
    assert found.table.column("split").to_pylist() == ["train"] * 240 + ["test"] * 160
    for number, name in enumerate(VOCABULARY):
        values = np.concatenate(
            [
                np.loadtxt(top / f"ImageSets/Main/{name}_{split}.txt", dtype=int)
                for split in ("trainval", "test")
            ]
        )
        for row, (image_id, value) in zip(found.table.to_pylist(), values.tolist(), strict=True):
            assert int(row["image_id"]) == image_id
            assert (number in row["labels"], number in row["ignored"]) == (value == 1, value == 0)
    assert found.boxes is not None
    objects = 0
    for row in found.table.to_pylist():
        text = (top / f"Annotations/{row['image_id']}.xml").read_text()
        text = re.sub("<part>.*?</part>", "", text, flags=re.DOTALL)  # heads, hands and feet
        easy = [item for item in text.split("<object>")[1:] if "<difficult>0<" in item]
        classes = [re.findall("<name>([a-z]+)<", item)[0] for item in easy]
        corners = [re.findall(r"<[xy]m(?:in|ax)>(\d+)<", item)[:4] for item in easy]
        pixels = np.array(corners, dtype=int).reshape(-1, 4)  # xmin, ymin, xmax, ymax
        image = found.boxes.images[row["image_id"]]
        assert [VOCABULARY[number - 1] for number in image.classes] == classes
        scale = np.array([row["width"], row["height"]] * 2)
        np.testing.assert_allclose(image.boxes * scale, pixels - [1, 1, 0, 0], atol=1e-3)
        objects += len(easy)
    assert objects > 800


# --- breaches ------------------------------------------------------------------------------------


def refused(root: Path, source: VocSettings, pattern: str) -> None:
    with pytest.raises(GmpipeError, match=pattern):
        read_voc(root, source)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (ANNOTATIONS, "ImageSets/Main/trainval.txt"),
        (ANNOTATIONS, "ImageSets/Main/test.txt"),
        (ANNOTATIONS, "Annotations/000004.xml"),
        (LISTS, "ImageSets/Main/sofa_trainval.txt"),
        (LISTS, "ImageSets/Main/tvmonitor_test.txt"),
    ],
)
def test_a_missing_file_is_named_with_its_place(
    tmp_path: Path, source: VocSettings, name: str
) -> None:
    path = make_voc(tmp_path) / name
    content = path.read_bytes()
    path.unlink()
    refused(tmp_path, source, rf"^there is no {re.escape(str(path))}\. {REMEDY}")
    path.mkdir()
    refused(tmp_path, source, rf"^{re.escape(str(path))} can't be read \(Is a dir.*\)\. {REMEDY}")
    path.rmdir()
    path.write_bytes(content + b"\n\xff\xfe \n")
    refused(tmp_path, source, rf"^{re.escape(str(path))}.*(not UTF-8 text|not well-formed)")


def test_nothing_at_all(tmp_path: Path) -> None:
    refused(tmp_path / "voc2007", ANNOTATIONS, rf"there is no .*trainval\.txt\. {REMEDY}")
    (tmp_path / "file").touch()
    refused(tmp_path / "file", ANNOTATIONS, r"there is no .*trainval\.txt\. ")


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("trainval", "000007 1", "found '000007 1', expected an image id such as 000005. Mend"),
        ("trainval", "../000007", r"found '\.\./000007', expected an image id"),
        ("test", "a\\b", r"found 'a\\\\b', expected an image id"),
        ("trainval", "000012", "the image 000012 stands in the list of train already. Take it out"),
        ("test", "000012", "the image 000012 stands in the list of train already. Take it out"),
    ],
)
def test_a_line_of_a_list_is_named(tmp_path: Path, name: str, line: str, message: str) -> None:
    path = make_voc(tmp_path) / f"ImageSets/Main/{name}.txt"
    number = len(path.read_text().splitlines()) + 2
    path.write_text(path.read_text() + f"\n{line}\n")
    refused(tmp_path, ANNOTATIONS, rf"^{re.escape(str(path))}, line {number}: {message}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("000001", "found '000001', expected an image id and 1, 0 .difficult. or -1. Mend"),
        ("000001 2", "found '000001 2', expected an image id and"),
        ("000001 1 1", "found '000001 1 1', expected an image id and"),
        ("000001 +1", r"found '000001 \+1', expected an image id and"),
        ("000001 1", "the image 000001 stands here twice. Take the line out"),
        ("000004 1", "the image 000004 is not in the split's list. Take the line out"),
    ],
)
def test_a_line_of_a_class_list_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = make_voc(tmp_path) / "ImageSets/Main/bus_trainval.txt"
    path.write_text(path.read_text() + f"{line}\n")
    refused(tmp_path, LISTS, rf"^{re.escape(str(path))}, line 4: {message}")


def test_a_class_list_without_an_image(tmp_path: Path) -> None:
    path = make_voc(tmp_path) / "ImageSets/Main/bus_trainval.txt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:1]))
    refused(
        tmp_path,
        LISTS,
        r"bus_trainval\.txt: 2 of the split's 3 images have no line; the first is 000012\.",
    )


def replaced(before: str, after: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        assert before in text
        return text.replace(before, after, 1)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "", r"is no VOC annotation: no element found.* unpack VOCtrainval"),
        (lambda text: text[:-20], "is no VOC annotation: unclosed token: line 2"),
        (replaced("</name>", "</nam>"), "is no VOC annotation: mismatched tag: line 2"),
        (replaced("tvmonitor", "tv"), r"object 1 \('tv'\): unknown class, expected one of aeropl"),
        (replaced("<name>tvmonitor</name>", ""), r"object 1 \(''\): unknown class"),
        (replaced("<width>20", "<width>0"), "<size>: <width> is '0', expected a whole number of p"),
        (replaced("<width>20", "<width>"), "<size>: <width> is '', expected a whole number of pix"),
        (replaced("<height>10", "<height>1.5"), "<size>: <height> is '1.5', expected a whole num"),
        (replaced("<height>10", "<height>inf"), "<size>: <height> is 'inf', expected a whole num"),
        (replaced("size>", "sizes>"), "mismatched tag"),
        (
            replaced("<difficult>0", "<difficult>2"),
            r"\('tvmonitor'\): <difficult> is '2', exp.*0 or 1",
        ),
        (replaced("difficult>0</difficult", "x>0</x"), "<difficult> is None, expected 0 or 1"),
        (replaced("<xmin>3", "<xmin>three"), "<bndbox>: <xmin> is 'three', expected a number of p"),
        (replaced("<ymax>2", "<ymax>nan"), "<bndbox>: <ymax> is 'nan', expected a number of pix"),
        (
            replaced("<xmin>3", "<xmin>9"),
            r"the box \[9.0, 2.0, 3.0, 2.0\] covers nothing of the 20x10",
        ),
        (replaced("<ymin>2", "<ymin>3"), r"the box \[3.0, 3.0, 3.0, 2.0\] covers nothing"),
        (
            lambda text: text.replace("<xmin>3", "<xmin>30").replace("<xmax>3", "<xmax>40"),
            r"the box \[30.0, 2.0, 40.0, 2.0\] covers nothing of the 20x10 pixels. Mend the file",
        ),
        (lambda text: re.sub("<size>.*</size>", "", text), "<size>: <width> is None, expected"),
        (lambda text: re.sub("<bndbox>.*</bndbox>", "", text), "<bndbox>: <xmin> is None"),
    ],
)
def test_a_breach_in_an_annotation_is_named(
    tmp_path: Path, change: Callable[[str], str], message: str
) -> None:
    path = make_voc(tmp_path) / "Annotations/000004.xml"
    path.write_text(change(path.read_text()))
    with pytest.raises(GmpipeError, match=message) as caught:
        read_voc(tmp_path, ANNOTATIONS)
    assert str(path) in str(caught.value)


LAUGHS = """<!DOCTYPE a [<!ENTITY a "ha"><!ENTITY b "&a;&a;"><!ENTITY c "&b;&b;">]>"""


@pytest.mark.parametrize(
    "kind", [LAUGHS, '<!DOCTYPE a SYSTEM "file:///etc/hostname">', "<!DOCTYPE a>"]
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_entities_are_never_expanded(tmp_path: Path, kind: str, encoding: str) -> None:
    path = make_voc(tmp_path) / "Annotations/000004.xml"
    text = path.read_text().replace("tvmonitor", "&c;" if kind is LAUGHS else "tvmonitor")
    path.write_bytes((kind + text).encode(encoding))
    refused(tmp_path, ANNOTATIONS, r"000004\.xml is no VOC annotation: it has a document type")


def test_other_encodings_are_read_as_they_say(tmp_path: Path) -> None:
    path = make_voc(tmp_path) / "Annotations/000004.xml"
    text = path.read_text()
    path.write_bytes(
        ("<?xml version='1.0' encoding='latin-1'?><!-- Münster -->" + text).encode("latin-1")
    )
    assert names_of(read_voc(tmp_path, ANNOTATIONS)) == EXPECTED
    path.write_text("<?xml version='1.0' encoding='klingon'?>" + text)
    refused(tmp_path, ANNOTATIONS, r"000004\.xml is no VOC annotation: .*klingon|unknown encoding")


def test_an_image_without_any_object_is_unlabelled(tmp_path: Path) -> None:
    nothing: Voc = {"000009": []}
    make_voc(tmp_path, {**VOC_TRAIN, **nothing}, VOC_TEST)
    found: Any = read_voc(tmp_path, ANNOTATIONS)
    assert names_of(found)["000009"] == ("train", set(), set())
